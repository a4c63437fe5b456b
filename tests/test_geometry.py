"""Pinhole geometry against numbers worked by hand, its own inverse, and NumPy against torch."""

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from subspace3d.geometry import (
    camera_rays,
    intrinsic_matrix,
    invert_pose,
    look_at,
    pixel_centres,
    project,
    unproject,
)


def cameras(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    rotation = Rotation.random(count, rng).as_matrix()
    extrinsics = np.concatenate([rotation, rng.normal(size=(count, 3, 1))], axis=-1)
    intrinsics = np.zeros((count, 3, 3))
    intrinsics[:, 0, 0], intrinsics[:, 1, 1] = rng.uniform(50, 200, (2, count))
    intrinsics[:, 0, 2], intrinsics[:, 1, 2], intrinsics[:, 2, 2] = 56, 42, 1
    return extrinsics, intrinsics


def test_look_at_uses_opencv_axes():
    extrinsic = look_at(np.array([0.0, -3.0, 0.0]), np.zeros(3))
    in_camera = extrinsic @ np.array([[0, 0, 0, 1], [1, 0, 0, 1], [0, 0, 1, 1]]).T
    # the origin lies 3 ahead; world x is to the right; world z is up, which is -y in the image
    assert np.allclose(in_camera.T, [[0, 0, 3], [1, 0, 3], [0, -1, 3]])
    for position in ([0, 0, 2.0], [1.0, 2, -3]):
        rotation = look_at(np.array(position), np.zeros(3), roll=30)[:, :3]
        assert np.allclose(rotation @ rotation.T, np.eye(3)) and np.linalg.det(rotation) == pytest.approx(1)


def test_intrinsics_follow_the_field_of_view():
    matrix = intrinsic_matrix(90, 100)
    assert np.allclose(matrix, [[50, 0, 50], [0, 50, 50], [0, 0, 1]])


def test_points_project_back_to_pixel_centres(rng: np.random.Generator) -> None:
    extrinsics, intrinsics = cameras(rng, 6)
    depth = rng.uniform(1, 3, (6, 5, 7))
    points = unproject(depth, extrinsics, intrinsics)
    assert points.shape == (6, 5, 7, 3)
    for view in range(6):
        pixels, z = project(points[view], extrinsics[view], intrinsics[view])
        np.testing.assert_allclose(z, depth[view], rtol=1e-12)
        np.testing.assert_allclose(pixels, pixel_centres(5, 7), rtol=1e-10)


def test_top_left_pixel_by_hand() -> None:
    intrinsics = np.array([[2.0, 0, 2], [0, 2, 1], [0, 0, 1]])
    extrinsics = np.concatenate([np.eye(3), [[0.0], [0], [1]]], axis=1)
    points = unproject(np.full((2, 4), 4.0), extrinsics, intrinsics)
    np.testing.assert_allclose(points[0, 0], [-3.0, -1.0, 3.0])


def test_tensors_give_the_same_points_and_gradients(rng: np.random.Generator) -> None:
    extrinsics, intrinsics = cameras(rng, 3)
    depth = rng.uniform(1, 3, (3, 2, 4))
    leaves = [torch.from_numpy(array).requires_grad_() for array in (depth, extrinsics, intrinsics)]
    np.testing.assert_allclose(
        unproject(*leaves).detach().numpy(), unproject(depth, extrinsics, intrinsics), rtol=1e-12, atol=1e-12
    )
    assert torch.autograd.gradcheck(unproject, leaves)
    assert unproject(*(leaf.float() for leaf in leaves)).dtype == torch.float32


def test_rays_are_what_unproject_scales(rng: np.random.Generator) -> None:
    _, intrinsics = cameras(rng, 1)
    rays = camera_rays(intrinsics[0], pixel_centres(3, 5))
    np.testing.assert_allclose(unproject(np.full((3, 5), 2.0), np.eye(3, 4), intrinsics[0]), 2 * rays)


def test_a_pose_is_the_inverse_of_its_inverse(rng: np.random.Generator) -> None:
    extrinsics, _ = cameras(rng, 4)
    np.testing.assert_allclose(invert_pose(invert_pose(extrinsics)), extrinsics, atol=1e-14)
    point = rng.normal(size=3)
    seen = extrinsics[0, :, :3] @ point + extrinsics[0, :, 3]
    back = invert_pose(extrinsics[0])
    np.testing.assert_allclose(back[:, :3] @ seen + back[:, 3], point, atol=1e-14)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: unproject(np.zeros(4), np.eye(3, 4), np.eye(3)), "depth"),
        (lambda: unproject(np.zeros((4, 4)), np.eye(4), np.eye(3)), "extrinsics"),
        (lambda: unproject(torch.zeros(4, 4), torch.eye(3, 4), torch.eye(4)), "intrinsics"),
    ],
)
def test_wrong_shapes_are_refused(call, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be"):
        call()
