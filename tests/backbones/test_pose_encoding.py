"""Camera encodings against scipy and against numbers worked by hand."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from subspace3d.backbones.pose import (
    decode_pose,
    encode_pose,
    matrix_to_quaternion,
    quaternion_to_matrix,
)


def rotations(rng: np.random.Generator) -> Rotation:
    """Random rotations, the identity, and turns by nearly and exactly 180 degrees about many axes."""
    axes = np.concatenate((np.eye(3), rng.normal(size=(20, 3))))
    axes /= np.linalg.norm(axes, axis=1, keepdims=True)
    turns = [Rotation.from_rotvec(axes * angle) for angle in (0.0, 1e-9, np.pi - 1e-7, np.pi)]
    return Rotation.concatenate([Rotation.random(200, rng), *turns])


def cameras(rng: np.random.Generator, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    rotation = torch.from_numpy(Rotation.random(count, rng).as_matrix())
    extrinsics = torch.cat((rotation, torch.from_numpy(rng.normal(size=(count, 3, 1)))), dim=-1)
    intrinsics = torch.zeros(count, 3, 3, dtype=torch.float64)
    intrinsics[:, 0, 0] = torch.from_numpy(rng.uniform(50, 200, count))
    intrinsics[:, 1, 1] = torch.from_numpy(rng.uniform(50, 200, count))
    intrinsics[:, 0, 2], intrinsics[:, 1, 2], intrinsics[:, 2, 2] = 56, 42, 1
    return extrinsics, intrinsics


def test_quaternions_agree_with_scipy(rng: np.random.Generator) -> None:
    turned = rotations(rng)
    matrices = torch.from_numpy(turned.as_matrix())
    quaternions = matrix_to_quaternion(matrices)
    assert (quaternions[:, 3] >= 0).all()
    expected = torch.from_numpy(turned.as_quat(canonical=False))
    # q and -q are the same rotation; which of them has w >= 0 is open when w is 0
    alignment = (quaternions * expected).sum(-1, keepdim=True).sign()
    torch.testing.assert_close(quaternions * alignment, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(quaternion_to_matrix(quaternions), matrices, rtol=0, atol=1e-12)
    torch.testing.assert_close(quaternion_to_matrix(-3 * quaternions), matrices, rtol=0, atol=1e-12)


def test_encoding_by_hand() -> None:
    # a quarter turn about z; 90 degrees of view across the width, 2 atan(1/2) down the height
    extrinsics = torch.tensor([[0.0, -1, 0, 4], [1, 0, 0, 5], [0, 0, 1, 6]], dtype=torch.float64)
    intrinsics = torch.tensor([[50.0, 0, 50], [0, 80, 40], [0, 0, 1]], dtype=torch.float64)
    half = math.sqrt(0.5)
    expected = [4, 5, 6, 0, 0, half, half, 2 * math.atan(0.5), math.pi / 2]
    encoded = encode_pose(extrinsics, intrinsics, (80, 100))
    torch.testing.assert_close(encoded, torch.tensor(expected, dtype=torch.float64))


def test_decode_is_the_inverse_of_encode(rng: np.random.Generator) -> None:
    extrinsics, intrinsics = cameras(rng, 12)
    extrinsics, intrinsics = extrinsics.view(3, 4, 3, 4), intrinsics.view(3, 4, 3, 3)
    encoded = encode_pose(extrinsics, intrinsics, (84, 112))
    assert encoded.shape == (3, 4, 9)
    decoded_extrinsics, decoded_intrinsics = decode_pose(encoded, (84, 112))
    torch.testing.assert_close(decoded_extrinsics, extrinsics)
    torch.testing.assert_close(decoded_intrinsics, intrinsics)


def test_decoding_stays_finite_without_a_field_of_view() -> None:
    encoded = torch.zeros(2, 9)
    encoded[:, 6], encoded[1, 7:] = 1, 7.0
    extrinsics, intrinsics = decode_pose(encoded, (10, 20))
    assert torch.isfinite(intrinsics).all()
    assert (intrinsics[:, [0, 1], [0, 1]] > 0).all()
    assert torch.equal(extrinsics[0], torch.eye(3, 4))


def test_gradients(rng: np.random.Generator) -> None:
    extrinsics, intrinsics = cameras(rng, 3)
    encoded = encode_pose(extrinsics, intrinsics, (84, 112)).requires_grad_()
    assert torch.autograd.gradcheck(lambda pose: decode_pose(pose, (84, 112)), encoded)
    matrices = extrinsics[:, :, :3].clone().requires_grad_()
    assert torch.autograd.gradcheck(matrix_to_quaternion, matrices)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: encode_pose(torch.eye(4), torch.eye(3), (4, 4)), "extrinsics"),
        (lambda: encode_pose(torch.eye(3, 4), torch.eye(4), (4, 4)), "intrinsics"),
        (lambda: decode_pose(torch.zeros(8), (4, 4)), "pose_enc"),
        (lambda: quaternion_to_matrix(torch.zeros(3)), "quaternion"),
        (lambda: matrix_to_quaternion(torch.zeros(3, 4)), "rotation"),
    ],
)
def test_wrong_shapes_are_refused(call, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be"):
        call()
