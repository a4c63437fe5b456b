"""The encoding of cameras that VGGT predicts.

Cameras are OpenCV ones (x right, y down, z forward); extrinsics [R | t] take world points to camera points. The centre
of the top-left pixel is at (0.5, 0.5). All functions are differentiable and work on any leading dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subspace3d.geometry import check_shape

MIN_FIELD_OF_VIEW = 1e-3


def encode_pose(extrinsics: Tensor, intrinsics: Tensor, image_size: tuple[int, int]) -> Tensor:
    """``[t, quaternion(R), 2 atan(H / (2 fy)), 2 atan(W / (2 fx))]``: the encoding absT_quaR_FoV.

    Args:
        extrinsics: [..., 3, 4] camera-from-world; the translation's unit is kept.
        intrinsics: [..., 3, 3] in pixels; the principal point is not encoded.
        image_size: (H, W) in pixels.

    Returns:
        [..., 9]: translation (3), quaternion x y z w with w >= 0 (4), vertical and horizontal field of view in radians.

    Raises:
        ValueError: wrong shapes.
    """
    check_shape("extrinsics", extrinsics, (3, 4))
    check_shape("intrinsics", intrinsics, (3, 3))
    height, width = image_size
    quaternion = matrix_to_quaternion(extrinsics[..., :3])
    focal = torch.stack((intrinsics[..., 1, 1], intrinsics[..., 0, 0]), dim=-1)
    half_size = focal.new_tensor((height / 2, width / 2))
    field_of_view = 2 * torch.atan2(half_size, focal)
    return torch.cat((extrinsics[..., 3], quaternion, field_of_view.to(quaternion.dtype)), dim=-1)


def decode_pose(pose_enc: Tensor, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The inverse of `encode_pose`, with the principal point at the image's centre.

    The quaternion need not have unit length. A field of view outside (0, pi), which an untrained model may give, is
    clamped to stay 1e-3 rad inside, so that the focal length is finite and positive.

    Args:
        pose_enc: [..., 9].
        image_size: (H, W) in pixels.

    Returns:
        (extrinsics [..., 3, 4] camera-from-world, intrinsics [..., 3, 3] in pixels)

    Raises:
        ValueError: wrong shape.
    """
    check_shape("pose_enc", pose_enc, (9,))
    height, width = image_size
    rotation = quaternion_to_matrix(pose_enc[..., 3:7])
    extrinsics = torch.cat((rotation, pose_enc[..., :3, None]), dim=-1)
    field_of_view = pose_enc[..., 7:].clamp(MIN_FIELD_OF_VIEW, torch.pi - MIN_FIELD_OF_VIEW)
    half_size = pose_enc.new_tensor((height / 2, width / 2))
    focal_y, focal_x = (half_size / torch.tan(field_of_view / 2)).unbind(-1)
    return extrinsics, centred_intrinsics(focal_x, focal_y, image_size)


def centred_intrinsics(focal_x: Tensor, focal_y: Tensor, image_size: tuple[int, int]) -> Tensor:
    """``[[fx, 0, W / 2], [0, fy, H / 2], [0, 0, 1]]`` ``[..., 3, 3]`` of focal lengths ``[...]`` in pixels."""
    height, width = image_size
    zero, one = torch.zeros_like(focal_x), torch.ones_like(focal_x)
    entries = (focal_x, zero, one * (width / 2), zero, focal_y, one * (height / 2), zero, zero, one)
    return torch.stack(entries, dim=-1).unflatten(-1, (3, 3))


def quaternion_to_matrix(quaternion: Tensor) -> Tensor:
    """``R = I + 2 / |q|^2 (w [v]x + [v]x^2)`` with ``q = (v, w)``: [..., 4] x y z w, any length but 0 -> [..., 3, 3].

    Raises:
        ValueError: wrong shape.
    """
    check_shape("quaternion", quaternion, (4,))
    x, y, z, w = quaternion.unbind(-1)
    tiny = torch.finfo(quaternion.dtype).tiny
    s = 2 / (quaternion * quaternion).sum(-1).clamp_min(tiny)
    entries = (
        1 - s * (y * y + z * z),
        s * (x * y - z * w),
        s * (x * z + y * w),
        s * (x * y + z * w),
        1 - s * (x * x + z * z),
        s * (y * z - x * w),
        s * (x * z - y * w),
        s * (y * z + x * w),
        1 - s * (x * x + y * y),
    )
    return torch.stack(entries, dim=-1).unflatten(-1, (3, 3))


def matrix_to_quaternion(rotation: Tensor) -> Tensor:
    """The unit quaternion x y z w with w >= 0 of a rotation matrix: [..., 3, 3] -> [..., 4].

    The entries of ``4 q q^T`` are linear in R; its row with the largest diagonal entry is a well-conditioned multiple
    of q.

    Raises:
        ValueError: wrong shape.
    """
    check_shape("rotation", rotation, (3, 3))
    (r00, r01, r02), (r10, r11, r12), (r20, r21, r22) = (row.unbind(-1) for row in rotation.unbind(-2))
    xy, xz, yz = r01 + r10, r02 + r20, r12 + r21
    wx, wy, wz = r21 - r12, r02 - r20, r10 - r01
    xx, yy, zz, ww = 1 + r00 - r11 - r22, 1 - r00 + r11 - r22, 1 - r00 - r11 + r22, 1 + r00 + r11 + r22
    rows = ((xx, xy, xz, wx), (xy, yy, yz, wy), (xz, yz, zz, wz), (wx, wy, wz, ww))
    outer = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)
    largest = outer.detach().diagonal(dim1=-2, dim2=-1).argmax(-1)
    index = largest[..., None, None].expand(*largest.shape, 1, 4)
    quaternion = torch.nn.functional.normalize(outer.gather(-2, index).squeeze(-2), dim=-1)
    return torch.where(quaternion[..., 3:] < 0, -quaternion, quaternion)
