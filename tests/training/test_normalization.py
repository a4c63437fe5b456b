from __future__ import annotations

import numpy as np
import torch
from training.plane_scenes import plane_views

from subspace3d.geometry import unproject
from subspace3d.training.normalization import normalize_scenes


def _batch(views: int = 3) -> dict:
    images, depths, intrinsics, extrinsics = plane_views(seed=3, views=views, size=28)
    batch = {
        "images": torch.from_numpy(images).permute(0, 3, 1, 2)[None].double() / 255,
        "depths": torch.from_numpy(depths).double()[None],
        "intrinsics": torch.from_numpy(intrinsics)[None],
        "extrinsics": torch.from_numpy(extrinsics)[None],
    }
    batch["depths"][0, 1, :5] = 0
    return batch | {"point_masks": batch["depths"] > 0}


def test_first_camera_is_the_world_and_mean_distance_the_unit() -> None:
    batch = _batch()
    normalized, scale = normalize_scenes(batch)
    identity = torch.eye(4, dtype=torch.float64)[:3]
    torch.testing.assert_close(normalized["extrinsics"][0, 0], identity, atol=1e-12, rtol=0)
    valid = batch["point_masks"]
    distances = normalized["world_points"].norm(dim=-1)[valid]
    # 1e-3 in the denominator of the scale: the mean falls short of 1 by 1e-3 / count
    np.testing.assert_allclose(distances.mean().item(), 1 + 1e-3 / int(valid.sum()), rtol=1e-9)
    torch.testing.assert_close(normalized["depths"] * scale[0], batch["depths"])
    assert normalized["images"] is batch["images"]


def test_points_agree_with_the_original_world() -> None:
    batch = _batch()
    normalized, scale = normalize_scenes(batch)
    world = unproject(batch["depths"], batch["extrinsics"], batch["intrinsics"])
    first = batch["extrinsics"][0, 0]
    expected = (world @ first[:, :3].T + first[:, 3]) / scale[0]
    valid = batch["point_masks"]
    torch.testing.assert_close(normalized["world_points"][valid], expected[valid])
    again = unproject(normalized["depths"], normalized["extrinsics"], batch["intrinsics"])
    torch.testing.assert_close(again[valid], expected[valid])


def test_unit_and_world_of_the_input_do_not_matter() -> None:
    batch = _batch()
    moved = dict(batch)
    rotation, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))
    rotation *= torch.linalg.det(rotation)
    extrinsics = batch["extrinsics"].clone()
    # world' = rotation world + shift, then everything is 7 times as large
    shift = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    extrinsics[..., :3] = batch["extrinsics"][..., :3] @ rotation.T
    extrinsics[..., 3] = 7 * (batch["extrinsics"][..., 3] - extrinsics[..., :3] @ shift)
    moved |= {"extrinsics": extrinsics, "depths": 7 * batch["depths"]}
    expected, scale = normalize_scenes(batch)
    found, larger = normalize_scenes(moved)
    for key in ("extrinsics", "depths"):
        torch.testing.assert_close(found[key], expected[key], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(larger, 7 * scale)


def test_scene_without_depth_stays_finite() -> None:
    batch = _batch()
    batch["depths"].zero_()
    batch["point_masks"][:] = False
    normalized, scale = normalize_scenes(batch)
    assert scale.item() == 1e-6
    assert all(normalized[key].isfinite().all() for key in ("depths", "extrinsics", "world_points"))
