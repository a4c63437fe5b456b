"""`effective_weight`: the weight a layer multiplies with once its low-rank update has been added."""

from __future__ import annotations

import torch
from torch import Tensor

from subspace_ext.ops.rank_update import rank_update
from subspace_ext.ops.rank_update_ref import accumulation_dtype

torch.library.define(
    "subspace_ext::effective_weight",
    "(Tensor w, Tensor u, Tensor c, Tensor v, float scale, ScalarType dtype, int? seed=None) -> Tensor",
)
torch.library.register_kernel("subspace_ext::effective_weight", "default", rank_update)


def effective_weight(
    w: Tensor, u: Tensor, c: Tensor, v: Tensor, scale: float, dtype: torch.dtype, seed: int | None = None
) -> Tensor:
    """w_eff = cast(w + scale * u c v^T), accumulated in float32 (float64 for a float64 weight), rounded once.

    Differentiable in `c` only.

    Args:
        w: [out, in], frozen.
        u: [out, K], frozen.
        c: [K, K].
        v: [in, K], frozen.
        scale: factor s of the update.
        dtype: dtype of the result.
        seed: round to bfloat16 or float16 stochastically, by a hash of seed and position; None rounds to nearest.

    Returns:
        [out, in], contiguous, of dtype `dtype`.
    """
    if torch.compiler.is_compiling() or (c.requires_grad and torch.is_grad_enabled()):
        return torch.ops.subspace_ext.effective_weight(w, u, c, v, scale, dtype, seed)
    # Without a graph to record, the dispatcher costs more than a small product.
    return rank_update(w, u, c, v, scale, dtype, seed)


@torch.library.register_fake("subspace_ext::effective_weight")
def _fake(w, u, c, v, scale, dtype, seed=None):
    return torch.empty(w.shape, dtype=dtype, device=w.device)


def _save_for_backward(ctx, inputs, output) -> None:
    _w, u, c, v, scale, _dtype, _seed = inputs
    ctx.save_for_backward(u, v)
    ctx.scale = scale
    ctx.core_dtype = c.dtype


def _backward(ctx, d_w_eff: Tensor):
    u, v = ctx.saved_tensors
    wide = accumulation_dtype(d_w_eff.dtype)
    d_c = ctx.scale * (u.to(wide).t() @ d_w_eff.to(wide) @ v.to(wide)) if ctx.needs_input_grad[2] else None
    return None, None, None if d_c is None else d_c.to(ctx.core_dtype), None, None, None, None


torch.library.register_autograd("subspace_ext::effective_weight", _backward, setup_context=_save_for_backward)
