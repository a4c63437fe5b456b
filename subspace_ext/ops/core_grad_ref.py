"""Reference of `core_grad`."""

from __future__ import annotations

import torch
from torch import Tensor


def core_grad_ref(g: Tensor, p: Tensor, scale: float) -> Tensor:
    """dc = scale * g^T p [K, K] from g, p [T, K]; summed and returned in float32 (float64 for float64)."""
    if g.dtype in (torch.bfloat16, torch.float16):
        g, p = g.float(), p.float()
    product = torch.mm(g.t(), p)
    return product if scale == 1.0 else product * scale
