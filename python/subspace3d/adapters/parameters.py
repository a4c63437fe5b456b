"""What of a model is trained, and how much of that is in which part."""

from __future__ import annotations

from typing import Any

from torch import nn

from subspace3d.backbones.find import backbone_of


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters with ``requires_grad``, by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def head_groups(model: nn.Module, factor: float) -> list[dict[str, Any]]:
    """Groups for an optimiser: the cores, and the LoRA on the heads beside them at ``factor`` times their rate."""
    groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, parameter in trainable_parameters(model).items():
        groups[".lora_" in name].append(parameter)
    return [{"params": groups[False]}, {"params": groups[True], "rate_factor": factor}]


def count_trainable(model: nn.Module) -> dict[str, int]:
    """Number of trainable values in each part that has any, and their ``total``.

    Of AdaLoRA the directions that are kept count, not those that were cut.
    """
    kept, backbone = _kept_by_adalora(model), backbone_of(model)
    counts: dict[str, int] = {}
    for name, parameter in trainable_parameters(model).items():
        part = backbone.part_of(name)
        counts[part] = counts.get(part, 0) + kept.get(name, parameter.numel())
    return {**counts, "total": sum(counts.values())}


def _kept_by_adalora(model: nn.Module) -> dict[str, int]:
    """Name of each AdaLoRA factor -> its number of values in directions that were not cut."""
    kept = {}
    for adapter, config in getattr(model, "peft_config", {}).items():
        if config.peft_type != "ADALORA":
            continue
        for mask_name, mask in (config.rank_pattern or {}).items():
            # PEFT drops the adapter's name from the keys when it saves
            module = mask_name.removesuffix(f".{adapter}").removesuffix(".lora_E")
            for kind in ("lora_A", "lora_B", "lora_E"):
                name = f"base_model.model.{module}.{kind}.{adapter}"
                kept[name] = model.get_parameter(name).numel() * sum(mask) // len(mask)
    return kept
