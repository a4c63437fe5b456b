"""Losses against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from subspace3d.backbones.losses import (
    LossCounts,
    camera_loss,
    depth_loss,
    drop_outliers,
    gradient_loss,
    multitask_loss,
)
from subspace3d.backbones.pose import encode_pose
from subspace3d.backbones.protocol import Prediction


def _batch(scenes: int = 1, frames: int = 2, size: int = 14) -> dict:
    extrinsics = torch.eye(4)[:3].repeat(scenes, frames, 1, 1)
    intrinsics = torch.tensor([[size / 2, 0, size / 2], [0, size / 2, size / 2], [0, 0, 1.0]])
    return {
        "extrinsics": extrinsics,
        "intrinsics": intrinsics.repeat(scenes, frames, 1, 1),
        "depths": torch.ones(scenes, frames, size, size),
        "point_masks": torch.ones(scenes, frames, size, size, dtype=torch.bool),
    }


def test_camera_loss_weights_terms_and_stages() -> None:
    batch = _batch()
    truth = encode_pose(batch["extrinsics"], batch["intrinsics"], (14, 14))
    early = truth.clone()
    early[..., :3] += 0.3  # translation
    late = truth.clone()
    late[..., 3:7] += 0.2  # quaternion
    late[..., 7:] += 0.1  # field of view, weight one half
    loss = camera_loss([early, late], batch)
    # two stages: weight 0.6 for the first, 1 for the last, divided by 2
    assert loss["camera"].item() == pytest.approx((0.6 * 0.3 + 0.2 + 0.5 * 0.1) / 2, rel=1e-5)
    assert loss["rotation"].item() == pytest.approx(0.2, rel=1e-5)
    assert loss["translation"].item() == pytest.approx(0.0, abs=1e-6)


def test_camera_loss_clamps_translation() -> None:
    batch = _batch()
    encoding = encode_pose(batch["extrinsics"], batch["intrinsics"], (14, 14))
    encoding[..., :3] += 1e6
    assert camera_loss([encoding], batch)["camera"].item() == pytest.approx(100.0)


def test_camera_loss_counts_scenes_by_their_first_frame() -> None:
    batch = _batch(scenes=2)
    encoding = encode_pose(batch["extrinsics"], batch["intrinsics"], (14, 14)).requires_grad_()
    wrong = encoding + torch.tensor([0.0, 1.0])[:, None, None]
    # one scene right, one off by one: half of 1 + 1 + 0.5
    assert camera_loss([wrong], batch)["camera"].item() == pytest.approx(1.25)
    batch["point_masks"][1, 0].view(-1)[100:] = False  # exactly 100 valid points are too few
    assert camera_loss([wrong], batch)["camera"].item() == pytest.approx(0.0, abs=1e-6)
    batch["point_masks"][0, 0] = False
    loss = camera_loss([wrong], batch)["camera"]
    loss.backward()
    assert loss.item() == 0 and encoding.grad is not None and not encoding.grad.any()


def test_camera_loss_of_scenes_without_depth_or_translation() -> None:
    batch = _batch(scenes=3)
    wrong = encode_pose(batch["extrinsics"], batch["intrinsics"], (14, 14)) + 1
    batch["point_masks"][1] = False
    batch |= {"has_depth": torch.tensor([True, False, True]), "translation_known": torch.tensor([True, True, False])}
    wrong[1:, :, :3] += 50  # neither scene's translation counts
    loss = camera_loss([wrong], batch)
    assert loss["translation"].item() == pytest.approx(1) and loss["camera"].item() == pytest.approx(2.5)
    wrong[1:, :, 3:] += 3  # but their rotations and fields of view do: mean of 1, 4, 4
    assert camera_loss([wrong], batch)["camera"].item() == pytest.approx(1 + 3 + 0.5 * 3)


def test_depth_loss_of_a_constant_error() -> None:
    batch = _batch()  # 392 pixels: too few for the outlier filter
    depth, confidence = torch.full((1, 2, 14, 14, 1), 1.5), torch.full((1, 2, 14, 14), 2.0)
    loss = depth_loss(depth, confidence, batch)
    assert loss["depth_error"].item() == pytest.approx(0.5)
    assert loss["depth_confidence"].item() == pytest.approx(0.5 * 2 - 0.2 * math.log(2), rel=1e-6)
    assert loss["depth_gradient"].item() == 0
    assert loss["depth"].item() == pytest.approx(1.5 - 0.2 * math.log(2), rel=1e-6)


def test_depth_loss_ignores_invalid_pixels() -> None:
    batch = _batch()
    batch["point_masks"][:, :, :3] = False
    batch["depths"][:, :, :3] = 0
    depth = torch.ones(1, 2, 14, 14, 1)
    depth[:, :, :3] = float("nan")
    depth.requires_grad_()
    confidence = torch.full((1, 2, 14, 14), 3.0)
    loss = depth_loss(depth, confidence, batch)["depth"]
    loss.backward()
    assert loss.item() == pytest.approx(-0.2 * math.log(3), rel=1e-6)
    assert depth.grad is not None and depth.grad.isfinite().all()


def test_depth_loss_needs_a_hundred_pixels() -> None:
    batch = _batch()
    batch["point_masks"][:] = False
    batch["point_masks"].view(-1)[:99] = True
    depth = torch.full((1, 2, 14, 14, 1), 2.0, requires_grad=True)
    loss = depth_loss(depth, torch.full((1, 2, 14, 14), 2.0), batch)["depth"]
    assert loss.item() == 0
    loss.backward()


def test_gradient_loss_of_a_ramp() -> None:
    residual = torch.arange(8.0).expand(1, 8, 8)  # grows by one per column, flat down the rows
    mask = torch.ones(1, 8, 8, dtype=torch.bool)
    # scale k: size n = 8 / 2^k, (n - 1) n differences of 2^k over n^2 pixels
    expected = sum(2**k * (n - 1) / n for k, n in enumerate((8, 4, 2, 1))) / 4
    assert gradient_loss(residual, torch.zeros_like(residual), mask).item() == pytest.approx(expected)


def test_gradient_loss_leaves_out_differences_across_the_mask() -> None:
    residual = torch.zeros(1, 1, 4)
    residual[0, 0, 2:] = 5
    mask = torch.tensor([[[True, False, True, True]]])
    # full size: no valid pair differs; stride 2: pixels 0 and 2 are valid and differ by 5; strides 4 and 8: one pixel
    assert gradient_loss(residual, torch.zeros_like(residual), mask).item() == pytest.approx(5 / 2 / 4)


def test_drop_outliers() -> None:
    values = torch.arange(2000.0)[torch.randperm(2000)] / 1000
    kept = drop_outliers(values)
    # nearest rank of 0.98 * 1999 = 1959.02: values at or above 1.959 go
    assert kept.numel() == 1959 and kept.max().item() == pytest.approx(1.958)
    few = torch.arange(1000.0)
    assert drop_outliers(few) is few
    equal = torch.ones(5000)
    assert drop_outliers(equal).numel() == 5000
    wild = torch.cat([torch.zeros(1990), torch.full((2010,), 1e9)])
    assert drop_outliers(wild).max().item() == 0


def test_multitask_weights_and_nan() -> None:
    batch = _batch()
    truth = encode_pose(batch["extrinsics"], batch["intrinsics"], (14, 14))
    predictions = {
        "pose_enc_list": [truth + 0.1],
        "depth": torch.full((1, 2, 14, 14, 1), 1.5),
        "depth_conf": torch.full((1, 2, 14, 14), 2.0),
    }
    terms = multitask_loss(predictions, batch)
    assert terms["loss"].item() == pytest.approx(5 * terms["camera"].item() + terms["depth"].item())
    predictions["depth"][0, 0, 0, 0] = float("nan")
    assert not multitask_loss(predictions, batch)["loss"].isfinite()


def _uneven_step() -> tuple[dict, dict]:
    """Predictions and truth of three scenes: all valid, half valid, and one whose cameras do not count."""
    torch.manual_seed(1)
    batch = _batch(scenes=3, frames=3, size=28)
    batch["depths"] = 0.5 + torch.rand(3, 3, 28, 28)
    batch["point_masks"][1] = torch.rand(3, 28, 28) < 0.5
    batch["point_masks"][2, 0] = False
    predictions = {
        "pose_enc_list": [torch.rand(3, 3, 9).requires_grad_() for _ in range(2)],
        "depth": (0.5 + torch.rand(3, 3, 28, 28, 1)).requires_grad_(),
        "depth_conf": (1 + torch.rand(3, 3, 28, 28)).requires_grad_(),
    }
    return predictions, batch


def _leaves(predictions: dict) -> list[torch.Tensor]:
    return [*predictions["pose_enc_list"], predictions["depth"], predictions["depth_conf"]]


def test_what_a_backbone_does_not_predict_has_no_term() -> None:
    batch = _batch()
    depth = torch.full((1, 2, 14, 14), 1.5, requires_grad=True)
    # an error of one half everywhere, no gradient of it, and no weight of it without confidence
    alone = multitask_loss(Prediction(depth), batch)
    assert alone["loss"].item() == pytest.approx(0.5) and "camera" not in alone
    assert alone["depth_confidence"].item() == 0
    # a camera moved by 0.3 along x, with half the focal length: fov 2 atan(2) in place of 2 atan(1)
    extrinsics = batch["extrinsics"].clone()
    extrinsics[..., 0, 3] = 0.3
    intrinsics = batch["intrinsics"].clone()
    intrinsics[..., 0, 0] = intrinsics[..., 1, 1] = 14 / 4
    intrinsics.requires_grad_()
    both = multitask_loss(Prediction(depth, extrinsics=extrinsics, intrinsics=intrinsics), batch, camera_weight=2.0)
    camera = 0.1 + 0.5 * 2 * (math.atan(2) - math.atan(1))
    assert both["camera"].item() == pytest.approx(camera, rel=1e-5)
    assert both["loss"].item() == pytest.approx(2 * camera + 0.5, rel=1e-5)
    both["loss"].backward()
    assert intrinsics.grad is not None and intrinsics.grad[..., 0, 0].all() and depth.grad is not None
    # of poses alone, what is not predicted has no error
    poses = multitask_loss(Prediction(extrinsics=extrinsics), batch, camera_weight=2.0)
    assert poses["loss"].item() == pytest.approx(2 * 0.1, rel=1e-5) and "depth" not in poses
    with pytest.raises(ValueError, match="predictions must have depth, extrinsics, intrinsics or camera encodings"):
        multitask_loss(Prediction(), batch)


@pytest.mark.parametrize("split", [(1, 2), (2, 1), (1, 1, 1)])
def test_losses_of_the_parts_of_a_step_add_up_to_that_of_the_step(split: tuple[int, ...]) -> None:
    predictions, batch = _uneven_step()
    whole = multitask_loss(predictions, batch)
    expected = torch.autograd.grad(whole["loss"], _leaves(predictions))
    counts = LossCounts.of(batch)
    totals = dict.fromkeys(whole, 0.0)
    start = 0
    for size in split:
        chosen = slice(start, start + size)
        part = {key: value[chosen] for key, value in predictions.items() if key != "pose_enc_list"}
        part["pose_enc_list"] = [encoding[chosen] for encoding in predictions["pose_enc_list"]]
        terms = multitask_loss(part, {key: value[chosen] for key, value in batch.items()}, counts=counts)
        terms["loss"].backward()
        totals = {name: totals[name] + float(terms[name].detach()) for name in totals}
        start += size
    # float32 sums of the same terms in another order
    for name, total in totals.items():
        assert total == pytest.approx(float(whole[name].detach()), rel=1e-5), name
    for leaf, gradient in zip(_leaves(predictions), expected):
        torch.testing.assert_close(leaf.grad, gradient, rtol=1e-5, atol=1e-8)


def test_outliers_are_dropped_scene_by_scene() -> None:
    predictions, batch = _uneven_step()
    predictions["depth"].data[0, 0, :3] += 50  # 84 of the 2352 pixels of scene 0, more than its 2 %
    losses = depth_loss(predictions["depth"], predictions["depth_conf"], batch)
    expected = 0.0
    for scene in range(3):
        valid = batch["point_masks"][scene]
        error = (predictions["depth"].detach()[scene, ..., 0] - batch["depths"][scene])[valid].abs().sort().values
        # all values below the element of nearest rank
        rank = round(0.98 * (len(error) - 1))
        expected += len(error) / int(batch["point_masks"].sum()) * float(error[:rank].mean())
    assert float(losses["depth_error"]) == pytest.approx(expected, rel=1e-5)
