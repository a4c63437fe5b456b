"""What an adapter changes, as one low-rank update per module, whatever its method."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from subspace3d.formats.adapter import PEFT_PREFIX, Factors


def adapter_factors(model: nn.Module, adapter: str = "default") -> Factors:
    """What ``adapter`` of a PeftModel changes, exactly, as one low-rank update per module.

    lora: as it is. pissa: the trained factors and, subtracted, those it started with, which were taken out of the base
    weight. adalora: ``(alpha / r) B diag(E) A`` without the directions that were cut; a module without any is left out.
    psv, subspace: ``s U c`` and ``V^T``, followed by a LoRA on the same module.
    """
    from peft.tuners.adalora.layer import AdaLoraLayer
    from peft.tuners.lora import LoraLayer

    from subspace3d.adapters.peft.layers import SubspaceLayer

    factors: Factors = {}
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, SubspaceLayer):
                pair = layer.lora_factors(adapter)
            elif not isinstance(layer, LoraLayer) or adapter not in layer.lora_A:
                continue
            elif isinstance(layer, AdaLoraLayer):
                pair = _adalora_factors(layer, adapter)
            else:
                pair = _lora_factors(layer, adapter)
            if pair is not None and len(pair[1]):
                factors[name.removeprefix(PEFT_PREFIX)] = pair
    return factors


def _lora_factors(layer: Any, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
    from subspace3d.adapters.pissa import start_factors

    scaling = layer.scaling[adapter]
    b, a = scaling * layer.lora_B[adapter].weight.flatten(1), layer.lora_A[adapter].weight.flatten(1)
    start = start_factors(layer)
    return (b, a) if start is None else (torch.cat([b, -scaling * start[0]], 1), torch.cat([a, start[1]]))


def _adalora_factors(layer: Any, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
    values = layer.lora_E[adapter]
    kept = (values != 0).flatten()
    # the small number is in PEFT's own forward
    scaling = layer.scaling[adapter] / (layer.ranknum[adapter] + 1e-5)
    return scaling * layer.lora_B[adapter][:, kept], (layer.lora_A[adapter] * values)[kept]
