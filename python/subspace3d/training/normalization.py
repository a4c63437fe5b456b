"""Scene normalisation: first camera as the world, mean point distance as the unit."""

from __future__ import annotations

import torch

from subspace3d.geometry import unproject


def normalize_scenes(batch: dict) -> tuple[dict, torch.Tensor]:
    """X' = (R_1 X + t_1) / s,  s = sum over valid ||R_1 X + t_1|| / (count + 1e-3), clamped to [1e-6, 1e6].

    The world becomes the first camera, so the first extrinsics become ``[I | 0]``; depths, translations and points
    are divided by the mean distance ``s`` of the scene's valid points from the first camera.

    Args:
        batch (dict): ``depths [B, S, H, W]``, ``point_masks [B, S, H, W]`` bool, ``extrinsics [B, S, 3, 4]``,
            ``intrinsics [B, S, 3, 3]``; other keys pass through.

    Returns:
        dict: the batch with ``depths`` and ``extrinsics`` replaced and ``world_points [B, S, H, W, 3]`` added.
        Tensor: ``s``, ``[B]``, in the unit of the depths.
    """
    extrinsics, depths, masks = batch["extrinsics"], batch["depths"], batch["point_masks"]
    first_rotation, first_translation = extrinsics[:, :1, :, :3], extrinsics[:, :1, :, 3:]
    # [R | t] [R_1 | t_1]^-1 = [R R_1^T | t - R R_1^T t_1]
    rotation = extrinsics[..., :3] @ first_rotation.transpose(-1, -2)
    translation = extrinsics[..., 3:] - rotation @ first_translation
    points = unproject(depths, torch.cat([rotation, translation], dim=-1), batch["intrinsics"])

    distance = torch.where(masks, points.norm(dim=-1), 0.0)
    count = masks.sum(dim=(1, 2, 3), dtype=depths.dtype)
    scale = (distance.sum(dim=(1, 2, 3)) / (count + 1e-3)).clamp(1e-6, 1e6)
    per_map = scale[:, None, None, None]
    normalized = dict(batch)
    normalized["extrinsics"] = torch.cat([rotation, translation / per_map], dim=-1)
    normalized["depths"] = depths / per_map
    normalized["world_points"] = points / per_map[..., None]
    return normalized, scale
