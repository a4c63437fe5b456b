"""Which model of sharing adapters follow, and how many directions they share, held against unrelated adapters.

The null of unrelated adapters: every adapter keeps its singular values, and its singular vectors are drawn anew, each
adapter's on its own. What such adapters seem to share is chance.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import torch

import subspace_ext
from subspace3d.mining.stacks import (
    Factors,
    Group,
    batches,
    energy,
    group_modules,
    largest_rank,
    leave_one_out,
    projected_energy,
    stack,
)
from subspace3d.progress import Progress

Model = Literal["mean", "shared"]
MODELS: tuple[Model, ...] = ("mean", "shared")
WIDEST = 64
"""Most directions that are looked at where their number is chosen."""
DRAWS = 19
"""Sets of unrelated adapters that a spectrum is held against: one in twenty modules without anything shared gets a
direction by chance."""


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Energy of an adapter inside what the others share, mean over adapters, all modules together.

    Attributes:
        shares: model -> share.
        unrelated: model -> the same of unrelated adapters of the same singular values.
    """

    shares: dict[str, float]
    unrelated: dict[str, float]

    @property
    def best(self) -> Model:
        """The model with the larger share; of equals the mean, which is the simpler one."""
        return "shared" if self.shares["shared"] > self.shares["mean"] else "mean"

    def sentence(self) -> str:
        other: Model = "mean" if self.best == "shared" else "shared"
        what = {"mean": "one mean update", "shared": "one subspace, each with its own core"}
        own = self.shares[self.best]
        if own <= self.unrelated[self.best]:
            return (
                f"the adapters share nothing that the model {self.best} sees: of an adapter left out {own:.1%} lies in "
                f"what the others share, of unrelated adapters of the same norms {self.unrelated[self.best]:.1%}"
            )
        return (
            f"the adapters share {what[self.best]} (model {self.best}): of an adapter left out {own:.1%} lies in what "
            f"the others share, by the model {other} {self.shares[other]:.1%}; of unrelated adapters of the same norms "
            f"{self.unrelated[self.best]:.1%}"
        )


def rotated(
    lora_b: torch.Tensor, lora_a: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unrelated adapters: ``O_n delta_n P_n`` with uniformly random orthogonal O_n and P_n.

    Args:
        lora_b: ``[L, N, out, r]`` float64.
        lora_a: ``[L, N, r, in]`` float64.
        generator: of the draws.
    """
    sides = []
    for factor in (lora_b, lora_a.mT):
        # only the columns of O_n that meet the factor's span count, and these are uniform on their own
        q = torch.linalg.qr(torch.randn(factor.shape, generator=generator, dtype=torch.float64))[0]
        sides.append(q.to(factor.device) @ torch.linalg.qr(factor)[1])
    return sides[0], sides[1].mT


def compare_models(
    factors: Mapping[str, Factors], k: int, settings: Mapping[str, Any], seed: int = 0
) -> HeldOut | None:
    """Leave every adapter out in turn, by both models, of the adapters and of unrelated ones.

    Args:
        factors: module -> the adapters' (lora_b, lora_a).
        k: rank of the subspace; less where the adapters that are left have less.
        settings: p, eps, max_iter and tol of `subspace_ext.mine_subspace`.
        seed: of the unrelated adapters.

    Returns:
        None for a single adapter.
    """
    count = len(next(iter(factors.values())))
    if count < 2:
        return None
    generator = torch.Generator().manual_seed(seed)
    inside = {(which, model): torch.zeros(count, dtype=torch.float64) for which in (0, 1) for model in MODELS}
    whole = torch.zeros(count, dtype=torch.float64)
    with Progress("compare models of sharing", len(factors), "module") as progress:
        for group, names in group_modules(factors, k).items():
            for batch in batches(group, names, count):
                pair = stack(group, [factors[name] for name in batch])
                whole += energy(*pair).sum(0)
                for which, (b, a) in enumerate((pair, rotated(*pair, generator))):
                    for model in MODELS:
                        inside[which, model] += _left_out(b, a, group, model, settings)
                progress.advance(len(batch))
    used = whole > 0

    def mean(which: int) -> dict[str, float]:
        return {model: float((inside[which, model][used] / whole[used]).mean()) for model in MODELS}

    return HeldOut(mean(0), mean(1)) if bool(used.any()) else None


def _left_out(
    b: torch.Tensor, a: torch.Tensor, group: Group, model: Model, settings: Mapping[str, Any]
) -> torch.Tensor:
    """Energy of each adapter in what the others share, summed over the layers: ``[N]``."""
    found = [
        projected_energy(left_b, left_a, mined.u, mined.v).sum()
        for left_b, left_a, mined in leave_one_out(group, b, a, {**settings, "model": model})
    ]
    return torch.stack(found).cpu()


def choose_k(
    factors: Mapping[str, Factors], model: Model, settings: Mapping[str, Any], draws: int = DRAWS, seed: int = 0
) -> dict[str, int]:
    """Module -> how many leading singular values stand above those of unrelated adapters; 0: none does.

    The j-th singular value (`MinedSubspace.singular_values`) counts while it and all before it are larger than the
    j-th of each of ``draws`` sets of unrelated adapters (Horn's parallel analysis). Mined up to `WIDEST` directions.
    """
    count = len(next(iter(factors.values())))
    generator = torch.Generator().manual_seed(seed)
    chosen: dict[str, int] = {}
    with Progress("choose k", len(factors), "module") as progress:
        for group, names in group_modules(factors, min(WIDEST, largest_rank(factors))).items():
            for batch in batches(group, names, count):
                b, a = stack(group, [factors[name] for name in batch])
                values = subspace_ext.mine_subspace(b, a, group.k, model=model, **settings).singular_values
                above = torch.ones_like(values[:, : group.k], dtype=torch.bool)
                for _ in range(draws):
                    null = subspace_ext.mine_subspace(*rotated(b, a, generator), group.k, model=model, **settings)
                    above &= values[:, : group.k] > null.singular_values[:, : group.k]
                for name, row in zip(batch, above.long().cumprod(1).sum(1).tolist()):
                    chosen[name] = int(row)
                progress.advance(len(batch))
    return chosen


def sharing(chosen: Mapping[str, int]) -> str:
    """What `choose_k` found, in words."""
    kept = sorted(max(1, k) for k in chosen.values())
    none = sum(k == 0 for k in chosen.values())
    nothing = f"; {none} of {len(kept)} modules share nothing beyond chance and keep one direction" if none else ""
    return f"k by module: {kept[0]} to {kept[-1]}, median {kept[len(kept) // 2]}{nothing}"
