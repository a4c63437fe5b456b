"""How many parameters a method trains on a backbone, counted on the model's shapes without its weights."""

from __future__ import annotations

import torch

from subspace3d.adapters.placement import count_parameters
from subspace3d.backbones.find import find_backbone
from subspace3d.backbones.protocol import attach
from subspace3d.choices import METHODS


def count_trainable(
    backbone: str, method: str, rank: int, core_size: int = 256, head_cores: bool = False
) -> dict[str, int]:
    """Trainable parameters of ``method`` as the paper counts them, see `placement.count_parameters`.

    Args:
        backbone (str): name of a preset, or ``package.module:factory``.
        method (str): none, full, lora, pissa, adalora, psv or subspace.
        rank (int): r of the LoRA family; subspace and psv: of the adapters on the heads.
        core_size (int): K of subspace and psv.
        head_cores (bool): subspace and psv: also a core on every head module as wide as the depth head's features.

    Returns:
        counts for every part of the backbone, in the order of their names, and their total.

    Raises:
        ValueError: unknown backbone or method, a rank below 1, or K above the smaller side of a module with a core.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    found = find_backbone(backbone)
    with torch.device("meta"):
        model = attach(found.checked_network(), found)
    counts = count_parameters(model, method, rank, core_size, head_cores=head_cores)
    return {**dict.fromkeys(sorted(set(found.parts.values())), 0), **counts}
