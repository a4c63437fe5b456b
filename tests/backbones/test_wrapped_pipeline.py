"""The whole pipeline from the command line on every wrapped backbone, with small networks in their packages' place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from backbones.pipeline import TRAIN, check_pipeline, run_pipeline
from safetensors.torch import save_file
from training.plane_scenes import write_plane_scenes

from subspace3d.backbones.build import build_backbone
from subspace3d.backbones.find import find_backbone
from subspace3d.cli import main
from subspace3d.formats.adapter import read_adapter
from subspace3d.formats.basis import load_authors
from subspace3d.formats.subspace import load_subspace

pytestmark = pytest.mark.usefixtures("other_packages")

BACKBONES = ("pi3", "pi3x", "vggt-omega", "mapanything-apache")
# of a minute on a busy core: one always, the others with --slow
ONE_ALWAYS = ["pi3", *(pytest.param(name, marks=pytest.mark.slow) for name in BACKBONES[1:])]


@pytest.fixture
def small_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two patches a side in the place of the published 518 or 512 pixels."""
    for name in ("da3-small", *BACKBONES):
        backbone = type(find_backbone(name))
        monkeypatch.setattr(backbone, "image_size", 2 * backbone.patch_size)


def _weights(name: str, folder: Path) -> Path:
    """A file of weights, as a user has it."""
    torch.manual_seed(3)
    folder.mkdir()
    model = build_backbone(name, "random")
    if name.startswith("mapanything"):
        (folder / "config.json").write_text(json.dumps({"dim": 16}))
    # of a tensor with two names safetensors keeps one
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    path = folder / "model.safetensors"
    save_file({key: value.detach().clone() for key, value in tensors.items()}, path)
    return path


@pytest.mark.parametrize("name", ONE_ALWAYS)
def test_the_whole_pipeline(name: str, small_images: None, tmp_path: Path, capsys) -> None:
    backbone = find_backbone(name)
    weights = ("--weights", str(_weights(name, tmp_path / "weights")))
    # poses differ between the pairs of frames that are drawn, points hardly
    ran = run_pipeline(name, tmp_path, weights, ("--train.lr", "0.02", "--train.camera-weight", "0.1"))
    check_pipeline(ran, str(backbone.licence))
    assert ran.json("evaluation/results.json")["backbone"]["lacks"] == dict(backbone.lacks)
    assert load_subspace(tmp_path / "gradients.safetensors").header["licence"] == [backbone.licence]
    for source, folder in (("tuned", "adapters"), ("gradient", "gradients")):
        adapter = read_adapter(tmp_path / folder / "texture/set_0")
        assert adapter.source == source and str(adapter.base_model).startswith(f"{name}@")
    if name.startswith("pi3"):
        main(["export", str(tmp_path / "run"), "--to", "authors", "--out", str(tmp_path / "theirs.safetensors")])
        basis = load_authors(tmp_path / "theirs.safetensors")
        parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        assert set(basis) == {f"decoder.{layer}.{part}" for layer in range(4) for part in parts}


@pytest.mark.parametrize("name", [pytest.param("da3-small", marks=pytest.mark.slow), *BACKBONES])
def test_random_weights_need_no_file_from_the_count_to_the_report(
    name: str, small_images: None, tmp_path: Path, capsys
) -> None:
    write_plane_scenes(tmp_path / "scenes", scenes=1, views=2)
    given = ["--backbone", name, "--weights", "random", "--scenes", str(tmp_path / "scenes")]
    psv = ["--method", "psv", "--core-size", "3", "--rank", "2"]
    run, evaluation = tmp_path / "runs/psv", tmp_path / "runs/evaluation"
    # also bfloat16, traced and trained; evaluated in float32
    main(["finetune", *given, *psv, "--out", str(run), "--train.steps", "1", *TRAIN, "--train.precision", "bf16"])
    trained = json.loads((run / "tuned/tuned.json").read_text())["trainable"]["total"]
    main(["evaluate", *given, "--tuned", str(run), "--out", str(evaluation), "--device", "cpu", "--frames", "2"])
    methods = json.loads((evaluation / "results.json").read_text())["methods"]
    assert {method: record["trainable_parameters"] for method, record in methods.items()} == {"base": 0, "psv": trained}
    assert all(record["evaluated"] == 1 and not record["failed"] for record in methods.values())
    main(["report", "--run", str(tmp_path / "runs")])
    page = (tmp_path / "runs/report/index.html").read_text(encoding="utf-8")
    assert f"{trained:,}" in page and name in page
    capsys.readouterr()
    main(["params", "--backbone", name, *psv])
    assert capsys.readouterr().out.startswith(f"{trained:,}")


@pytest.mark.parametrize("name", ONE_ALWAYS)
def test_adapters_together_are_those_alone(
    name: str, small_images: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for index in range(2):
        write_plane_scenes(tmp_path / f"scenes/set_{index}", scenes=2, views=3, seed=index)
    weights = _weights(name, tmp_path / "weights")
    command = [
        "adapt",
        "--scenes",
        str(tmp_path / "scenes"),
        "--backbone",
        name,
        "--weights",
        str(weights),
        "--rank",
        "2",
    ]
    train = [*TRAIN, "--train.images-per-step", "4", "--train.steps", "2", "--train.lr", "0.003"]
    main([*command, "--out", str(tmp_path / "1"), *train])
    together = [*command, "--out", str(tmp_path / "2"), "--together", "2", *train]
    if name.startswith("mapanything"):
        # goes through a batch view by view
        with pytest.raises(SystemExit):
            main(together)
        assert capfd.readouterr().err.count(f"together must be 1 on {name}: it does not keep the scenes") == 2
        return
    main(together)
    for index in range(2):
        alone, together = (read_adapter(tmp_path / count / f"set_{index}").modules for count in ("1", "2"))
        assert alone.keys() == together.keys()
        pairs = [(a, b) for key in alone for a, b in zip(alone[key], together[key])]
        # AdamW's first steps are of the size of the rate whatever the gradient, whose last bits may differ
        differing = sum(int(((a - b).abs() > 1e-5).sum()) for a, b in pairs)
        assert differing <= 1e-3 * sum(a.numel() for a, _ in pairs)
