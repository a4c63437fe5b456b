"""Reference of `core_grad`."""

from __future__ import annotations

from torch import Tensor

from subspace_ext.ops.rank_update_ref import accumulation_dtype


def core_grad_ref(g: Tensor, p: Tensor, scale: float) -> Tensor:
    """dc = scale * g^T p [K, K] from g, p [T, K]; summed and returned in float32 (float64 for float64)."""
    wide = accumulation_dtype(g.dtype)
    return (g.to(wide).t() @ p.to(wide)) * scale
