"""vggt-1b through the same code: from a checkpoint file with the published names and shapes, filled at random."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training.plane_scenes import write_plane_scenes
from training.tiny import read_metrics

from subspace3d.backbones.config import CONFIGS, VGGTConfig
from subspace3d.backbones.vggt import VGGT
from subspace3d.cli import main
from subspace3d.files import read_json, save_tensors
from subspace3d.training.tuned import load_tuned

FLAGS = [
    *("--backbone", "vggt-1b", "--train.image-size", "28", "--train.frames", "2", "2", "--train.images-per-step", "2"),
    *("--train.device", "cpu", "--train.precision", "bf16", "--train.lr", "1e-4"),
]
# every kind of module the large model has, once
SHALLOW = dataclasses.replace(
    CONFIGS["vggt-1b"],
    encoder_depth=1,
    depth=2,
    camera_depth=1,
    embed_dim=128,
    depth_taps=(0, 0, 1, 1),
    depth_features=32,
    depth_channels=(32, 32, 32, 32),
)


def _write_checkpoint(path: Path, config: VGGTConfig) -> set[str]:
    """bf16 weights small enough for finite outputs; returns their names."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in VGGT(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)

    def draw(shape: torch.Size) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=torch.bfloat16)
        return tensor.normal_(0, 1 / max(1, tensor[:1].numel()) ** 0.5, generator=generator)

    save_tensors(path, {name: draw(shape) for name, shape in shapes.items()})
    return set(shapes)


def _layout(names: set[str]) -> set[str]:
    """Names without the numbers of blocks."""
    return {re.sub(r"(blocks|trunk)\.\d+\.", r"\1.N.", name) for name in names}


def test_shallow_model_with_the_same_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        published = set(VGGT(CONFIGS["vggt-1b"]).state_dict())
    monkeypatch.setitem(CONFIGS, "vggt-1b", SHALLOW)
    names = _write_checkpoint(tmp_path / "model.safetensors", SHALLOW)
    assert names < published and _layout(names) == _layout(published)
    scenes = write_plane_scenes(tmp_path / "scenes/a", scenes=1, views=2)
    common = ["--weights", str(tmp_path / "model.safetensors"), *FLAGS, "--train.steps", "2", "--train.no-check-memory"]
    main(["adapt", "--scenes", str(scenes.parent), "--out", str(tmp_path / "adapters"), "--rank", "2", *common])
    main(["finetune", "--scenes", str(scenes), "--out", str(tmp_path / "run"), "--method", "full", *common])
    record = read_json(tmp_path / "run/tuned/tuned.json")
    assert record["backbone"]["name"] == "vggt-1b" and record["training"]["skipped"] == 0
    assert read_json(tmp_path / "adapters/a/adapt.json")["training"]["steps"] == 2
    tuned = load_tuned(tmp_path / "run")
    with torch.no_grad():
        assert tuned(torch.rand(1, 2, 3, 28, 28))["depth"].isfinite().all()


@pytest.mark.slow(reason="writes and trains 1.16 billion parameters, a minute of two cores")
def test_the_whole_model(tmp_path: Path) -> None:
    _write_checkpoint(tmp_path / "model.safetensors", CONFIGS["vggt-1b"])
    scenes = write_plane_scenes(tmp_path / "scenes", scenes=1, views=2)
    arguments = ["--scenes", str(scenes), "--out", str(tmp_path / "run"), "--method", "lora"]
    arguments += ["--weights", str(tmp_path / "model.safetensors"), *FLAGS, "--train.steps", "2"]
    run = subprocess.run(
        [sys.executable, "-m", "subspace3d", "finetune", *arguments], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    estimate = re.search(r"memory estimate: ([\d.]+) GiB \(weights ([\d.]+)", run.stdout)
    assert estimate is not None and 4.2 < float(estimate[2]) < 4.6 and float(estimate[1]) < 6
    record = read_json(tmp_path / "run/tuned/tuned.json")
    assert record["trainable"]["total"] == 16_336_192  # LoRA r = 16 on all 242 modules, as in the paper
    assert record["training"]["skipped"] == 0
    assert record["training"]["peak_memory_bytes"] < 8e9
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2]
