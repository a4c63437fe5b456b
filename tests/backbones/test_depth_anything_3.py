"""The conventions of Depth Anything 3's real network, at tiny size: frames, units, colours, modules that are used."""

from __future__ import annotations

import math

import pytest
import torch
from backbones.pipeline import difference, predict
from backbones.tiny_da3 import backbone
from torch import nn

from subspace3d.adapters.counts import count_trainable
from subspace3d.adapters.methods import apply_method
from subspace3d.adapters.placement import select_modules
from subspace3d.backbones.find import find_backbone
from subspace3d.backbones.losses import LossCounts
from subspace3d.backbones.pose import encode_pose
from subspace3d.backbones.protocol import Prediction
from subspace3d.training.config import TrainConfig
from subspace3d.training.memory import estimate_memory


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return backbone().build("random")


def test_cameras_come_as_camera_from_world_and_in_pixels(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder says camera-to-world: a camera at (1, 2, 3), turned by a quarter about z, 90 and 60 degrees wide."""
    half = math.sqrt(0.5)
    encoding = torch.tensor([1.0, 2, 3, 0, 0, half, half, math.pi / 2, math.pi / 3]).expand(1, 3, 9)
    monkeypatch.setattr(model.cam_dec, "forward", lambda *args, **kwargs: encoding)
    prediction = predict(model)
    assert prediction.extrinsics is not None and prediction.intrinsics is not None
    assert prediction.extrinsics.shape == (1, 3, 3, 4)
    # R^T of the quarter turn, and -R^T (1, 2, 3)
    expected = torch.tensor([[0.0, 1, 0, -2], [-1, 0, 0, 1], [0, 0, 1, -3]])
    assert torch.allclose(prediction.extrinsics[0, 1], expected, atol=1e-6)
    focal_y, focal_x = 14 / math.tan(math.pi / 4), 14 / math.tan(math.pi / 6)
    pixels = torch.tensor([[focal_x, 0, 14], [0, focal_y, 14], [0, 0, 1]])
    assert torch.allclose(prediction.intrinsics[0, 2], pixels, rtol=1e-6)
    # what the camera loss compares is VGGT's encoding of the same camera, camera-from-world
    own = encode_pose(prediction.extrinsics, prediction.intrinsics, (28, 28))
    wanted = torch.tensor([-2.0, 1, -3, 0, 0, -half, half, math.pi / 2, math.pi / 3])
    assert torch.allclose(own[0, 0], wanted, atol=1e-6)


def test_the_first_image_is_the_frame_and_the_order_of_the_others_is_free(model: nn.Module) -> None:
    described, order = backbone(), [0, 2, 1, 3]
    images = torch.rand(1, 4, 3, 28, 28)
    model.eval()
    with torch.no_grad():
        plain, turned = described(model, images), described(model, images[:, order])
        other = described(model, images[:, [1, 0, 2, 3]])
    for name in ("depth", "confidence", "extrinsics", "intrinsics"):
        here, there = getattr(plain, name)[:, order], getattr(turned, name)
        assert float((here - there).abs().max() / here.abs().max()) < 1e-5, name
    # another first image is another frame
    assert float((other.depth[:, [1, 0, 2, 3]] - plain.depth).abs().max()) > 1e-4  # type: ignore[index, operator]
    assert plain.confidence is not None and float(plain.confidence.min()) >= 1


def test_colours_are_normalised_once(model: nn.Module) -> None:
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    images = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1).expand(1, 2, 3, 28, 28).clone()
    images[:, 1] += torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    backbone()(model, images)
    assert torch.allclose(seen[0][:, 0], torch.zeros(()), atol=1e-6)
    assert torch.allclose(seen[0][:, 1], torch.ones(()), atol=1e-5)


def test_everything_that_is_trained_gets_a_gradient_and_nothing_else_is_trained(model: nn.Module) -> None:
    described = backbone()
    apply_method(model, "full")
    prediction = described(model, torch.rand(1, 3, 3, 28, 28))
    batch = _batch(prediction)
    described.loss(prediction, batch, 5.0, LossCounts.of(batch))["loss"].backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained
    # every Linear and convolution among them is in the preset `all`, and nothing else
    kinds = (nn.Linear, nn.Conv2d)
    modules = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    assert set(select_modules(model, "all")) == {name for name in modules if f"{name}.weight" in trained}
    assert not any(".blocks.0." in name or ".blocks.1." in name or "patch_embed" in name for name in trained)


def _batch(prediction: Prediction) -> dict[str, torch.Tensor]:
    assert prediction.depth is not None
    scenes, frames, height, width = prediction.depth.shape
    intrinsics = torch.tensor([[30.0, 0, 14], [0, 30, 14], [0, 0, 1]])
    return {
        "depths": torch.ones(scenes, frames, height, width),
        "point_masks": torch.ones(scenes, frames, height, width, dtype=torch.bool),
        "extrinsics": torch.eye(3, 4).expand(scenes, frames, 3, 4),
        "intrinsics": intrinsics.expand(scenes, frames, 3, 3),
    }


def test_the_memory_estimate_leaves_the_network_as_it_was(model: nn.Module) -> None:
    tuned = apply_method(model, "lora", 2)
    before = predict(tuned)
    described = backbone()
    sizes = []
    for enabled in (False, True):
        described.checkpointing(tuned, enabled)
        sizes.append(estimate_memory(tuned, TrainConfig(), 56, 1, 4).step)
    assert 0 < sizes[1] < sizes[0]
    described.checkpointing(tuned, False)
    assert difference(predict(tuned), before) == 0


def test_parameters_of_the_published_sizes() -> None:
    """Counted on the meta device; a LoRA of rank 1 on a Linear has as many parameters as it has rows and columns."""
    counts = count_trainable("da3-small", "lora", 16)
    assert counts["backbone"] == 8 * 16 * (384 + 1152 + 2 * (384 + 1536) + 384 + 384)
    assert counts["total"] == sum(value for name, value in counts.items() if name != "total")
    assert count_trainable("da3-base", "subspace", 16, 256)["backbone"] == 8 * 4 * 256**2
    assert list(count_trainable("da3-small", "none", 1)) == ["backbone", "camera_head", "depth_head", "total"]
    with torch.device("meta"):
        assert sum(p.numel() for p in find_backbone("da3-small").network().parameters()) == 34_299_463
