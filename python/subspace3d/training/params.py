"""How many parameters each tuning method trains, counted on the model's shapes without its weights."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from subspace3d.configs import ParamsConfig

if TYPE_CHECKING:
    from torch import nn

    from subspace3d.backbones.vggt import VGGT

METHODS = ("full", "lora", "pissa", "adalora", "psv", "subspace")
PARTS = ("aggregator", "camera_head", "depth_head")
HEAD_RANK = 16
"""Rank of the LoRA that psv and subspace put on the heads."""
HEAD_CORE_WIDTH = 256
"""With ``head_cores``, head modules at least this wide on both sides get a core too."""
FROZEN = "aggregator.patch_embed."


def count_trainable(backbone: str, method: str, rank: int, head_cores: bool = False) -> dict[str, int]:
    """Trainable parameters of ``method``, where a layer's weight is ``[out, in]`` and a convolution's is unrolled.

    full: everything outside the image encoder. lora, pissa: ``(in + out) r`` for every target. adalora:
    ``(in + out + 1) r`` for every Linear among them. subspace, psv: ``K^2`` in the aggregator, ``16 (in + out)`` in the
    heads, and with ``head_cores`` ``K^2`` more for every head module with both sides of 256 or more.

    Args:
        backbone: ``vggt-1b`` or ``vggt-nano``.
        method: one of `METHODS`.
        rank: r for the LoRA family, K for subspace and psv; unused by full.
        head_cores: see above.

    Returns:
        counts for aggregator, camera_head, depth_head and their total.

    Raises:
        ValueError: unknown backbone or method, a rank below 1, or K above the smaller side of a module with a core.
    """
    import torch

    from subspace3d.backbones.config import named_config
    from subspace3d.backbones.vggt import VGGT

    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    with torch.device("meta"):
        model = VGGT(named_config(backbone))
    counts = _count_full(model) if method == "full" else _count_adapters(model, method, rank, head_cores)
    return {**counts, "total": sum(counts.values())}


def _count_full(model: VGGT) -> dict[str, int]:
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        if not name.startswith(FROZEN):
            counts[name.partition(".")[0]] += parameter.numel()
    return counts


def _count_adapters(model: VGGT, method: str, rank: int, head_cores: bool) -> dict[str, int]:
    from torch import nn

    from subspace3d.backbones.targets import target_modules

    counts = dict.fromkeys(PARTS, 0)
    for name in target_modules(model, "all"):
        part = name.partition(".")[0]
        module = model.get_submodule(name)
        rows, columns = _sides(module)
        if method == "adalora":
            counts[part] += (rows + columns + 1) * rank if isinstance(module, nn.Linear) else 0
        elif method in ("lora", "pissa"):
            counts[part] += (rows + columns) * rank
        else:
            in_head = part != "aggregator"
            if in_head:
                counts[part] += (rows + columns) * HEAD_RANK
            if not in_head or (head_cores and min(rows, columns) >= HEAD_CORE_WIDTH):
                counts[part] += _core(name, rows, columns, rank)
    return counts


def _sides(module: nn.Module) -> tuple[int, int]:
    """(out, in) of the weight matrix; a convolution's is [out, in * kernel height * kernel width]."""
    weight: Any = module.weight
    return weight.shape[0], weight[0].numel()


def _core(name: str, rows: int, columns: int, size: int) -> int:
    if size > min(rows, columns):
        raise ValueError(f"rank (K) must be at most {min(rows, columns)}, the smaller side of {name}, got {size}")
    return size**2


def run(config: ParamsConfig) -> dict[str, int]:
    """Print the count, and below it the counts of the parts."""
    counts = count_trainable(config.backbone, config.method, config.rank, config.head_cores)
    if config.json:
        print(json.dumps(counts))
        return counts
    print(f"{counts['total']:,}")
    width = max(len(f"{counts[part]:,}") for part in PARTS)
    for part in PARTS:
        print(f"  {part:<11} {counts[part]:>{width},}")
    return counts
