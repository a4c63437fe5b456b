"""The measurements and the export of scripts/pretrain_nano.py."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn
from training.plane_scenes import write_plane_scenes

from subspace3d.backbones import build_vggt
from subspace3d.backbones.pose import encode_pose
from subspace3d.datasets.multiview import MultiViewDataset
from subspace3d.files import load_tensors


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts/pretrain_nano.py"
    spec = importlib.util.spec_from_file_location("pretrain_nano", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Oracle(nn.Module):
    """Answers with the true cameras and 7 times the true depth of the scene whose images it is shown."""

    def __init__(self, dataset: MultiViewDataset) -> None:
        super().__init__()
        self.device_holder = nn.Parameter(torch.zeros(1))
        self.scenes = [dataset.scene(index) for index in range(len(dataset))]

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        frames = images.shape[1]
        shown = (images[0].permute(0, 2, 3, 1) * 255).round().byte().numpy()
        scene = next(scene for scene in self.scenes if np.array_equal(scene.images[:frames], shown))
        extrinsics, intrinsics = (torch.from_numpy(a[:frames])[None] for a in (scene.extrinsics, scene.intrinsics))
        return {
            "depth": 7 * torch.from_numpy(scene.depths[:frames])[None, ..., None],
            "pose_enc": encode_pose(extrinsics, intrinsics, (112, 112)),
        }


def test_measure_of_a_perfect_model(script: ModuleType, tmp_path: Path) -> None:
    dataset = MultiViewDataset(write_plane_scenes(tmp_path, scenes=2, views=3, size=112), 112)
    figures = script.measure(Oracle(dataset), dataset, frames=3)
    assert figures["abs_rel"] == pytest.approx(0, abs=1e-6)
    assert figures["abs_rel_constant"] > 0.02
    assert figures["rotation_error_median_deg"] == pytest.approx(0, abs=1e-3)


def test_exported_weights_load_as_the_backbone(script: ModuleType, tmp_path: Path) -> None:
    model = build_vggt("vggt-nano", weights="random")
    script.export(model, tmp_path / "nano.safetensors", {"held_out": {"abs_rel": 0.1}})
    assert (tmp_path / "nano.safetensors").stat().st_size < script.LARGEST_FILE
    assert load_tensors(tmp_path / "nano.safetensors")[1]["held_out"] == {"abs_rel": 0.1}
    loaded = build_vggt("vggt-nano", weights=tmp_path / "nano.safetensors")
    for (name, expected), (_, found) in zip(model.named_parameters(), loaded.named_parameters()):
        assert found.dtype == torch.float32
        assert torch.equal(found, expected.half().float()), name
    with pytest.raises(ValueError, match="at most 20000000 bytes"):
        script.export(nn.Linear(4000, 4000), tmp_path / "large.safetensors", {})
