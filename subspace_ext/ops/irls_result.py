"""What `irls` and its reference return."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Model = Literal["mean", "shared"]

# enum class IrlsStatus in csrc/irls.h
DONE, UNCERTAIN, APART = 0, 1, 2

# Squares of residuals relative to the median norm stay finite up to this many times it.
SPREAD = 1e150


class IrlsResult(NamedTuple):
    """One row per layer; float64 unless said otherwise. Where status is not DONE only status means anything."""

    u: Tensor  # [L, sb, k]; model "mean": u v^T is the rank-k part of the weighted mean
    v: Tensor  # [L, sa, k]; model "shared": u and v have orthonormal columns, zero ones where the rank ends
    weights: Tensor  # [L, N], those of the last fit
    residuals: Tensor  # [L, N]: |delta_n - u v^T|_F, or |delta_n - u c_n v^T|_F
    norms: Tensor  # [L, N]: |delta_n|_F
    objective: Tensor  # [L, max_iter + 1]: after 0, 1, ... re-weightings; NaN past n_iter
    n_iter: Tensor  # [L] int64: re-weightings done
    converged: Tensor  # [L] bool
    status: Tensor  # [L] int64


def nonzero_median(norms: Tensor) -> Tensor:
    """Median of the positive entries of [..., N] (mean of the middle two for an even count); 1 where there is none."""
    counts = (norms > 0).sum(-1, keepdim=True)
    zeros = norms.shape[-1] - counts
    middle = torch.cat([zeros + (counts - 1) // 2, zeros + counts // 2], -1).clamp(max=norms.shape[-1] - 1)
    return torch.where(counts[..., 0] > 0, norms.sort(-1).values.gather(-1, middle).mean(-1), 1.0)
