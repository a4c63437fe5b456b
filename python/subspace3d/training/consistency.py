"""Losses of images without depth: what the views of a scene say of each other through predicted depth and cameras."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from subspace3d.geometry import pixel_centres

PARALLAX_DEG = 0.5
REACH = 0.05
STRUCTURE = 0.85  # weight of the structural term beside absolute differences
GEOMETRIC_WEIGHT = 0.5
_EDGE = 0.01  # pixels; a shift along the rows must not lose the outermost of them to round-off
_SSIM_OF_MEANS, _SSIM_OF_SPREADS = 0.01**2, 0.03**2


def reproject(
    depth: torch.Tensor,
    extrinsic: torch.Tensor,
    intrinsic: torch.Tensor,
    other_extrinsic: torch.Tensor,
    other_intrinsic: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the pixels of one view are in another: ``z' (x', y', 1)^T = K' (R' R^T (d K^-1 (x, y, 1)^T - t) + t')``.

    Args:
        depth (Tensor): z-depth of the view, ``[H, W]``.
        extrinsic (Tensor): of the view, camera-from-world ``[3, 4]``.
        intrinsic (Tensor): of the view, pixels ``[3, 3]``.
        other_extrinsic (Tensor): of the other view, ``[3, 4]``.
        other_intrinsic (Tensor): of the other view, ``[3, 3]``.

    Returns:
        tuple[Tensor, Tensor]: pixels (x', y') ``[H, W, 2]``, not finite in the plane of the other camera, and depths
        z' ``[H, W]`` in the other camera, not positive behind it.
    """
    centres = torch.from_numpy(pixel_centres(*depth.shape)).to(depth)
    rays = functional.pad(centres, (0, 1), value=1.0) @ torch.linalg.inv(intrinsic).T
    world = (depth[..., None] * rays - extrinsic[:, 3]) @ extrinsic[:, :3]
    camera = world @ other_extrinsic[:, :3].T + other_extrinsic[:, 3]
    image = camera @ other_intrinsic.T
    return image[..., :2] / image[..., 2:], camera[..., 2]


