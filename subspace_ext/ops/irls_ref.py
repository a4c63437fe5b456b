"""Reference of `irls`: the same loop in plain PyTorch, one full SVD of every matrix in every iteration."""

from __future__ import annotations

import torch
from torch import Tensor

from subspace_ext.ops.irls_result import APART, DONE, SPREAD, IrlsResult, Model, nonzero_median


def irls_ref(
    rb: Tensor,
    ra: Tensor,
    adapters: int,
    k: int,
    p: float,
    eps: float,
    max_iter: int,
    tol: float,
    model: Model = "mean",
) -> IrlsResult:
    """min over the fits of sum_n (e^2 + |rb_n ra_n^T - fit_n|_F^2)^(p/2) for each layer; see `irls`."""
    results = [_one_layer(b, a, adapters, k, p, eps, max_iter, tol, model) for b, a in zip(rb, ra)]
    return IrlsResult(*(torch.stack(column) for column in zip(*results)))


def _leading(matrix: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first k left singular vectors, singular values and right singular vectors, as columns.

    At rounding level there is no direction to speak of: such values and their vectors are zero.
    """
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    short = k - values.shape[0]
    if short > 0:
        left, values = (torch.nn.functional.pad(part, (0, short)) for part in (left, values))
        right = torch.nn.functional.pad(right, (0, 0, 0, short))
    kept = values > max(matrix.shape) * torch.finfo(matrix.dtype).eps * values[0]
    return left[:, :k] * kept[:k], (values * kept)[:k], (right[:k] * kept[:k, None]).t()


class _Mean:
    """fit_n = u v^T, the rank-k part of the weighted mean, from equal weights."""

    def __init__(self, scaled: Tensor, norms: Tensor, k: int) -> None:
        self.scaled, self.k = scaled, k
        self.weights = torch.ones_like(norms)
        self.u, self.v = scaled.new_zeros(scaled.shape[1], k), scaled.new_zeros(scaled.shape[2], k)

    def fit(self) -> Tensor:
        mean = torch.tensordot(self.weights / self.weights.sum(), self.scaled, 1)
        left, values, self.v = _leading(mean, self.k)
        self.u = left * values
        return (self.u @ self.v.t()).expand_as(self.scaled)


class _Shared:
    """fit_n = u (u^T delta_n v) v^T, u and v in turn the leading subspaces of the other's weighted projections.

    The updates are brought to one norm. Starts from their leading right subspace.
    """

    def __init__(self, scaled: Tensor, norms: Tensor, k: int) -> None:
        self.scaled, self.k = scaled / torch.where(norms > 0, norms, 1.0)[:, None, None], k
        self.weights = torch.ones_like(norms)
        self.u, self.started = scaled.new_zeros(scaled.shape[1], k), False
        _, _, self.v = _leading(self.scaled.flatten(0, 1), k)

    def fit(self) -> Tensor:
        roots = self.weights.sqrt()[:, None, None]
        if self.started:
            projected = roots * (self.scaled.mT @ self.u)
            self.v, _, _ = _leading(projected.permute(1, 0, 2).flatten(1), self.k)
        self.started = True
        projected = roots * (self.scaled @ self.v)
        self.u, _, _ = _leading(projected.permute(1, 0, 2).flatten(1), self.k)
        return self.u @ (self.u.t() @ self.scaled @ self.v) @ self.v.t()


def _one_layer(
    rb: Tensor, ra: Tensor, adapters: int, k: int, p: float, eps: float, max_iter: int, tol: float, model: Model
) -> IrlsResult:
    rank = rb.shape[1] // adapters
    delta = torch.stack([b @ a.t() for b, a in zip(rb.split(rank, dim=1), ra.split(rank, dim=1))])
    # squares of entries beyond 1e154 or below 1e-162 are not numbers any more, squares of shares of the largest are
    peaks = delta.abs().flatten(1).amax(dim=1)
    norms = peaks * (delta / torch.where(peaks > 0, peaks, 1.0)[:, None, None]).flatten(1).norm(dim=1)
    # In units of the median norm, so that squares neither underflow nor overflow.
    unit = nonzero_median(norms)
    apart = bool(norms.max() > SPREAD * unit)
    scaled = delta / unit if not apart else torch.zeros_like(delta)
    state: _Mean | _Shared = (_Mean if model == "mean" else _Shared)(scaled, norms / unit, k)
    objective = torch.full((max_iter + 1,), float("nan"), dtype=rb.dtype, device=rb.device)
    iterations = 0
    smoothed: Tensor | None = None
    # the weights of a mean are one for p = 2 whatever the residuals
    converged = apart or not norms.any() or (model == "mean" and p == 2)
    while True:
        residuals = (state.scaled - state.fit()).flatten(1).norm(dim=1)
        before, smoothed = smoothed, eps**2 + residuals**2
        objective[iterations] = (smoothed ** (p / 2)).sum()
        if model == "shared" and before is not None:
            converged = bool(((smoothed - before).abs() / before).max() <= tol)
        if converged or iterations == max_iter:
            break
        share = state.weights / state.weights.sum()
        state.weights = smoothed ** (-(2 - p) / 2)
        iterations += 1
        if model == "mean":
            moved = ((state.weights / state.weights.sum() - share).abs() / share).max()
            converged = bool(moved <= tol)
    if not norms.any():
        objective[0] = 0.0
    return IrlsResult(
        state.u * unit if model == "mean" else state.u,
        state.v,
        state.weights * unit ** (p - 2) if iterations else state.weights,
        residuals * (unit if model == "mean" else norms),
        norms,
        objective * unit**p,
        torch.tensor(iterations, dtype=torch.int64, device=rb.device),
        torch.tensor(converged, device=rb.device),
        torch.tensor(APART if apart else DONE, dtype=torch.int64, device=rb.device),
    )
