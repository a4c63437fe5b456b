"""The verb export on runs of finetune."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapters.models import write_subspace
from peft import PeftModel
from training.plane_scenes import write_plane_scenes

from subspace3d.adapters.basis import basis_for_model
from subspace3d.backbones import build_vggt
from subspace3d.backbones.targets import target_modules
from subspace3d.cli import main
from subspace3d.commands import finetune
from subspace3d.commands.finetune import FinetuneConfig
from subspace3d.files import read_json
from subspace3d.formats.adapter import read_adapter
from subspace3d.formats.basis import basis_digest, load_basis
from subspace3d.training.config import TrainConfig
from subspace3d.training.tuned import load_tuned


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    write_plane_scenes(folder / "scenes", scenes=1, views=2)
    model = build_vggt("vggt-nano")
    for seed, name in enumerate(("camera", "texture")):
        write_subspace(folder / f"mined/{name}.safetensors", model, k=4, seed=seed, preset="all")
    return folder


def _run(folder: Path, name: str, method: str, **settings) -> Path:
    train = TrainConfig(
        steps=3, lr=1e-2, warmup=0.0, frames=(2, 2), images_per_step=2, image_size=28, device="cpu", threads=1
    )
    settings = {"scenes": folder / "scenes", "rank": 3, "train": train, **settings}
    finetune.run(FinetuneConfig(out=folder / name, method=method, **settings))  # type: ignore[arg-type]
    return folder / name


def _outputs(model: torch.nn.Module) -> torch.Tensor:
    images = torch.rand(1, 2, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        predictions = model.eval()(images)
    return torch.cat([predictions[key].flatten() for key in ("pose_enc", "depth", "depth_conf")])


def test_every_adapter_becomes_a_plain_lora(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {
        "pissa": {},
        "adalora": {},
        "subspace": {"subspaces": (folder / "mined",), "head_cores": True, "k": 2},
    }
    for method, settings in cases.items():
        run = _run(folder, method, method, **settings)
        main(["export", str(run)])
        assert capsys.readouterr().out.splitlines()[-1].startswith(f"{run}/export/lora: plain LoRA")
        stock = _outputs(PeftModel.from_pretrained(build_vggt("vggt-nano"), run / "export/lora"))
        expected = _outputs(load_tuned(run))
        assert float((stock - expected).abs().max()) < 1e-6 * float(expected.abs().max())
        assert float((expected - _outputs(build_vggt("vggt-nano"))).abs().max()) > 1e-4
        assert read_adapter(run / "export/lora").base_model == "vggt-nano"


def test_basis_goes_to_the_authors_layout_and_back(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    selected = {"subspaces": (folder / "mined",), "attributes": ("texture",)}
    run = _run(folder, "one", "subspace", **selected)
    record = read_json(run / "tuned/tuned.json")
    assert record["K"] == 4 and [Path(entry["path"]).stem for entry in record["basis"]] == ["texture"]
    main(["export", "--run", str(run), "--to", "authors", "--out", str(folder / "theirs.safetensors")])
    assert "no place for the trained cores" in capsys.readouterr().out
    model = build_vggt("vggt-nano")
    basis = basis_for_model([folder / "theirs.safetensors"], model)
    assert set(basis) == set(target_modules(model, "aggregator"))
    assert basis_digest(basis) == basis_digest(load_basis(run / "tuned/basis.safetensors"))
    # tuned from their file, the same run ends in the same adapter
    again = _run(folder, "two", "subspace", subspaces=(folder / "theirs.safetensors",))
    files = [path / "tuned/adapter/adapter_model.safetensors" for path in (run, again)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_runs_without_the_wanted_thing_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, none = _run(folder, "plain", "lora"), _run(folder, "none", "none")
    for arguments, message in (
        ([str(none)], "must train an adapter, 'none' does not"),
        ([str(plain), "--to", "authors"], "must be psv or subspace, which have a basis, got 'lora'"),
        ([str(folder / "absent")], "no tuned result (tuned.json) in"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["export", *arguments])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
