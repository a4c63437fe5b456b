"""What `irls` and its reference return."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class IrlsResult(NamedTuple):
    """One row per layer; float64 unless said otherwise."""

    u: Tensor  # [L, sb, k]
    v: Tensor  # [L, sa, k]
    singular_values: Tensor  # [L, min(sb, sa)], descending: the spectrum of the weighted mean
    weights: Tensor  # [L, N], those the weighted mean was made with
    residuals: Tensor  # [L, N]: |delta_n - u v^T|_F
    objective: Tensor  # [L, max_iter + 1]: after 0, 1, ... re-weightings; NaN past n_iter
    n_iter: Tensor  # [L] int64: re-weightings done
    converged: Tensor  # [L] bool


def nonzero_median(norms: Tensor) -> Tensor:
    """Median of the positive entries (mean of the middle two for an even count); 1 when there is none."""
    positive = norms[norms > 0].sort().values
    if positive.numel() == 0:
        return norms.new_ones(())
    return (positive[(positive.numel() - 1) // 2] + positive[positive.numel() // 2]) / 2
