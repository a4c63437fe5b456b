"""The whole pipeline from the command line on backbones that are not VGGT."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from backbones.pipeline import check_pipeline, predict, run_pipeline
from backbones.tiny_da3 import backbone as tiny_da3

from subspace3d.files import save_tensors
from subspace3d.formats.subspace import load_subspace
from subspace3d.training.export import export_lora

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.timeout(600)
def test_depth_anything_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "backbones.tiny_da3:backbone"
    torch.manual_seed(3)
    weights = {f"model.{key}": value for key, value in tiny_da3().network().state_dict().items()}
    # the shared norms of the second head stand there once for each level
    save_tensors(tmp_path / "model.safetensors", {key: value.clone() for key, value in weights.items()})
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\ntags: [depth]\n---\n# A model\n", encoding="utf-8")
    ran = run_pipeline(name, tmp_path, ("--weights", str(tmp_path / "model.safetensors")))
    assert "prefix 'model.' was taken off" in capsys.readouterr().out
    check_pipeline(ran, "apache-2.0")
    assert load_subspace(tmp_path / "adapters.safetensors").header["licence"] == ["apache-2.0"]
    about = ran.json("evaluation/results.json")["backbone"]
    assert about["lacks"] == {} and about["scale"] == "scene" and about["frame"] == "first"


@pytest.mark.timeout(600)
def test_a_backbone_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(EXAMPLES)
    name = "your_own_backbone:YourBackbone"
    try:
        ran = run_pipeline(name, tmp_path)
        check_pipeline(ran, "none: random weights")
        assert predict(ran.base()).confidence is None
        assert ran.json("evaluation/results.json")["backbone"]["lacks"] == {"confidence": "missing"}
        # a run folder alone starts no code from outside the package
        with pytest.raises(ValueError, match=f"backbone must be {name}, on which .* was tuned, got none"):
            export_lora(tmp_path / "run", tmp_path / "elsewhere")
    finally:
        sys.modules.pop("your_own_backbone", None)