def sample(maps: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Bilinear values ``[C, H, W]`` of ``maps [C, H', W']`` at pixels (x, y) ``[H, W, 2]``, constant past the edge."""
    size = pixels.new_tensor([maps.shape[-1], maps.shape[-2]])
    grid = (2.0 * pixels / size - 1.0)[None]
    return functional.grid_sample(maps[None], grid, mode="bilinear", padding_mode="border", align_corners=False)[0]


def dissimilarity(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """``0.85 (1 - SSIM) / 2 + 0.15 |a - b|``, the mean over colours, of images ``[C, H, W]`` in 0..1: ``[H, W]``.

    SSIM of the 3 x 3 pixels around each, which are mirrored at the edge, with means m, variances v, covariance u:
    ``(2 m_a m_b + c) (2 u + e) / ((m_a^2 + m_b^2 + c) (v_a + v_b + e))``, c = 1e-4, e = 9e-4, cut to 0..1 as (1 - SSIM)
    / 2.
    """

    def mean(values: torch.Tensor) -> torch.Tensor:
        return functional.avg_pool2d(functional.pad(values[None], (1, 1, 1, 1), mode="reflect"), 3, stride=1)[0]

    a, b = mean(first), mean(second)
    spread = mean(first**2) - a**2 + mean(second**2) - b**2
    shared = mean(first * second) - a * b
    similar = (2 * a * b + _SSIM_OF_MEANS) * (2 * shared + _SSIM_OF_SPREADS)
    similar = similar / ((a**2 + b**2 + _SSIM_OF_MEANS) * (spread + _SSIM_OF_SPREADS))
    structure = ((1 - similar) / 2).clamp(0, 1)
    return (STRUCTURE * structure + (1 - STRUCTURE) * (first - second).abs()).mean(dim=0)


def consistency_loss(
    images: torch.Tensor,
    depth: torch.Tensor,
    extrinsics: torch.Tensor,
    intrinsics: torch.Tensor,
    pairs: Sequence[tuple[int, int]],
    parallax_deg: float = PARALLAX_DEG,
    reach: float = REACH,
) -> dict[str, torch.Tensor]:
    """``mean dissimilarity(I_i, I_j at x') + 0.5 mean |z' - D_j(x')| / (z' + D_j(x'))`` over the pixels that count.

    For every pair (i, j) the pixels of view i are seen in view j, see `reproject`. A pixel counts where x' lies between
    the centres of the outermost pixels of j and z' is positive, where it is not hidden, ``z' <= (1 + reach) D_j(x')``,
    and where the rays from both centres to its point meet at ``parallax_deg`` or more: with less, another depth would
    look the same. What counts is decided without a gradient; windows of the SSIM see view i itself where nothing
    counts. Both terms are the same for predictions of any scale.

    Args:
        images (Tensor): ``[S, 3, H, W]`` in 0..1.
        depth (Tensor): predicted z-depth, positive, ``[S, H, W]``.
        extrinsics (Tensor): predicted camera-from-world, ``[S, 3, 4]``.
        intrinsics (Tensor): predicted, pixels, ``[S, 3, 3]``.
        pairs (Sequence): of different views (i, j).
        parallax_deg (float): least angle, degrees.
        reach (float): how much deeper than the surface of j a point may lie and count as seen.

    Returns:
        dict: scalars ``loss`` (0 with a graph where nothing counts) and, detached, ``photometric``, ``geometric`` and
        ``counted``, the share of the pixels of all pairs that count.

    Raises:
        ValueError: ``pairs`` is empty or names one view twice.
    """
    if not pairs or any(i == j for i, j in pairs):
        raise ValueError(f"pairs must be at least one pair of different views, got {list(pairs)}")
    photometric = geometric = depth.sum() * 0.0
    counted = 0
    for i, j in pairs:
        pixels, seen_depth = reproject(depth[i], extrinsics[i], intrinsics[i], extrinsics[j], intrinsics[j])
        with torch.no_grad():
            inside = _inside(pixels, depth.shape[-2:]) & (seen_depth > 0)
        # a value that is not finite would keep its gradient through the mask
        pixels = torch.where(inside[..., None], pixels, torch.full_like(pixels, 0.5))
        there = sample(torch.cat((images[j], depth[j][None])), pixels)
        colours, surface = there[:-1], there[-1]
        with torch.no_grad():
            counts = inside & (seen_depth <= (1 + reach) * surface)
            counts &= _parallax(depth[i], extrinsics[i], intrinsics[i], extrinsics[j]) >= parallax_deg
        if not counts.any():
            continue
        counted += int(counts.sum())
        # its own colours where nothing counts, so that no window around a pixel that counts sees what is hidden
        colours = torch.where(counts, colours, images[i])
        photometric = photometric + dissimilarity(images[i], colours)[counts].sum()
        apart = (seen_depth[counts] - surface[counts]).abs()
        geometric = geometric + (apart / (seen_depth[counts] + surface[counts])).sum()
    photometric, geometric = photometric / max(1, counted), geometric / max(1, counted)
    return {
        "loss": photometric + GEOMETRIC_WEIGHT * geometric,
        "photometric": photometric.detach(),
        "geometric": geometric.detach(),
        "counted": depth.new_tensor(counted / (len(pairs) * depth[0].numel())),
    }


def _inside(pixels: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """Whether four pixels lie around (x, y), up to a hundredth of a pixel; false where it is not finite."""
    x, y = pixels.unbind(-1)
    least, right, below = 0.5 - _EDGE, size[1] - 0.5 + _EDGE, size[0] - 0.5 + _EDGE
    return (x >= least) & (x <= right) & (y >= least) & (y <= below)


def _parallax(
    depth: torch.Tensor, extrinsic: torch.Tensor, intrinsic: torch.Tensor, other_extrinsic: torch.Tensor
) -> torch.Tensor:
    """Angle in degrees between the rays from both camera centres to the point of every pixel, ``[H, W]``."""
    centres = torch.from_numpy(pixel_centres(*depth.shape)).to(depth)
    rays = functional.pad(centres, (0, 1), value=1.0) @ torch.linalg.inv(intrinsic).T
    to_point = depth[..., None] * (rays @ extrinsic[:, :3])
    first, second = (-e[:, :3].T @ e[:, 3] for e in (extrinsic, other_extrinsic))
    from_other = to_point + first - second
    cross = torch.linalg.cross(to_point, from_other, dim=-1).norm(dim=-1)
    return torch.rad2deg(torch.atan2(cross, (to_point * from_other).sum(dim=-1)))
