"""The subspace that the low-rank updates of several adapters share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from subspace_ext.column_space import column_space, settle
from subspace_ext.ops.irls import irls

_LARGEST_PRODUCT = 1e300  # leaves eight digits for sums over entries


@dataclass(frozen=True)
class MinedSubspace:
    """Shared subspace of N adapters; the leading axis [L] is there when the input had it.

    u and v have the dtype of the adapters; everything else is float64, n_iter int64, converged bool.
    """

    u: Tensor  # [..., out, k] = L_k S_k^(1/2)
    v: Tensor  # [..., in, k] = R_k S_k^(1/2)
    singular_values: Tensor  # [..., s], s = min(N r, out, in): whole spectrum of the weighted mean, descending
    weights: Tensor  # [..., N], (eps^2 + res_n^2)^(-(2-p)/2), not normalised; the weighted mean was made with them
    residuals: Tensor  # [..., N]: |delta_n - u v^T|_F
    objective: Tensor  # [..., max_iter + 1]: smoothed objective after 0, 1, ... re-weightings; NaN past n_iter
    n_iter: Tensor  # [...]: re-weightings done
    converged: Tensor  # [...]: the weights moved less than tol

    def update(self) -> Tensor:
        """u v^T [..., out, in], the rank-k mean of the updates."""
        return self.u @ self.v.mT


def _check(lora_b: Tensor, lora_a: Tensor, k: int, p: float, eps: float, max_iter: int, tol: float) -> None:
    if lora_b.dim() not in (3, 4) or lora_a.dim() != lora_b.dim():
        raise ValueError(
            "lora_b and lora_a must be [N, out, r] and [N, r, in], or both with a leading layer axis,"
            f" got shapes {tuple(lora_b.shape)} and {tuple(lora_a.shape)}"
        )
    if lora_b.shape[:-2] != lora_a.shape[:-2] or lora_b.shape[-1] != lora_a.shape[-2]:
        raise ValueError(
            f"lora_a must be [..., N, r, in] with [..., N] = {list(lora_b.shape[:-2])} and r = {lora_b.shape[-1]}"
            f" as in lora_b, got shape {tuple(lora_a.shape)}"
        )
    for name, tensor in (("lora_b", lora_b), ("lora_a", lora_a)):
        if tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} must be torch.float32 or torch.float64, got {tensor.dtype}")
        if 0 in tensor.shape[-3:]:
            raise ValueError(f"{name} must have no empty axis but the layers', got shape {tuple(tensor.shape)}")
    if lora_b.dtype != lora_a.dtype or lora_b.device != lora_a.device:
        raise ValueError(
            f"lora_a must have the dtype and device of lora_b, {lora_b.dtype} on {lora_b.device},"
            f" got {lora_a.dtype} on {lora_a.device}"
        )
    adapters, out_size, rank = lora_b.shape[-3:]
    largest = min(adapters * rank, out_size, lora_a.shape[-1])
    if not 1 <= k <= largest:
        raise ValueError(
            f"k must be in 1..min(N r, out, in) = 1..{largest} (N = {adapters}, r = {rank}, out = {out_size},"
            f" in = {lora_a.shape[-1]}), got {k}"
        )
    if not 0 < p <= 2:
        raise ValueError(f"p must be in (0, 2], got {p}")
    if not eps > 0 or not torch.isfinite(torch.tensor(float(eps))):
        raise ValueError(f"eps must be positive and finite, got {eps}")
    if max_iter < 0:
        raise ValueError(f"max_iter must be 0 or more, got {max_iter}")
    if not tol >= 0:
        raise ValueError(f"tol must be 0 or more, got {tol}")


def _check_finite(name: str, stack: Tensor, first: int) -> None:
    """stack [L, N, ., .], `first` the number of its first layer. Raises ValueError naming layer and adapter."""
    finite = torch.isfinite(stack).flatten(2).all(dim=2)
    if not finite.all():
        layer, adapter = (~finite).nonzero()[0].tolist()
        raise ValueError(f"{name} must be finite, got NaN or Inf in layer {first + layer}, adapter {adapter}")


def _check_range(fits: Tensor, rule: str, first: int) -> None:
    """Raise ValueError with ``rule``, naming the layer, unless all of ``fits [L]`` are true."""
    if not fits.all():
        layer = first + int((~fits).nonzero()[0])
        raise ValueError(f"lora_b and lora_a must have {rule} (the range of float64), not so in layer {layer}")


def mine_subspace(
    lora_b: Tensor,
    lora_a: Tensor,
    k: int,
    p: float = 1.0,
    eps: float = 1e-3,
    max_iter: int = 50,
    tol: float = 1e-6,
) -> MinedSubspace:
    """min over u, v of sum_n (e^2 + |delta_n - u v^T|_F^2)^(p/2), delta_n = lora_b[n] lora_a[n].

    Here e = eps * median_n |delta_n|_F.

    Iteratively reweighted least squares from equal weights: the weighted mean M = sum_n w_n delta_n / sum_n w_n, its
    SVD M = L S R^T, u = L_k S_k^(1/2), v = R_k S_k^(1/2), then w_n = (e^2 + |delta_n - u v^T|^2)^(-(2-p)/2). Computed
    in float64 inside the column spaces of the stacked adapters, never on out x in matrices.

    p = 2 is the plain mean and one SVD. The median is taken over the updates that are not zero; a layer whose updates
    are all zero gives u = v = 0, weights one and residuals zero. Singular values at rounding level (below
    max(shape) * 2^-52 * the largest) are returned as zero and give zero columns in u and v. The sign of each column
    pair makes the entry of u of largest magnitude positive.

    Args:
        lora_b: [N, out, r] or [L, N, out, r], float32 or float64, scaling already applied.
        lora_a: [N, r, in] or [L, N, r, in], same dtype.
        k: columns of u and v, at most min(N r, out, in).
        p: exponent in (0, 2]; smaller cares less about outliers.
        eps: smoothing relative to the median update norm.
        max_iter: re-weightings at most.
        tol: stop when no normalised weight moves by more than this, relatively.

    Raises:
        ValueError: shapes, dtypes or settings outside the rules above, NaN or Inf in an adapter (with its index), or
            updates so large or small that they or their weights are no float64 numbers.
    """
    _check(lora_b, lora_a, k, p, eps, max_iter, tol)
    single = lora_b.dim() == 3
    b, a = (lora_b.detach()[None], lora_a.detach()[None]) if single else (lora_b.detach(), lora_a.detach())
    step = _chunk_size(b, a)
    starts = range(0, max(len(b), 1), step)
    layers = [_mine_chunk(i, b[i : i + step], a[i : i + step], k, p, eps, max_iter, tol) for i in starts]
    fields = [torch.cat(column) for column in zip(*layers)]
    return MinedSubspace(*(field[0] for field in fields) if single else fields)


def _chunk_size(b: Tensor, a: Tensor) -> int:
    """Number of layers whose float64 stacks stay below about 256 MB; on a GPU, which wants hundreds at once, 4 GB."""
    per_layer = 8 * (b[0].numel() + a[0].numel()) if len(b) else 1
    return max(1, 2 ** (32 if b.is_cuda else 28) // per_layer)


def _mine_chunk(
    first: int, b: Tensor, a: Tensor, k: int, p: float, eps: float, max_iter: int, tol: float
) -> tuple[Tensor, ...]:
    """The fields of MinedSubspace for layers `first`, `first` + 1, ..."""
    layers, adapters, out_size, rank = b.shape
    columns = adapters * rank
    # One copy that widens and reorders at once.
    wide_b = b.transpose(1, 2).to(torch.float64, memory_format=torch.contiguous_format)
    stacked_b = wide_b.reshape(layers, out_size, columns)
    stacked_a = a.double().reshape(layers, columns, a.shape[-1]).mT
    (space_b, growth_b), (space_a, growth_a) = column_space(stacked_b), column_space(stacked_a)
    growth = torch.stack([growth_b, growth_a]).cpu()
    if not torch.isfinite(growth).all():
        _check_finite("lora_b", b, first)
        _check_finite("lora_a", a, first)
    space_b, space_a = settle(space_b, growth[0]), settle(space_a, growth[1])
    largest = space_b.triangle.abs().amax(dim=(1, 2)) * space_a.triangle.abs().amax(dim=(1, 2))
    _check_range(largest < _LARGEST_PRODUCT, f"largest entries with a product below about {_LARGEST_PRODUCT}", first)
    core = irls(space_b.triangle, space_a.triangle, adapters, k, p, eps, max_iter, tol)
    # a weight is about the norm to the power p - 2
    fits = torch.isfinite(core.weights).all(dim=1)
    _check_range(fits, "products that are zero or not below about 1e-307", first)
    u, v = space_b.embed(core.u), space_a.embed(core.v)
    pivots = u.gather(1, u.abs().argmax(dim=1, keepdim=True))
    signs = torch.where(pivots < 0, -1.0, 1.0).to(u.dtype)
    return ((u * signs).to(b.dtype), (v * signs).to(b.dtype), *core[2:])
