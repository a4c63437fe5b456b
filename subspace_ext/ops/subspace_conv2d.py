"""`subspace_conv2d`: a frozen convolution plus a low-rank update of its unrolled weight."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input

from subspace_ext.ops.effective_weight import effective_weight
from subspace_ext.ops.first_order import first_order
from subspace_ext.ops.rank_update_ref import accumulation_dtype
from subspace_ext.ops.subspace_linear import Effective, without_autocast


def effective_conv_weight(w: Tensor, u: Tensor, c: Tensor, v: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """w_eff = cast(w + scale * reshape(u c v^T)), w [out, Cin, kh, kw], v [Cin*kh*kw, K]; result shaped like w."""
    return effective_weight(w.reshape(w.shape[0], -1), u, c, v, scale, dtype).view(w.shape)


def _forward(x, w, bias, u, c, v, scale, geometry, w_eff, project: bool) -> tuple[Tensor, Tensor | None]:
    """y [B, out, H', W'] and, where asked for, p = unroll(x) v [B, K, H', W']."""
    stride, padding, dilation = geometry
    dtype = x.dtype
    with without_autocast(x.device.type):
        weight = effective_conv_weight(w, u, c, v, scale, dtype) if w_eff is None else w_eff
        narrow_bias = None if bias is None else bias.to(dtype)
        y = torch.nn.functional.conv2d(x, weight, narrow_bias, stride, padding, dilation)
        p = None
        if project:
            filters = v.to(dtype).t().reshape(-1, *w.shape[1:])
            p = torch.nn.functional.conv2d(x, filters, None, stride, padding, dilation)
    return y, p


class _SubspaceConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, bias, u, c, v, scale, geometry, w_eff, effective):
        ctx.effective = effective if c.requires_grad else None
        y, p = _forward(x, w, bias, u, c, v, scale, geometry, w_eff, c.requires_grad)
        ctx.save_for_backward(p, w, u, c, v, w_eff)
        ctx.scale, ctx.geometry, ctx.input_shape = scale, geometry, x.shape
        return y

    @staticmethod
    @first_order
    def backward(ctx, dy):
        p, w, u, c, v, w_eff = ctx.saved_tensors
        stride, padding, dilation = ctx.geometry
        dtype = dy.dtype
        dx = dc = None
        with without_autocast(dy.device.type):
            if ctx.needs_input_grad[0]:
                weight = effective_conv_weight(w, u, c, v, ctx.scale, dtype) if w_eff is None else w_eff
                dx = conv2d_input(ctx.input_shape, weight, dy, stride, padding, dilation)
            if ctx.needs_input_grad[4]:
                if ctx.effective is not None:
                    ctx.effective.spent = True
                wide = accumulation_dtype(dtype)
                # Positions of the output are the tokens of the unrolled layer.
                g = torch.einsum("bohw,ok->bkhw", dy, u.to(dtype)).to(wide)
                dc = (torch.einsum("bkhw,blhw->kl", g, p.to(wide)) * ctx.scale).to(c.dtype)
        return dx, None, None, None, dc, None, None, None, None, None


def subspace_conv2d(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    u: Tensor,
    c: Tensor,
    v: Tensor,
    scale: float,
    geometry: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]],
    w_eff: Tensor | None = None,
    effective: Effective | None = None,
) -> Tensor:
    """y = conv2d(x, w + scale * reshape(u c v^T), bias).

    By the effective weight in every case: an unrolled input is kh*kw times the size of `x`. Saved for backward per
    output position: p = unroll(x) v alone.

    Args:
        x: [B, Cin, H, W].
        w: [out, Cin, kh, kw], frozen.
        bias: [out] or None, frozen.
        u: [out, K], frozen.
        c: [K, K].
        v: [Cin*kh*kw, K], frozen.
        scale: factor s of the update.
        geometry: (stride, padding, dilation), each (vertical, horizontal), in pixels.
        w_eff: the effective weight where the caller has it already.
        effective: the same from a caller that keeps it, in the place of w_eff.

    Returns:
        [B, out, H', W'].
    """
    if effective is not None:
        w_eff, bias = effective.weight, effective.bias
    if not torch.is_grad_enabled() or not (x.requires_grad or c.requires_grad):
        return _forward(x, w, bias, u, c, v, scale, geometry, w_eff, project=False)[0]
    return _SubspaceConv2d.apply(x, w, bias, u, c, v, scale, geometry, w_eff, effective)


def add_beside_conv2d(
    y: Tensor,
    x: Tensor,
    u: Tensor,
    c: Tensor,
    v: Tensor,
    scale: float,
    kernel: tuple[int, ...],
    geometry: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]],
) -> Tensor:
    """y + scale * conv2d(x, reshape(u c v^T)) in the dtype of `y`, which came out of a base layer of any kind.

    Gradients go to `y`, `x` and `c`. Two convolutions, of which the first gives K values a position.

    Args:
        y: [B, out, H', W'] or [out, H', W'].
        x: [B, Cin, H, W] or [Cin, H, W], cast to the dtype of y.
        u, c, v: [out, K], [K, K], [Cin*kh*kw, K].
        scale: factor s of the update.
        kernel: (Cin, kh, kw).
        geometry: (stride, padding, dilation), each (vertical, horizontal), in pixels.

    Raises:
        ValueError: y does not have the shape of such a convolution.
    """
    stride, padding, dilation = geometry
    with without_autocast(y.device.type):
        filters = v.to(y.dtype).t().reshape(-1, *kernel)
        p = torch.nn.functional.conv2d(x.to(y.dtype), filters, None, stride, padding, dilation)
        wide = accumulation_dtype(y.dtype)
        mixed = (scale * (u.to(wide) @ c.to(wide))).to(y.dtype)
        update = torch.nn.functional.conv2d(p, mixed[:, :, None, None])
    if y.shape != update.shape:
        raise ValueError(f"the base layer must return {list(update.shape)}, got shape {tuple(y.shape)}")
    return y + update
