"""Losses for networks whose unit and world are their own: points up to one scale a scene, and poses relative to others.

As in `losses`, every mean is a sum divided by a count of the whole step, so that the losses of its parts add up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from subspace3d.backbones.losses import LossCounts, counted_scenes
from subspace3d.geometry import unproject

_LARGEST_ERROR = 100.0
_MOST_POINTS = 1 << 16


def camera_points(depths: Tensor, intrinsics: Tensor) -> Tensor:
    """``d K^-1 (j + 0.5, i + 0.5, 1)^T`` for the pixel in row i and column j, in its own camera.

    Args:
        depths: z-depth ``[B, S, H, W]``.
        intrinsics: ``[B, S, 3, 3]`` in pixels.

    Returns:
        ``[B, S, H, W, 3]``.
    """
    still = torch.eye(3, 4, dtype=depths.dtype, device=depths.device).expand(*depths.shape[:2], 3, 4)
    return unproject(depths, still, intrinsics)


@torch.no_grad()
def best_scale(points: Tensor, target: Tensor) -> Tensor:
    """``argmin_s sum_i |s p_i - q_i|_1 / q_iz``: the median of the ratios ``q / p`` with weights ``|p| / q_z``.

    Of more than 65,536 points evenly spaced ones are taken. 1 where there is no point, at least 1e-6.

    Args:
        points: p ``[n, 3]``.
        target: q ``[n, 3]``, ``q_z`` positive.

    Returns:
        scalar, without a graph.
    """
    step = -(-len(points) // _MOST_POINTS) or 1
    p, q = points[::step].double(), target[::step].double()
    weights, ratios = (p.abs() / q[:, 2:]).flatten(), (q / p).flatten()
    used = weights > 0
    if not used.any():
        return points.new_ones(())
    ratios, order = ratios[used].sort()
    cumulative = weights[used][order].cumsum(0)
    index = torch.searchsorted(cumulative, cumulative[-1:] / 2).clamp(max=len(ratios) - 1)
    return ratios[index[0]].clamp(min=1e-6).to(points.dtype)


def relative_poses(extrinsics: Tensor) -> tuple[Tensor, Tensor]:
    """Camera j seen from camera i, ``R_i R_j^T`` and ``t_i - R_i R_j^T t_j``: no matter what the world is.

    Args:
        extrinsics: camera-from-world ``[B, S, 3, 4]``.

    Returns:
        rotations ``[B, S, S, 3, 3]`` and translations ``[B, S, S, 3]``, i before j.
    """
    rotation, translation = extrinsics[..., :3], extrinsics[..., 3]
    turned = torch.einsum("biac,bjdc->bijad", rotation, rotation)
    return turned, translation[:, :, None] - torch.einsum("bijad,bjd->bija", turned, translation)


def angles(one: Tensor, two: Tensor) -> Tensor:
    """Angle in radians between rotations ``[..., 3, 3]``: ``atan2(|vee(E - E^T)| / 2, (tr E - 1) / 2)``, ``E = A B^T``.

    Its gradient is finite everywhere, at 0 and pi included, where that of the arc cosine is not.
    """
    e = torch.einsum("...ac,...bc->...ab", one, two)
    axis = torch.stack((e[..., 2, 1] - e[..., 1, 2], e[..., 0, 2] - e[..., 2, 0], e[..., 1, 0] - e[..., 0, 1]), -1)
    trace = e.diagonal(dim1=-2, dim2=-1).sum(-1)
    return torch.atan2(torch.linalg.vector_norm(axis, dim=-1) / 2, (trace - 1) / 2)


def scale_free_loss(
    points: Tensor, extrinsics: Tensor, batch: dict[str, Any], camera_weight: float, counts: LossCounts
) -> dict[str, Tensor]:
    """``mean |s p - q|_1 / (3 q_z) + camera_weight (mean angle(R_ij, R*_ij) + mean |s t_ij - t*_ij|_1 / 3)``.

    p are a scene's points, each in its own camera, q the true ones, both over the valid pixels; s is the scene's
    `best_scale`, taken as a constant: at the minimum the derivative by it is zero. R_ij and t_ij are the poses of
    camera j in camera i, over all pairs of different frames. Which scenes count for rotations and translations is the
    rule of `losses.camera_loss`.

    Args:
        points: ``[B, S, H, W, 3]``.
        extrinsics: camera-from-world ``[B, S, 3, 4]``, in the unit of ``points``.
        batch: normalised; ``depths``, ``point_masks [B, S, H, W]``, ``extrinsics``, ``intrinsics``.
        camera_weight: weight of the poses.
        counts: of the whole step.

    Returns:
        ``loss`` with its graph; ``points``, ``camera``, ``rotation`` (radians), ``translation`` for the log.
    """
    wide = torch.promote_types(points.dtype, torch.float32)
    points, extrinsics, mask = points.to(wide), extrinsics.to(wide), batch["point_masks"]
    target = camera_points(batch["depths"], batch["intrinsics"])
    turned, moved = relative_poses(extrinsics)
    true_turned, true_moved = relative_poses(batch["extrinsics"])
    posed, scaled = counted_scenes(batch)
    frames = mask.shape[1]
    apart = ~torch.eye(frames, dtype=torch.bool, device=mask.device)
    rotations, translations = (max(1, count * (frames - 1)) for count in (counts.cameras, counts.translations))
    # sums over nothing keep every output in the graph
    error = points[:0].sum()
    rotation = angles(turned, true_turned)[posed][:, apart].sum() / rotations
    translation = moved[:0].sum()
    for scene in range(len(mask)):
        valid = mask[scene]
        if not valid.any():
            continue
        p, q = points[scene][valid], target[scene][valid]
        scale = best_scale(p, q)
        error = error + ((scale * p - q).abs().mean(-1) / q[:, 2]).sum() / counts.pixels
        if scaled[scene]:
            difference = (scale * moved[scene] - true_moved[scene]).abs().clamp(max=_LARGEST_ERROR)
            translation = translation + difference.mean(-1)[apart].sum() / translations
    camera = rotation + translation
    terms = {"points": error, "camera": camera, "rotation": rotation, "translation": translation}
    return {"loss": error + camera_weight * camera, **{name: term.detach() for name, term in terms.items()}}
