"""The verbs adapt and finetune, and what they leave on disk."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from training.plane_scenes import write_plane_scenes

from subspace3d.backbones import build_vggt
from subspace3d.backbones.targets import target_modules
from subspace3d.commands import adapt, finetune
from subspace3d.commands.adapt import AdaptConfig
from subspace3d.commands.finetune import FinetuneConfig
from subspace3d.files import load_tensors, read_json, save_tensors
from subspace3d.formats.adapter import read_adapter
from subspace3d.formats.adapter_folders import find_adapters
from subspace3d.formats.subspace import ModuleSubspace, save_subspace
from subspace3d.training import adapters as adapters_module
from subspace3d.training import tuned as tuned_module
from subspace3d.training.adapters import find_datasets
from subspace3d.training.config import TrainConfig
from subspace3d.training.export import export_lora
from subspace3d.training.rates import usual_rate
from subspace3d.training.tuned import load_tuned

TRAIN = TrainConfig(
    steps=2,
    lr=1e-2,
    warmup=0.0,
    frames=(2, 2),
    images_per_step=2,
    image_size=28,
    checkpointing=False,
    check_memory=False,
    device="cpu",
    threads=1,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes of three data sets, weights of a backbone, and subspaces of two attributes for it."""
    folder = tmp_path_factory.mktemp("runs")
    for index, name in enumerate(("texture/texture_00", "texture/texture_01", "camera/camera_00")):
        write_plane_scenes(folder / "scenes" / name, scenes=2, views=2, seed=index)
    torch.manual_seed(3)
    model = build_vggt("vggt-nano", weights="random")
    save_tensors(folder / "nano.safetensors", model.state_dict())
    for attribute in ("texture", "camera"):
        modules = {}
        for name in target_modules(model, "aggregator"):
            out_size, in_size = model.get_parameter(f"{name}.weight").shape
            modules[name] = ModuleSubspace(
                torch.randn(out_size, 2), torch.randn(in_size, 2), torch.ones(2), torch.ones(1)
            )
        save_subspace(folder / f"subspaces/{attribute}.safetensors", modules, {"base_model": None, "adapters": []})
    return folder


def _finetune(folder: Path, out: Path, method: str, **changes) -> FinetuneConfig:
    return FinetuneConfig(
        scenes=folder / "scenes/texture/texture_00",
        out=out,
        method=method,  # type: ignore[arg-type]
        weights=folder / "nano.safetensors",
        subspaces=(folder / "subspaces",) if method == "subspace" else (),
        rank=3,
        core_size=3 if method == "psv" else 0,
        train=dataclasses.replace(TRAIN, steps=3) if method == "adalora" else TRAIN,
        **changes,
    )


