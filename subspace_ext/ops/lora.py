"""`lora_linear` and `lora_conv2d`: a frozen layer with a LoRA of which both factors are trained, in few passes.

A LoRA written as modules reads and writes whole activations again for each of its steps. Here the linear makes its
products into one result, and the convolution is one convolution with the effective weight.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from subspace_ext.ops.rank_update_ref import accumulation_dtype
from subspace_ext.ops.subspace_linear import without_autocast

Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]

# Output channels up to which the gradient of the whole weight is cheaper than convolutions with as few channels as the
# rank, which use a processor badly. Measured on one AVX-512 core in float32 with 48 channels of 32 x 32 to 112 x 112
# pixels, r = 4: 0.80 to 0.93 of the time.
WHOLE_GRADIENT_CHANNELS = 64


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, bias, a, b, scale):
        dtype = x.dtype
        tokens = x.reshape(-1, x.shape[-1])
        narrow_a, narrow_b = a.to(dtype), (scale * b).to(dtype)
        p = tokens @ narrow_a.t()
        y = torch.nn.functional.linear(tokens, w.to(dtype), None if bias is None else bias.to(dtype))
        y.addmm_(p, narrow_b.t())
        ctx.save_for_backward(x, p, w, narrow_a, narrow_b)
        ctx.scale, ctx.dtypes = scale, (a.dtype, b.dtype)
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[1]))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, p, w, a, b = ctx.saved_tensors
        rows, tokens = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        dx = da = db = None
        with without_autocast(dy.device.type):
            g = rows @ b
            if ctx.needs_input_grad[0]:
                dx = (rows @ w.to(dy.dtype)).addmm_(g, a).view(x.shape)
            if ctx.needs_input_grad[3]:
                da = (g.t() @ tokens).to(ctx.dtypes[0])
            if ctx.needs_input_grad[4]:
                db = (rows.t() @ p).to(ctx.dtypes[1]).mul_(ctx.scale)
        return dx, None, None, da, db, None


def lora_linear(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """y = x w^T + bias + scale * (x a^T) b^T.

    Gradients go to `x`, `a` and `b`. Saved for backward: x, and p = x a^T.

    Args:
        x: [..., in], in the dtype to compute in; autocast must be off.
        w: [out, in], frozen.
        bias: [out] or None, frozen.
        a: [r, in].
        b: [out, r].
        scale: factor of the update.

    Returns:
        [..., out], of the dtype of x.
    """
    return _LoraLinear.apply(x, w, bias, a, b, scale)


class _LoraConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, bias, a, b, scale, geometry):
        stride, padding, dilation = geometry
        dtype = x.dtype
        wide = accumulation_dtype(w.dtype)
        left, right = b.flatten(1).to(wide), a.flatten(1).to(wide)
        w_eff = torch.addmm(w.flatten(1).to(wide), left, right, alpha=scale).to(dtype).view(w.shape)
        y = torch.nn.functional.conv2d(x, w_eff, None if bias is None else bias.to(dtype), stride, padding, dilation)
        p = None
        if w.shape[0] > WHOLE_GRADIENT_CHANNELS and ctx.needs_input_grad[4]:
            p = torch.nn.functional.conv2d(x, a.to(dtype), None, stride, padding, dilation)
        ctx.save_for_backward(x, w_eff, a, b, p)
        ctx.scale, ctx.geometry = scale, geometry
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, w_eff, a, b, p = ctx.saved_tensors
        needs_x, needs_a, needs_b = (ctx.needs_input_grad[index] for index in (0, 3, 4))
        whole = p is None and (needs_a or needs_b)
        with without_autocast(dy.device.type):
            dx, dw = _conv_backward(dy, x, w_eff, ctx.geometry, needs_x, whole)
            da = db = None
            if whole:
                wide = accumulation_dtype(a.dtype)
                dw = dw.flatten(1).to(wide)
                if needs_a:
                    da = (ctx.scale * (b.flatten(1).to(wide).t() @ dw)).view(a.shape).to(a.dtype)
                if needs_b:
                    db = (ctx.scale * (dw @ a.flatten(1).to(wide).t())).view(b.shape).to(b.dtype)
            elif needs_a or needs_b:
                positions = dy.flatten(2)
                if needs_a:
                    g = ((ctx.scale * b.flatten(1)).to(dy.dtype).t() @ positions).view(p.shape)
                    da = _conv_backward(g, x, a.to(dy.dtype), ctx.geometry, False, True)[1].to(a.dtype)
                if needs_b:
                    db = torch.einsum("bot,brt->or", positions, p.flatten(2)).to(b.dtype).mul_(ctx.scale).view(b.shape)
        return dx, None, None, da, db, None, None


def _conv_backward(dy, x, weight, geometry, needs_x: bool, needs_weight: bool):
    stride, padding, dilation = geometry
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dy, x, weight, None, stride, padding, dilation, False, (0, 0), 1, (needs_x, needs_weight, False)
    )
    return dx, dw


def lora_conv2d(
    x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, geometry: Geometry
) -> Tensor:
    """y = conv2d(x, w + scale * reshape(b a), bias), the weight added up in float32 or wider and rounded once.

    Gradients go to `x`, `a` and `b`; those of the factors come from the gradient of the whole weight, or where it has
    more than `WHOLE_GRADIENT_CHANNELS` output channels, from convolutions with r channels. Saved for backward: x.

    Args:
        x: [B, Cin, H, W], in the dtype to compute in; autocast must be off.
        w: [out, Cin, kh, kw], frozen.
        bias: [out] or None, frozen.
        a: [r, Cin, kh, kw].
        b: [out, r, 1, 1].
        scale: factor of the update.
        geometry: (stride, padding, dilation), each (vertical, horizontal), in pixels.

    Returns:
        [B, out, H', W'], of the dtype of x.
    """
    return _LoraConv2d.apply(x, w, bias, a, b, scale, geometry)
