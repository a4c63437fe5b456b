"""Reference of `fold_weight`."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; everything else is accumulated in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def fold_weight_ref(w: Tensor, u: Tensor, c: Tensor, v: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """w_eff = cast(w + scale * u c v^T), accumulated in float32 (float64 for a float64 weight), rounded once.

    Args:
        w: [out, in].
        u: [out, K].
        c: [K, K].
        v: [in, K].
        scale: factor s of the update.
        dtype: dtype of the result.

    Returns:
        [out, in], contiguous, of dtype `dtype`.
    """
    wide = accumulation_dtype(w.dtype)
    left = u.to(wide) @ c.to(wide)
    return torch.addmm(w.to(wide), left, v.to(wide).t(), alpha=scale).to(dtype)