def _outputs(model: nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        return model.eval()(torch.rand(1, 2, 3, 28, 28, generator=generator))


def _assert_same_outputs(found: nn.Module, expected: nn.Module, tolerance: float) -> None:
    first, second = _outputs(found), _outputs(expected)
    for key in ("pose_enc", "depth", "depth_conf"):
        torch.testing.assert_close(first[key], second[key], atol=tolerance, rtol=tolerance)


def _base(folder: Path) -> nn.Module:
    return build_vggt("vggt-nano", weights=folder / "nano.safetensors")


@pytest.fixture(scope="module")
def adapters(folder: Path) -> Path:
    config = AdaptConfig(
        scenes=folder / "scenes", out=folder / "adapters", weights=folder / "nano.safetensors", rank=2, train=TRAIN
    )
    adapt.run(config)
    return config.out


def test_adapt_writes_one_peft_folder_per_data_set(folder: Path, adapters: Path) -> None:
    names = [path.relative_to(adapters).as_posix() for path in find_adapters(adapters)]
    assert names == ["camera/camera_00", "texture/texture_00", "texture/texture_01"]
    assert not (adapters / ".work").exists() and (adapters / "config.yaml").is_file()
    first, second = (read_adapter(adapters / name) for name in names[:2])
    assert set(first.modules) == set(target_modules(_base(folder), "all"))
    assert first.base_model == second.base_model and first.base_model.startswith("vggt-nano@")
    # each starts from its own random factors
    name = "aggregator.frame_blocks.0.attn.qkv"
    starts = torch.nn.functional.normalize(torch.stack([a.modules[name][1].flatten() for a in (first, second)]), dim=1)
    assert abs(float(starts[0] @ starts[1])) < 0.5
    assert any(lora_b.any() for lora_b, _ in first.modules.values())
    record = read_json(adapters / names[0] / "adapt.json")
    assert record["training"]["steps"] == 2 and record["trainable"]["total"] > 0


def test_adapters_made_together_are_folders_like_those_made_alone(
    folder: Path, adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = AdaptConfig(
        scenes=folder / "scenes", out=tmp_path, weights=folder / "nano.safetensors", rank=2, together=3, train=TRAIN
    )
    assert [path.relative_to(tmp_path) for path in adapt.run(config)] == [
        Path(name) for name in ("camera/camera_00", "texture/texture_00", "texture/texture_01")
    ]
    output = capsys.readouterr()
    assert "adapt camera/camera_00 and 2 more: 2/2 steps in" in output.err
    assert not (tmp_path / ".work").exists()
    for made in find_adapters(tmp_path):
        alone = adapters / made.relative_to(tmp_path)
        assert sorted(path.name for path in made.iterdir()) == sorted(path.name for path in alone.iterdir())
        for name in ("adapter_config.json", "README.md"):
            assert (made / name).read_bytes() == (alone / name).read_bytes()
        (tensors, header), (expected, expected_header) = (
            load_tensors(path / "adapter_model.safetensors") for path in (made, alone)
        )
        assert header == expected_header and list(tensors) == list(expected)
        # AdamW's first steps are of the size of the rate whatever the gradient: where that is zero but for rounding (on
        # some CPUs 0.2 % of the values), either sign may come out. Other data or another start changes all values
        differing = sum(int(((tensors[name] - expected[name]).abs() > 1e-6).sum()) for name in tensors)
        assert differing <= 1e-2 * sum(tensor.numel() for tensor in tensors.values())
        record, expected_record = (read_json(path / "adapt.json") for path in (made, alone))
        assert record["training"].keys() == expected_record["training"].keys()
        assert [{**each, "training": None} for each in (record, expected_record)] == [
            {**expected_record, "training": None}
        ] * 2

    def refuse(*_: object) -> None:
        raise AssertionError("the backbone was loaded though nothing was missing")

    monkeypatch.setattr(adapters_module, "load_backbone", refuse)
    adapt.run(config)
    # how they are trained is no setting of theirs
    adapt.run(dataclasses.replace(config, together=1))
    assert capsys.readouterr().out.count("3 adapters, all made before with these settings") == 2


def test_together_is_refused_where_it_means_nothing(tmp_path: Path) -> None:
    def config(**changes: Any) -> AdaptConfig:
        train = dataclasses.replace(TRAIN, **changes.pop("train", {}))
        return AdaptConfig(scenes=tmp_path, out=tmp_path / "out", train=train, **changes)

    for changes, message in (
        ({"together": 0}, "together must be at least 1"),
        ({"together": 2, "gradient_only": True}, "together must be 1 with gradient_only"),
        ({"together": 2, "train": {"trackers": ("wandb",)}}, "together must be 1 with the tracker wandb"),
        ({"together": 3, "train": {"max_images": 5}}, "max_images must be 0 or at least 6, together x"),
    ):
        with pytest.raises(ValueError, match=message):
            config(**changes)


def test_groups_are_as_few_and_as_equal_as_can_be() -> None:
    assert adapters_module._groups(list("abcdefghij"), 4) == {"a": list("abc"), "d": list("def"), "g": list("ghij")}
    assert adapters_module._groups(list("ab"), 1) == {"a": ["a"], "b": ["b"]}
    assert adapters_module._groups(["a"], 4) == {"a": ["a"]}


def test_stock_peft_loads_an_adapter(folder: Path, adapters: Path) -> None:
    tuned = PeftModel.from_pretrained(_base(folder), str(adapters / "camera/camera_00"))
    expected = _outputs(_base(folder))
    assert not torch.allclose(_outputs(tuned)["depth"], expected["depth"], atol=1e-5)
    _assert_same_outputs(tuned.unload(), _base(folder), 0)


def test_adapt_does_only_what_is_missing(folder: Path, adapters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = AdaptConfig(
        scenes=folder / "scenes", out=adapters, weights=folder / "nano.safetensors", rank=2, train=TRAIN
    )
    weights = adapters / "texture/texture_01/adapter_model.safetensors"
    before = {path: path.read_bytes() for path in sorted(adapters.rglob("*.safetensors"))}
    stamps = {path: path.stat().st_mtime_ns for path in before}
    (weights.parent / "adapt.json").unlink()
    with pytest.raises(ValueError, match=r"out must be .* got .*texture_01"):
        adapt.run(config)  # an adapter, but none that adapt has made
    shutil.rmtree(weights.parent)
    assert adapt.run(config) == [
        adapters / name for name in ("camera/camera_00", "texture/texture_00", "texture/texture_01")
    ]
    # tuned again alone, after another data set or none, it is the same
    assert {path: path.read_bytes() for path in sorted(adapters.rglob("*.safetensors"))} == before
    assert [path for path in before if path.stat().st_mtime_ns != stamps[path]] == [weights]

    def refuse(*_: object) -> None:
        raise AssertionError("the backbone was loaded though nothing was missing")

    monkeypatch.setattr(adapters_module, "load_backbone", refuse)
    adapt.run(config)
    with pytest.raises(ValueError, match=r"rank 2 there, 4 now\); --overwrite replaces it"):
        adapt.run(dataclasses.replace(config, rank=4))


def test_adapt_overwrites_its_own_adapters_when_told_to(
    folder: Path, adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(adapters / "camera", tmp_path / "adapters")
    config = AdaptConfig(
        scenes=folder / "scenes/camera",
        out=tmp_path / "adapters",
        weights=folder / "nano.safetensors",
        rank=3,
        overwrite=True,
        train=TRAIN,
    )
    target = config.out / "camera_00"
    (target / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"which also holds notes\.txt"):
        adapt.run(config)
    (target / "notes.txt").unlink()
    assert adapt.run(config) == [target]
    assert f"adapt --overwrite replaces {target}\n" in capsys.readouterr().err
    assert read_json(target / "adapter_config.json")["r"] == 3
    adapt.run(config)  # done with these settings
    assert "replaces" not in capsys.readouterr().err


def test_adapters_can_start_at_the_gradient(folder: Path, tmp_path: Path) -> None:
    config = AdaptConfig(
        scenes=folder / "scenes/camera",
        out=tmp_path / "adapters",
        weights=folder / "nano.safetensors",
        rank=2,
        gradient_steps=1,
        train=TRAIN,
    )
    (written,) = adapt.run(config)
    modules = read_adapter(written).modules
    # orthogonal rows, which a random start does not have, hardly moved by two small steps
    rows = torch.stack([modules[name][1] for name in target_modules(_base(folder), "aggregator") if "qkv" in name])
    torch.testing.assert_close(3 * rows @ rows.mT, torch.eye(2).expand(len(rows), 2, 2), rtol=0, atol=0.02)
    with pytest.raises(ValueError, match="gradient_steps 1 there, 0 now"):
        adapt.run(dataclasses.replace(config, gradient_steps=0))


def test_data_sets_are_named_by_their_path(folder: Path) -> None:
    assert list(find_datasets(folder / "scenes/texture")) == ["texture_00", "texture_01"]
    assert list(find_datasets(folder / "scenes/texture/texture_00")) == ["texture_00"]


@pytest.mark.parametrize("method", ["none", "full", "bias", "lora", "pissa", "adalora", "psv", "subspace"])
def test_finetune_result_is_rebuilt(folder: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = {}
    save = tuned_module.save_tuned

    def keep(out: Path, model: nn.Module, *rest) -> Path:
        trained["model"] = model
        return save(out, model, *rest)

    monkeypatch.setattr(tuned_module, "save_tuned", keep)
    config = _finetune(folder, tmp_path / "run", method)
    record = finetune.run(config)
    rebuilt = load_tuned(tmp_path / "run")
    assert not rebuilt.training
    _assert_same_outputs(rebuilt, trained["model"], 1e-6)
    changed = not torch.allclose(_outputs(rebuilt)["depth"], _outputs(_base(folder))["depth"], atol=1e-5)
    assert changed == (method != "none")
    assert record["method"] == method and (tmp_path / "run/config.yaml").is_file()
    assert record["K"] == {"subspace": 4, "psv": 3}.get(method, 0)
    assert (record["training"] is None) == (method == "none")
    assert finetune.run(config) == record


def test_finetune_refuses_another_run_in_its_folder(folder: Path, tmp_path: Path) -> None:
    config = _finetune(folder, tmp_path, "none")
    finetune.run(config)
    with pytest.raises(ValueError, match="rank 3 there, 5 now"):
        finetune.run(dataclasses.replace(config, rank=5))
    finetune.run(dataclasses.replace(config, rank=5, resume="never"))
    with pytest.raises(ValueError, match="subspaces must name"):
        finetune.run(dataclasses.replace(config, method="subspace"))
    with pytest.raises(FileNotFoundError, match="weights"):
        finetune.run(dataclasses.replace(config, weights=tmp_path / "absent.safetensors"))


def test_changed_files_are_refused(folder: Path, tmp_path: Path) -> None:
    finetune.run(_finetune(folder, tmp_path, "subspace"))
    basis = tmp_path / "tuned/basis.safetensors"
    tensors, header = load_tensors(basis)
    original = basis.read_bytes()
    save_tensors(basis, {name: tensor + 1e-3 for name, tensor in tensors.items()}, header)
    with pytest.raises(ValueError, match=r"basis.safetensors must have the sha256"):
        load_tuned(tmp_path)
    basis.write_bytes(original)
    record = json.loads((tmp_path / "tuned/tuned.json").read_text())
    record["backbone"]["sha256"] = "0" * 64
    (tmp_path / "tuned/tuned.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="weights of vggt-nano"):
        load_tuned(tmp_path)
    with pytest.raises(FileNotFoundError, match="no tuned result"):
        load_tuned(tmp_path / "absent")


def test_export_is_an_exact_plain_lora(folder: Path, tmp_path: Path) -> None:
    finetune.run(_finetune(folder, tmp_path / "run", "subspace"))
    exported = export_lora(tmp_path / "run", tmp_path / "lora")
    stock = PeftModel.from_pretrained(_base(folder), str(exported))
    _assert_same_outputs(stock, load_tuned(tmp_path / "run"), 1e-5)
    assert not torch.allclose(_outputs(stock)["depth"], _outputs(_base(folder))["depth"], atol=1e-4)
    adapter = read_adapter(exported)
    assert adapter.modules["aggregator.frame_blocks.0.attn.qkv"][0].shape == (480, 4)
    assert adapter.modules["camera_head.embed_pose"][0].shape == (320, 3)
    finetune.run(_finetune(folder, tmp_path / "other", "none"))
    with pytest.raises(ValueError, match="must train an adapter, 'none' does not"):
        export_lora(tmp_path / "other", tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_random_backbone_is_rebuilt_from_its_seed(folder: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(_finetune(folder, tmp_path, "none"), weights=Path("random"))
    record = finetune.run(config)
    assert record["backbone"]["weights"] == "random"
    _assert_same_outputs(load_tuned(tmp_path), load_tuned(tmp_path), 0)


def test_the_lora_on_the_heads_takes_a_rate_of_its_own(folder: Path, tmp_path: Path) -> None:
    config = _finetune(folder, tmp_path / "run", "psv", head_lr=1e-3)
    config = dataclasses.replace(config, train=dataclasses.replace(TRAIN, steps=1))
    assert finetune.run(config)["settings"]["head_lr"] == 1e-3
    tuned = load_tuned(tmp_path / "run")
    # the first step of AdamW is as long as the rate, and both start at zero
    largest = {name: float(value.abs().max()) for name, value in tuned.named_parameters()}
    cores = [value for name, value in largest.items() if ".subspace_core." in name]
    heads = [value for name, value in largest.items() if ".lora_B." in name]
    assert cores and heads
    assert cores == pytest.approx([1e-2] * len(cores), rel=1e-3)
    assert [value for value in heads if value] == pytest.approx([1e-3] * sum(map(bool, heads)), rel=1e-3)

    with pytest.raises(ValueError, match=r"head_lr 0\.001 there, 0\.01 now"):
        finetune.run(dataclasses.replace(config, head_lr=0.0))  # the rate of the cores
    with pytest.raises(ValueError, match="head_lr must be 0 without cores"):
        _finetune(folder, tmp_path / "lora", "lora", head_lr=1e-3)


def test_a_run_from_before_there_was_a_rate_of_the_heads_is_done(folder: Path, tmp_path: Path) -> None:
    config = _finetune(folder, tmp_path / "run", "psv")
    record = finetune.run(config)
    assert record["settings"].pop("head_lr") == TRAIN.lr
    (tmp_path / "run/tuned/tuned.json").write_text(json.dumps(record), encoding="utf-8")
    assert finetune.run(config) == record
    with pytest.raises(ValueError, match="head_lr"):
        finetune.run(dataclasses.replace(config, head_lr=1e-3))


@pytest.mark.parametrize(("method", "head_lr"), [("subspace", usual_rate("vggt-nano", "lora")), ("lora", 0.0)])
def test_without_a_word_cores_and_the_lora_beside_them_take_their_usual_rates(
    folder: Path, tmp_path: Path, method: str, head_lr: float
) -> None:
    config = _finetune(folder, tmp_path, method)
    found = finetune.with_usual_rate(dataclasses.replace(config, train=dataclasses.replace(TRAIN, lr=0.0)))
    assert (found.train.lr, found.head_lr) == (usual_rate("vggt-nano", method), head_lr)
