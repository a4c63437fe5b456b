"""`fold_weight`: the weight a layer multiplies with once its low-rank update has been added."""

from __future__ import annotations

import torch
from torch import Tensor

from subspace_ext import _native
from subspace_ext.ops.fold_weight_ref import accumulation_dtype, fold_weight_ref

torch.library.define(
    "subspace_ext::fold_weight",
    "(Tensor w, Tensor u, Tensor c, Tensor v, float scale, ScalarType dtype) -> Tensor",
)


def fold_weight(w: Tensor, u: Tensor, c: Tensor, v: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """w_eff = cast(w + scale * u c v^T), accumulated in float32 (float64 for a float64 weight), rounded once.

    Differentiable in `c` only. On CUDA the native kernel adds and rounds in one pass over the weight; elsewhere, and
    without the native kernel, the reference runs.

    Args:
        w: [out, in], frozen.
        u: [out, K], frozen.
        c: [K, K].
        v: [in, K], frozen.
        scale: factor s of the update.
        dtype: dtype of the result.

    Returns:
        [out, in], contiguous, of dtype `dtype`.
    """
    return torch.ops.subspace_ext.fold_weight(w, u, c, v, scale, dtype)


torch.library.register_kernel("subspace_ext::fold_weight", "default", fold_weight_ref)


@torch.library.register_kernel("subspace_ext::fold_weight", "cuda")
def _fold_weight_cuda(w: Tensor, u: Tensor, c: Tensor, v: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    codes = _native.DTYPE_CODES
    if not _native.cuda_built() or w.dtype not in codes or dtype not in codes:
        return fold_weight_ref(w, u, c, v, scale, dtype)
    # The K x K product is torch's; the kernel reads both factors with K contiguous.
    left = torch.mm(u.float(), c.float()).contiguous()
    right = v.float().contiguous()
    w_eff = torch.empty(w.shape, dtype=dtype, device=w.device)
    if w_eff.numel() == 0:
        return w_eff
    source = w if w.stride(1) == 1 else w.contiguous()
    with torch.cuda.device(w.device):
        _native.module().fold_weight(
            source.data_ptr(),
            codes[w.dtype],
            source.stride(0),
            left.data_ptr(),
            left.stride(0),
            right.data_ptr(),
            right.stride(0),
            w_eff.data_ptr(),
            codes[dtype],
            w_eff.stride(0),
            w.shape[0],
            w.shape[1],
            u.shape[1],
            scale,
            torch.cuda.current_stream(w.device).cuda_stream,
        )
    return w_eff


@torch.library.register_fake("subspace_ext::fold_weight")
def _fold_weight_fake(w: Tensor, u: Tensor, c: Tensor, v: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    return torch.empty(w.shape, dtype=dtype, device=w.device)


def _save_for_backward(ctx, inputs, output) -> None:
    _w, u, c, v, scale, _dtype = inputs
    ctx.save_for_backward(u, v)
    ctx.scale = scale
    ctx.core_dtype = c.dtype


def _backward(ctx, d_w_eff: Tensor):
    u, v = ctx.saved_tensors
    wide = accumulation_dtype(d_w_eff.dtype)
    d_c = ctx.scale * (u.to(wide).t() @ d_w_eff.to(wide) @ v.to(wide)) if ctx.needs_input_grad[2] else None
    return None, None, None if d_c is None else d_c.to(ctx.core_dtype), None, None, None


torch.library.register_autograd("subspace_ext::fold_weight", _backward, setup_context=_save_for_backward)
