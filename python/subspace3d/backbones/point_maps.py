"""What backbones share that predict points in each camera, camera-to-world poses and no intrinsics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from subspace3d.backbones.losses import LossCounts
from subspace3d.backbones.pose import centred_intrinsics
from subspace3d.backbones.prediction import Kind, Prediction
from subspace3d.backbones.protocol import Backbone
from subspace3d.backbones.scale_free_losses import scale_free_loss

_LEAST_DEPTH = 1e-3  # of a ray of length one or a point; behind it there is no pixel


def world_to_camera(poses: Tensor) -> Tensor:
    """Camera-from-world ``[R^T | -R^T t]`` ``[..., 3, 4]`` of camera-to-world ``[R | t]``, ``[..., 3 or 4, 4]``.

    Without matrix products, so that autocast does not round.
    """
    rotation = poses[..., :3, :3].transpose(-1, -2)
    centre = (rotation * poses[..., None, :3, 3]).sum(-1, keepdim=True)
    return torch.cat([rotation, -centre], dim=-1)


def intrinsics_from_points(points: Tensor, weights: Tensor | None = None) -> Tensor:
    """Least squares over the pixels of each image: ``f_x = sum w u x/z / sum w (x/z)^2``, u from the image's centre.

    Args:
        points: in the camera, ``[..., H, W, 3]``, of any scale; those with z below 1e-3 do not count.
        weights: w ``[..., H, W]``, at least 0; none: all alike.

    Returns:
        ``[..., 3, 3]`` in pixels, the principal point in the middle, focal lengths at least 1.
    """
    height, width = points.shape[-3:-1]
    counts = points[..., 2] > _LEAST_DEPTH
    w = (counts if weights is None else weights * counts).to(points.dtype)
    z = points[..., 2].clamp(min=_LEAST_DEPTH)
    rows = torch.arange(height, dtype=points.dtype, device=points.device) + 0.5 - height / 2
    columns = torch.arange(width, dtype=points.dtype, device=points.device) + 0.5 - width / 2
    focal = []
    for slope, offset in ((points[..., 0] / z, columns), (points[..., 1] / z, rows[:, None])):
        squares = (w * slope.square()).sum((-2, -1)).clamp(min=torch.finfo(points.dtype).tiny)
        focal.append(((w * slope * offset).sum((-2, -1)) / squares).clamp(min=1.0))
    return centred_intrinsics(focal[0], focal[1], (height, width))


class PointMapBackbone(Backbone):
    """A network whose ``local_points`` and cameras are trained up to one scale a scene and in whatever world."""

    lacks: Mapping[Kind, str] = {"intrinsics": "from the points in each camera"}

    def local_points(self, outputs: Any) -> Tensor:
        """``[B, S, H, W, 3]`` in each camera, of what the network returned."""
        raise NotImplementedError(f"{type(self).__name__} must have a method local_points")

    def loss(
        self, prediction: Prediction, batch: dict[str, Any], camera_weight: float, counts: LossCounts
    ) -> dict[str, Tensor]:
        """`scale_free_losses.scale_free_loss` of the points and poses."""
        assert prediction.extrinsics is not None
        return scale_free_loss(
            self.local_points(prediction.outputs), prediction.extrinsics, batch, camera_weight, counts
        )
