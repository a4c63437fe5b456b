"""`lora_linear` and `lora_conv2d`: a frozen layer with a LoRA of which both factors are trained, in few passes.

A LoRA written as modules reads and writes whole activations again for each of its steps. Here the linear makes its
products into one result, and the convolution is one convolution with the effective weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from subspace_ext.ops.first_order import first_order
from subspace_ext.ops.rank_update_ref import accumulation_dtype
from subspace_ext.ops.subspace_linear import without_autocast

Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]

# Where the gradients of a convolution's factors are taken from the gradient of the whole weight: small products, which
# the many operations of the low-rank way would cost more than, and ranks at which its copies would. A value copied
# costs as much as so many multiplications, measured on one AVX-512 core in float32.
_SMALL_PRODUCTS = 2**23
_PRODUCTS_PER_COPY = 50
# More copies than this leave a processor's caches, and then cost more than they save.
_CPU_COPIES = 2**21


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, bias, a, b, scale):
        dtype = x.dtype
        tokens = x.reshape(-1, x.shape[-1])
        narrow_a, narrow_b = a.to(dtype), b.to(dtype)
        p = tokens @ narrow_a.t()
        y = torch.nn.functional.linear(tokens, w.to(dtype), None if bias is None else bias.to(dtype))
        y.addmm_(p, narrow_b.t(), alpha=scale)
        ctx.save_for_backward(x, p, w, narrow_a, narrow_b)
        ctx.scale, ctx.dtypes = scale, (a.dtype, b.dtype)
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[1]))

    @staticmethod
    @first_order
    def backward(ctx, dy):
        x, p, w, a, b = ctx.saved_tensors
        rows, tokens = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        dx = da = db = None
        with without_autocast(dy.device.type):
            g = rows @ b
            if ctx.needs_input_grad[0]:
                dx = (rows @ w.to(dy.dtype)).addmm_(g, a, alpha=ctx.scale).view(x.shape)
            if ctx.needs_input_grad[3]:
                da = (g.t() @ tokens).to(ctx.dtypes[0]).mul_(ctx.scale)
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
        ctx.save_for_backward(x, w_eff, a, b)
        ctx.scale, ctx.geometry = scale, geometry
        bias = None if bias is None else bias.to(dtype)
        if _is_product(w, geometry, x.device):
            if _channels_last(x):
                return torch.nn.functional.linear(x.movedim(1, -1), w_eff.flatten(1), bias).movedim(-1, 1)
            y = torch.bmm(w_eff.flatten(1).expand(len(x), -1, -1), x.flatten(2))
            y = y if bias is None else y.add_(bias[:, None])
            return y.view(*y.shape[:2], *x.shape[2:])
        return torch.nn.functional.conv2d(x, w_eff, bias, stride, padding, dilation)

    @staticmethod
    @first_order
    def backward(ctx, dy):
        x, w_eff, a, b = ctx.saved_tensors
        needs_x, needs_a, needs_b = (ctx.needs_input_grad[index] for index in (0, 3, 4))
        low_rank = low_rank_pays(dy.shape, a.shape, ctx.geometry, x.device.type == "cpu")
        with without_autocast(dy.device.type):
            whole = (needs_a or needs_b) and not low_rank
            dx, dw = _gradients(dy, x, w_eff, ctx.geometry, needs_x, whole)
            if not needs_a and not needs_b:
                return dx, None, None, None, None, None, None
            if dw is None:
                da, db = _low_rank_gradients(dy, x, a, b, *ctx.geometry[1:])
            else:
                wide = accumulation_dtype(a.dtype)
                dw = dw.flatten(1).to(wide)
                da, db = b.flatten(1).to(wide).t() @ dw, dw @ a.flatten(1).to(wide).t()
            da, db = da.mul_(ctx.scale).view(a.shape).to(a.dtype), db.mul_(ctx.scale).view(b.shape).to(b.dtype)
        return dx, None, None, da if needs_a else None, db if needs_b else None, None, None


def _gradients(
    dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, needs_x: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Of conv2d(x, weight) by x and by weight, each only where it is needed."""
    dx = dw = None
    product = _is_product(weight, geometry, x.device)
    if product and _channels_last(x):
        rows, columns = dy.movedim(1, -1), x.movedim(1, -1)
        if needs_x:
            dx = (rows @ weight.flatten(1)).movedim(-1, 1)
        if needs_weight:
            dw = rows.flatten(0, 2).t() @ columns.flatten(0, 2)
    elif product:
        rows, columns = dy.flatten(2), x.flatten(2)
        if needs_x:
            dx = torch.bmm(weight.flatten(1).t().expand(len(x), -1, -1), rows).view(x.shape)
        if needs_weight:
            dw = torch.bmm(rows, columns.transpose(1, 2)).sum(0, dtype=accumulation_dtype(dy.dtype))
    elif needs_x or needs_weight:
        stride, padding, dilation = geometry
        needs = (needs_x, needs_weight, False)
        dx, dw, _ = torch.ops.aten.convolution_backward(
            dy, x, weight, None, stride, padding, dilation, False, (0, 0), 1, needs
        )
    return dx, dw


