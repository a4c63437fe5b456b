"""Reference of `subspace_linear`: the formula, differentiated by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from subspace_ext.ops.rank_update_ref import accumulation_dtype


def subspace_linear_ref(
    x: Tensor, w: Tensor, bias: Tensor | None, U: Tensor, c: Tensor, V: Tensor, scale: float = 1.0, plan: str = "auto"
) -> Tensor:
    """y = x w^T + bias + scale * ((x V) c^T) U^T, computed in float32 or wider and rounded once at the end.

    Same arguments as `subspace_linear`; `plan` is accepted and ignored, since the formula has one value.
    """
    wide = accumulation_dtype(x.dtype)
    xw, ww, uw, cw, vw = (tensor.to(wide) for tensor in (x, w, U, c, V))
    y = torch.nn.functional.linear(xw, ww, None if bias is None else bias.to(wide))
    y = y + scale * (((xw @ vw) @ cw.t()) @ uw.t())
    return y.to(x.dtype)
