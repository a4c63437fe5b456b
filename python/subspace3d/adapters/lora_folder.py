"""Write adapters as plain LoRA folders, which stock PEFT loads: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from subspace3d import outputs
from subspace3d.backbones.targets import PRESETS, target_regex
from subspace3d.files import atomic_folder, save_tensors

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Module name -> (``lora_b [out, r]``, ``lora_a [r, in]``) with ``delta W = lora_b lora_a``, scaling included."""
_PREFIX = "base_model.model."


def write_lora(folder: Path, factors: Factors, model: nn.Module, base_model: str | None = None) -> Path:
    """Write one LoRA folder: alpha = r for every module, so that PEFT's scaling is exactly one.

    Modules of another rank than the most common one stand in rank_pattern and alpha_pattern.

    Args:
        folder (Path): folder to write, whole or not at all.
        factors (dict): see `Factors`; a module's rank may be its own.
        model (nn.Module): the model they belong to, plain or adapted; it gives the kernels of convolutions.
        base_model (str | None): identity of its weights, for base_model_name_or_path.

    Raises:
        ValueError: no factors; or a convolution that PEFT's LoRA cannot represent (dilation, groups, padding mode).
    """
    from peft import LoraConfig

    if not factors:
        raise ValueError("the adapter must change at least one module, got none")
    tensors = {}
    for name, (b, a) in factors.items():
        module = model.get_submodule(name)
        module = getattr(module, "base_layer", module)
        if isinstance(module, nn.Conv2d):
            _check_convolution(name, module)
            a, b = a.reshape(len(a), *module.weight.shape[1:]), b[:, :, None, None]
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = a.float()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = b.float()
    ranks = {name: len(a) for name, (_, a) in factors.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    # PEFT reads the keys as expressions that may match a suffix; the anchor makes them match one module alone
    pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != usual}
    config = LoraConfig(
        r=usual,
        lora_alpha=usual,
        target_modules=target_expression(factors, model),
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        lora_dropout=0.0,
        bias="none",
        inference_mode=True,
        base_model_name_or_path=base_model,
    )
    with atomic_folder(outputs.claim(folder, outputs.EXPORTED, "folder")) as temporary:
        config.save_pretrained(str(temporary))
        save_tensors(temporary / "adapter_model.safetensors", tensors)
    return folder


def _check_convolution(name: str, module: nn.Conv2d) -> None:
    for setting, plain in (("dilation", (1, 1)), ("groups", 1), ("padding_mode", "zeros")):
        value = getattr(module, setting)
        if value != plain:
            raise ValueError(
                f"{name} cannot be exported: PEFT's LoRA for Conv2d needs {setting} {plain!r}, the module has {value!r}"
            )


def target_expression(names: Iterable[str], model: nn.Module) -> str:
    """A full-match expression for exactly these modules: a preset's if one fits, else their names."""
    wanted = set(names)
    for preset in PRESETS:
        expression = target_regex(preset)
        if {name for name, _ in model.named_modules() if re.fullmatch(expression, name)} == wanted:
            return expression
    return "|".join(re.escape(name) for name in names)


def adapter_factors(model: nn.Module, adapter: str = "default") -> Factors:
    """What ``adapter`` of a PeftModel changes, exactly, as one low-rank update per module.

    lora: as it is. pissa: the trained factors and, subtracted, those it started with, which were taken out of the base
    weight. adalora: ``(alpha / r) B diag(E) A`` without the directions that were cut; a module without any is left out.
    psv, subspace: ``s U c`` and ``V^T``, followed by a LoRA on the same module.
    """
    from peft.tuners.adalora.layer import AdaLoraLayer
    from peft.tuners.lora import LoraLayer

    from subspace3d.adapters.peft_layers import SubspaceLayer

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
                factors[name.removeprefix(_PREFIX)] = pair
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
