"""PiSSA on Linear and Conv2d: a LoRA that starts at the leading singular directions of the weight it stands on.

PEFT has it for Linear only, and where a module is narrower than the rank it writes factors that it cannot load again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from subspace3d.adapters.spectral import leading_directions
from subspace3d.progress import Progress

_START = ("pissa_start_b", "pissa_start_a")


@torch.no_grad()
def start_pissa(model: nn.Module) -> None:
    """``A = (S_r / s)^(1/2) V_r^T``, ``B = U_r (S_r / s)^(1/2)``, ``w <- w - s B A`` for ``w = U S V^T``, in place.

    s is the LoRA's scaling; a convolution is unrolled. The model computes what it did before. Directions beyond
    min(out, in) keep LoRA's start, with B zero. What the factors started with is kept for `low_rank.adapter_factors`.

    Args:
        model (nn.Module): a PeftModel with a LoRA fresh from PEFT, called ``default``.

    Raises:
        ValueError: the weights are not float32: a residual rounded to fewer digits would not add up to the weight.
    """
    from peft.tuners.lora import LoraLayer

    layers: dict[str, Any] = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    with Progress("pissa: singular vectors of the weights", len(layers), "module") as progress:
        for name, layer in layers.items():
            weight = layer.get_base_layer().weight
            if weight.dtype != torch.float32:
                raise ValueError(f"pissa needs float32 weights, {name} has {weight.dtype}")
            a, b, scaling = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
            k = min(len(a), weight.shape[0], weight[0].numel())
            u, values, v = leading_directions(weight, k)
            root = (values / scaling).sqrt()
            a[:k] = (root[:, None] * v.T).reshape(a[:k].shape)
            b[:, :k] = (u * root).reshape(b[:, :k].shape)
            start = b.flatten(1).clone(), a.flatten(1).clone()
            weight -= (scaling * start[0] @ start[1]).reshape(weight.shape)
            for key, value in zip(_START, start):
                layer.register_buffer(key, value, persistent=False)
            progress.advance()


def start_factors(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor] | None:
    """``B [out, r]`` and ``A [r, in]`` that `start_pissa` gave ``layer``; None if it did not."""
    if not hasattr(layer, _START[0]):
        return None
    return layer.get_buffer(_START[0]), layer.get_buffer(_START[1])
