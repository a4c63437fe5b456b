"""Reference of `irls`: the same loop in plain PyTorch, one full SVD of every core in every iteration."""

from __future__ import annotations

import torch
from torch import Tensor

from subspace_ext.ops.irls_result import IrlsResult, nonzero_median


def irls_ref(
    rb: Tensor, ra: Tensor, adapters: int, k: int, p: float, eps: float, max_iter: int, tol: float
) -> IrlsResult:
    """min over u, v of sum_n (eps_l^2 + |rb_n ra_n^T - u v^T|_F^2)^(p/2) for each layer l; see `irls`."""
    results = [_one_layer(b, a, adapters, k, p, eps, max_iter, tol) for b, a in zip(rb, ra)]
    return IrlsResult(*(torch.stack(column) for column in zip(*results)))


def _truncated(mean: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """u [sb, k], v [sa, k], all singular values and the rank-k approximation u v^T."""
    left, values, right = torch.linalg.svd(mean, full_matrices=False)
    # At rounding level there is no direction to speak of: such values and their columns are zero.
    negligible = max(mean.shape) * torch.finfo(mean.dtype).eps * values[0]
    values = torch.where(values > negligible, values, 0.0)
    root = values[:k].sqrt()
    u, v = left[:, :k] * root, right[:k].t() * root
    return u, v, values, u @ v.t()


def _one_layer(rb: Tensor, ra: Tensor, adapters: int, k: int, p: float, eps: float, max_iter: int, tol: float):
    rank = rb.shape[1] // adapters
    delta = torch.stack([b @ a.t() for b, a in zip(rb.split(rank, dim=1), ra.split(rank, dim=1))])
    # squares of entries beyond 1e154 or below 1e-162 are not numbers any more, squares of shares of the largest are
    peaks = delta.abs().flatten(1).amax(dim=1)
    norms = peaks * (delta / torch.where(peaks > 0, peaks, 1.0)[:, None, None]).flatten(1).norm(dim=1)
    weights = torch.ones(adapters, dtype=rb.dtype, device=rb.device)
    objective = torch.full((max_iter + 1,), float("nan"), dtype=rb.dtype, device=rb.device)
    # In units of the median norm, so that squares neither underflow nor overflow.
    unit = nonzero_median(norms)
    iterations = 0
    converged = p == 2 or not norms.any()  # the weights are one whatever the residuals
    scaled = delta / unit
    while True:
        share = weights / weights.sum()
        mean = torch.tensordot(share, scaled, 1)
        u, v, values, approximation = _truncated(mean, k)
        residuals = (scaled - approximation).flatten(1).norm(dim=1)
        smoothed = eps**2 + residuals**2
        objective[iterations] = (smoothed ** (p / 2)).sum()
        if converged or iterations == max_iter:
            break
        updated = smoothed ** (-(2 - p) / 2)
        moved = ((updated / updated.sum() - share).abs() / share).max()
        weights = updated
        iterations += 1
        converged = bool(moved <= tol)
    root = unit.sqrt()
    return (
        u * root,
        v * root,
        values * unit,
        weights * unit ** (p - 2) if iterations else weights,
        residuals * unit,
        objective * unit**p,
        torch.tensor(iterations, dtype=torch.int64),
        torch.tensor(bool(converged)),
    )