def _is_product(weight: Tensor, geometry: Geometry, device: torch.device) -> bool:
    """Whether the convolution is a product of matrices, which on a CPU torch computes faster under that name."""
    stride, padding, _ = geometry
    return device.type == "cpu" and weight[0, 0].numel() == 1 and {*stride} == {1} and {*padding} == {0}


def _channels_last(x: Tensor) -> bool:
    """Whether the channels of a pixel lie together; a product keeps them so, for what follows is slower otherwise."""
    return x.is_contiguous(memory_format=torch.channels_last)


def low_rank_pays(dy_shape: Sequence[int], a_shape: Sequence[int], geometry: Geometry, on_cpu: bool) -> bool:
    """Whether the factors' gradients are cheaper from r channels than from the gradient of the whole weight."""
    stride, padding, dilation = geometry
    batch, out_size, height, width = dy_shape
    rank, in_size, *kernel = a_shape
    if any(step != 1 for step in stride) or any((k - 1) * d < p for k, d, p in zip(kernel, dilation, padding)):
        return False
    if batch * height * width * out_size * in_size * kernel[0] * kernel[1] < _SMALL_PRODUCTS:
        return False
    if kernel[0] * kernel[1] == 1:
        return False
    if on_cpu and batch * height * width * rank * kernel[0] * kernel[1] > _CPU_COPIES:
        return False
    return 2 * rank * (in_size + _PRODUCTS_PER_COPY) < out_size * in_size


def _low_rank_gradients(dy, x, a, b, padding, dilation) -> tuple[Tensor, Tensor]:
    """da [r, Cin*kh*kw] and db [out, r] without the scale, for stride 1.

    With g = b^T dy, da sums g at (q + padding - k dilation) times x at q over all positions q of x: one product with
    the shifted copies of g. And p = conv2d(x, a) is the sum of shifted products a x, with which db = dy p^T.
    """
    dtype = dy.dtype
    rank, in_size, *kernel = a.shape
    offsets = kernel[0] * kernel[1]
    shift = tuple((k - 1) * d - p for k, d, p in zip(kernel, dilation, padding))
    rows, columns = dy.flatten(2), x.flatten(2)
    batch = len(rows)
    # bmm, because matmul copies an operand of three dimensions that requires a gradient
    g = torch.bmm(b.flatten(1).to(dtype).t().expand(batch, -1, -1), rows)
    # the kernel's positions in reverse, as unfold and fold count them
    filters = a.to(dtype).flip(2, 3).permute(0, 2, 3, 1).reshape(rank * offsets, in_size)
    products = torch.bmm(filters.expand(batch, -1, -1), columns)
    shifted = torch.nn.functional.unfold(g.view(-1, rank, *dy.shape[2:]), kernel, dilation, shift)
    p = torch.nn.functional.fold(products, dy.shape[2:], kernel, dilation, shift).flatten(2)
    da = torch.bmm(shifted, columns.transpose(1, 2)).sum(0, dtype=accumulation_dtype(dtype))
    db = torch.bmm(rows, p.transpose(1, 2)).sum(0, dtype=accumulation_dtype(dtype))
    return da.view(rank, *kernel, in_size).flip(1, 2).permute(0, 3, 1, 2).reshape(rank, -1), db


def lora_conv2d(
    x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, geometry: Geometry
) -> Tensor:
    """y = conv2d(x, w + scale * reshape(b a), bias), the weight added up in float32 or wider and rounded once.

    Gradients go to `x`, `a` and `b`; those of the factors come from r channels or from the gradient of the whole
    weight, whichever costs less. Saved for backward: x.

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
