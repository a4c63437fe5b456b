"""What of a model is trained, and to which part of it that belongs."""

from __future__ import annotations

from torch import nn

PARTS = ("aggregator", "depth_head", "camera_head")


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters with ``requires_grad``, by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def part_of(name: str) -> str:
    """``aggregator``, ``depth_head``, ``camera_head`` or ``other``: the part of a VGGT a parameter belongs to.

    Prefixes that wrappers put before the part are skipped.
    """
    return next((piece for piece in name.split(".") if piece in PARTS), "other")


def count_trainable(model: nn.Module) -> dict[str, int]:
    """Number of trainable values in each part that has any, and their ``total``.

    Of AdaLoRA the directions that are kept count, not those that were cut.
    """
    kept = _kept_by_adalora(model)
    counts: dict[str, int] = {}
    for name, parameter in trainable_parameters(model).items():
        part = part_of(name)
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
