"""How many parameters each tuning method trains, counted on the model's shapes without its weights."""

from __future__ import annotations

import json
from dataclasses import dataclass

from subspace3d.choices import Method
from subspace3d.settings import require


@dataclass(frozen=True)
class ParamsConfig:
    """Count trainable parameters of a method, without loading weights."""

    backbone: str = "vggt-1b"
    """A preset (doctor lists them), or package.module:factory."""
    method: Method = "lora"
    """Tuning method; pissa counts like lora, psv like subspace."""
    rank: int = 16
    """LoRA rank r: of the whole adapter for lora, pissa, adalora; of the adapters on the heads for psv and subspace."""
    core_size: int = 256
    """K, columns of U and V, of subspace and psv."""
    head_cores: bool = False
    """subspace and psv: also a core on every head module as wide as the depth head's features, beside its LoRA."""
    json: bool = False
    """Print the counts per part as JSON."""

    def __post_init__(self) -> None:
        require(self.rank >= 1, "rank", "at least 1", self.rank)
        require(self.core_size >= 1, "core_size", "at least 1", self.core_size)


def run(config: ParamsConfig) -> dict[str, int]:
    """Print the count, and below it the counts of the parts."""
    from subspace3d.adapters.counts import count_trainable

    counts = count_trainable(config.backbone, config.method, config.rank, config.core_size, config.head_cores)
    if config.json:
        print(json.dumps(counts))
        return counts
    print(f"{counts['total']:,}")
    parts = [part for part in counts if part != "total"]
    name_width = max(11, *map(len, parts))
    width = max(len(f"{counts[part]:,}") for part in parts)
    for part in parts:
        print(f"  {part:<{name_width}} {counts[part]:>{width},}")
    return counts
