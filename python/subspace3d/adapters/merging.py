"""How much of an update survives when it is merged into weights of a given type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

MAX_ERROR = 0.05
"""Share of an update that rounding may lose. bfloat16 loses 17 % of an update a hundredth as large as the weight."""


class Mergeable(Protocol):
    def merged_weight(self, adapters: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The untouched weight; with the updates of ``adapters`` added, in its type; their sum, float32 or wider."""


@dataclass(frozen=True)
class MergeReport:
    """What merging changed.

    Attributes:
        modules: number of modules with an update that is not zero.
        dtype: type of their weights.
        relative_error: ``|(merged - w) - delta|_F / |delta|_F`` over all modules; 0 when there is no update.
        worst_module: the module with the largest such error of its own.
        worst_error: that error.
    """

    modules: int
    dtype: str
    relative_error: float
    worst_module: str
    worst_error: float

    def __str__(self) -> str:
        text = f"merged {self.modules} modules in {self.dtype}: relative error of the update {self.relative_error:.1e}"
        return f"{text}, worst {self.worst_error:.1e} in {self.worst_module}" if self.modules else text


def plan_merge(layers: Mapping[str, Mergeable], adapters: Sequence[str], max_error: float = MAX_ERROR) -> MergeReport:
    """What merging ``adapters`` into ``layers`` would do; changes nothing.

    Raises:
        ValueError: a merged weight would not be finite, or more than ``max_error`` of the update would be lost to
            rounding.
    """
    lost = total = worst_error = 0.0
    worst_module, modules, dtypes = "", 0, set()
    for name, layer in layers.items():
        weight, merged, update = layer.merged_weight(adapters)
        if not torch.isfinite(merged).all():
            raise ValueError(f"the merged weight of {name} must be finite, got NaN or Inf: check {list(adapters)}")
        norm = float(torch.linalg.vector_norm(update, dtype=torch.float64))
        if norm == 0:
            continue
        # a difference is rounded relative to itself, so float32 resolves an error of 1e-7
        wide = torch.promote_types(weight.dtype, torch.float32)
        error = float(torch.linalg.vector_norm(merged.to(wide) - weight.to(wide) - update, dtype=torch.float64))
        modules, lost, total = modules + 1, lost + error**2, total + norm**2
        dtypes.add(str(weight.dtype).removeprefix("torch."))
        if error / norm >= worst_error:
            worst_module, worst_error = name, error / norm
    relative = (lost / total) ** 0.5 if total else 0.0
    dtype = ", ".join(sorted(dtypes)) or "no type"
    report = MergeReport(modules, dtype, relative, worst_module, worst_error)
    if relative > max_error:
        raise ValueError(
            f"max_error must be at least {relative:.2g} to merge in {dtype}: so much of the update would be lost to "
            f"rounding, got {max_error:g}. Merge in float32 (model.float() first), keep the adapter unmerged, or "
            "export it as a plain LoRA"
        )
    return report
