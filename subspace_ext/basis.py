"""Bases made of several mined subspaces, and the angles between two of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _check_factor(name: str, factor: Tensor) -> None:
    if factor.dim() != 2 or not factor.is_floating_point():
        raise ValueError(f"{name} must be a floating [size, k] matrix, got {factor.dtype} {tuple(factor.shape)}")
    if not torch.isfinite(factor).all():
        raise ValueError(f"{name} must be finite, got NaN or Inf")


def _principal_directions(factors: list[Tensor]) -> tuple[Tensor, int]:
    """Left singular vectors of the concatenation in decreasing order, and its numerical rank."""
    stacked = torch.cat([factor.double() for factor in factors], dim=1)
    left, values, _ = torch.linalg.svd(stacked, full_matrices=False)
    # Inputs that carry float32 rounding are dependent only up to that rounding.
    precision = max(torch.finfo(factor.dtype).eps for factor in factors)
    largest = values[0].item() if values.numel() else 0.0
    return left, int((values > max(stacked.shape) * precision * largest).sum())


def _fix_signs(matrix: Tensor) -> Tensor:
    """Each column's entry of largest magnitude made positive."""
    if matrix.numel() == 0:
        return matrix
    pivots = matrix.gather(0, matrix.abs().argmax(dim=0, keepdim=True))
    return matrix * torch.where(pivots < 0, -1.0, 1.0).to(matrix.dtype)


def combine_subspaces(subspaces: Sequence[tuple[Tensor, Tensor]], rank: int | None = None) -> tuple[Tensor, Tensor]:
    """U = orth([u_1 | u_2 | ...]), V = orth([v_1 | v_2 | ...]), both with the same number K of columns.

    The columns are the left singular vectors of the concatenation, leading direction first. Directions with singular
    values below max(shape) * machine epsilon (of the input dtype) * the largest are dropped as dependent; where the
    two sides then differ, both keep the smaller number, so K = min(rank of the u side, rank of the v side, `rank`).

    Args:
        subspaces: pairs (u [out, k], v [in, k]) of one layer; k may differ between pairs.
        rank: keep at most this many leading directions; None keeps all.

    Returns:
        (U [out, K], V [in, K]) in the dtype of the first u, orthonormal columns; computed in float64. The sign of a
        column makes its entry of largest magnitude positive.

    Raises:
        ValueError: no pair given, sizes that differ between pairs, non-finite entries, rank not positive, or nothing
            left because a side is zero.
    """
    pairs = list(subspaces)
    if not pairs:
        raise ValueError("subspaces must hold at least one pair (u, v), got none")
    if rank is not None and (not hasattr(rank, "__index__") or rank < 1):
        raise ValueError(f"rank must be a positive integer or None, got {rank}")
    for index, (u, v) in enumerate(pairs):
        _check_factor(f"subspaces[{index}] u", u)
        _check_factor(f"subspaces[{index}] v", v)
        if u.shape[1] != v.shape[1]:
            raise ValueError(f"subspaces[{index}]: u and v must have equally many columns, got {u.shape} and {v.shape}")
        sizes, first = (u.shape[0], v.shape[0]), (pairs[0][0].shape[0], pairs[0][1].shape[0])
        if sizes != first:
            raise ValueError(f"subspaces[{index}] must have (out, in) = {first} as the first pair, got {sizes}")
    left_u, rank_u = _principal_directions([u for u, _ in pairs])
    left_v, rank_v = _principal_directions([v for _, v in pairs])
    kept = min(rank_u, rank_v) if rank is None else min(rank_u, rank_v, rank)
    if kept == 0:
        raise ValueError(f"subspaces must span at least one direction on both sides, got ranks {rank_u} and {rank_v}")
    dtype = pairs[0][0].dtype
    return (
        _fix_signs(left_u[:, :kept]).to(dtype).contiguous(),
        _fix_signs(left_v[:, :kept]).to(dtype).contiguous(),
    )


def disentanglement(u1: Tensor, u2: Tensor) -> Tensor:
    """lambda_j = 1 - cos(theta_j), ascending, theta_j the principal angles between the column spaces of u1 and u2.

    Computed as 1 - svdvals(Q1^T Q2), Q = orth(u); unchanged when columns are scaled or mixed. 0 means a shared
    direction, 1 an orthogonal one.

    Args:
        u1: [size, k1].
        u2: [size, k2].

    Returns:
        [min(rank u1, rank u2)], float64, in 0..1.

    Raises:
        ValueError: sizes that differ, non-finite entries, or a matrix of zeros.
    """
    _check_factor("u1", u1)
    _check_factor("u2", u2)
    if u1.shape[0] != u2.shape[0]:
        raise ValueError(f"u1 and u2 must have equally many rows, got {u1.shape[0]} and {u2.shape[0]}")
    bases = []
    for name, factor in (("u1", u1), ("u2", u2)):
        left, kept = _principal_directions([factor])
        if kept == 0:
            raise ValueError(f"{name} must span at least one direction, got a matrix of zeros")
        bases.append(left[:, :kept])
    cosines = torch.linalg.svdvals(bases[0].t() @ bases[1])
    return (1.0 - cosines).clamp(0.0, 1.0)
