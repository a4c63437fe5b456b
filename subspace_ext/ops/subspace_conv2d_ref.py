"""Reference of `subspace_conv2d`: the formula, differentiated by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from subspace_ext.ops.rank_update_ref import accumulation_dtype


def subspace_conv2d_ref(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    u: Tensor,
    c: Tensor,
    v: Tensor,
    scale: float,
    geometry: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]],
    w_eff: Tensor | None = None,
    effective: object = None,
) -> Tensor:
    """y = conv2d(x, w + scale * reshape(u c v^T), bias), computed in float32 or wider and rounded once at the end.

    Same arguments as `subspace_conv2d`; `w_eff` and `effective` are accepted and ignored.
    """
    wide = accumulation_dtype(x.dtype)
    update = (u.to(wide) @ c.to(wide) @ v.to(wide).t()).view(w.shape)
    stride, padding, dilation = geometry
    wide_bias = None if bias is None else bias.to(wide)
    y = torch.nn.functional.conv2d(x.to(wide), w.to(wide) + scale * update, wide_bias, stride, padding, dilation)
    return y.to(x.dtype)
