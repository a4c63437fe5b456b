"""`core_grad`: the gradient of the core from the projections of both sides."""

from __future__ import annotations

import torch
from torch import Tensor

from subspace_ext import _native
from subspace_ext.ops.core_grad_ref import core_grad_ref


def core_grad(g: Tensor, p: Tensor, scale: float) -> Tensor:
    """dc = scale * g^T p, summed over tokens in a fixed order: equal inputs give equal bits.

    Args:
        g: [T, K], the projection dy u.
        p: [T, K], the projection x v, of the dtype of g.
        scale: factor s of the update.

    Returns:
        [K, K] float32 (float64 for float64 inputs).
    """
    if not _native.takes(g, p) or p.dtype != g.dtype:
        return core_grad_ref(g, p, scale)
    tokens, rank = g.shape
    g, p = (matrix if matrix.stride(1) == 1 else matrix.contiguous() for matrix in (g, p))
    dc = torch.empty(rank, rank, dtype=torch.float32, device=g.device)
    module = _native.module()
    splits = module.core_grad_splits(tokens, rank)
    partial = torch.empty(splits, rank, rank, dtype=torch.float32, device=g.device)
    with _native.guard(g.device):
        module.core_grad(
            g.data_ptr(),
            g.stride(0),
            p.data_ptr(),
            p.stride(0),
            _native.DTYPE_CODES[g.dtype],
            partial.data_ptr(),
            dc.data_ptr(),
            tokens,
            rank,
            splits,
            scale,
            _native.stream(g.device),
        )
    return dc
