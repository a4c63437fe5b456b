"""References of `lora_linear` and `lora_conv2d`: the formulas, differentiated by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from subspace_ext.ops.rank_update_ref import accumulation_dtype

Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def lora_linear_ref(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """y = x w^T + bias + scale * (x a^T) b^T, computed in float32 or wider and rounded once at the end."""
    wide = accumulation_dtype(x.dtype)
    xw, ww, aw, bw = (tensor.to(wide) for tensor in (x, w, a, b))
    y = torch.nn.functional.linear(xw, ww, None if bias is None else bias.to(wide))
    return (y + scale * ((xw @ aw.t()) @ bw.t())).to(x.dtype)


def lora_conv2d_ref(
    x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, geometry: Geometry
) -> Tensor:
    """y = conv2d(x, w + scale * reshape(b a), bias), computed in float32 or wider and rounded once at the end."""
    wide = accumulation_dtype(x.dtype)
    stride, padding, dilation = geometry
    update = (b.flatten(1).to(wide) @ a.flatten(1).to(wide)).view(w.shape)
    wide_bias = None if bias is None else bias.to(wide)
    y = torch.nn.functional.conv2d(x.to(wide), w.to(wide) + scale * update, wide_bias, stride, padding, dilation)
    return y.to(x.dtype)
