"""Run a model on the images of one scene."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from subspace3d.evaluation.scene_metrics import Views

if TYPE_CHECKING:
    import torch


def choose_frames(available: int, wanted: int) -> list[int]:
    """``floor(i * available / wanted)`` for i < wanted: evenly spaced; all when there are no more.

    The last frame is left out, because on a closed camera path it repeats the first.

    Raises:
        ValueError: ``available`` or ``wanted`` is not positive.
    """
    if available < 1 or wanted < 1:
        raise ValueError(f"available and wanted must be at least 1, got {available} and {wanted}")
    count = min(available, wanted)
    return [index * available // count for index in range(count)]


def predict(model: torch.nn.Module, images: NDArray[np.uint8], device: torch.device) -> Views:
    """Depth maps and cameras of all views in one forward pass, in float32 and evaluation mode.

    Args:
        model (torch.nn.Module): what a backbone built, plain or adapted, or any VGGT; on ``device``.
        images (NDArray[np.uint8]): [S, H, W, 3] sRGB.
        device (torch.device): where to run.

    Returns:
        Views: float64, in the model's own world frame and unit; without the cameras that it does not predict.

    Raises:
        ValueError: the backbone predicts neither depth nor points, or a field of another size.
    """
    import torch

    from subspace3d.backbones.find import backbone_of
    from subspace3d.backbones.pose import decode_pose

    backbone = backbone_of(model)
    batch = torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2)[None].float() / 255.0
    model.eval()
    with torch.inference_mode():
        prediction = backbone.predict(model, batch)
    extrinsics, intrinsics = prediction.extrinsics, prediction.intrinsics
    if prediction.stages:
        # decoded in float64: a float32 quaternion gives rotations that are off by 1e-7
        extrinsics, intrinsics = decode_pose(prediction.stages[-1].double().cpu(), images.shape[1:3])
    depth = prediction.depth
    if depth is None:
        raise ValueError(f"backbone must predict depth or points to be measured, {backbone.name} predicts neither")

    def array(value: torch.Tensor | None) -> NDArray[np.float64] | None:
        return None if value is None else value[0].double().cpu().numpy()

    return Views(
        depth[0].double().cpu().numpy(),
        array(intrinsics),
        array(extrinsics),
        confidence=array(prediction.confidence),
        points_in_camera=None if intrinsics is not None else array(prediction.points),
        scale=backbone.scale,
    )
