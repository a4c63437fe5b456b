"""Which bases are compared, at which sizes, rates and seeds, and what that costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from experiments.scale import Scale, Task

BASES: dict[str, str] = {
    "random-0": "random directions, first draw",
    "psv": "singular vectors of the weights",
    "mean": "tuned adapters, model mean",
    "shared": "tuned adapters, model shared",
    "gradient": "gradients of the attribute data sets, model shared",
    "joined": "both: U of both, V of the gradients",
    "pooled": "tuned adapters of all attributes in one",
    "own": "gradient of the task's own training scenes",
    "random-1": "random directions, second draw",
    "random-2": "random directions, third draw",
    "permuted": "model mean, each block's basis in another block",
    "u-mined": "U of model mean, V random",
    "v-mined": "V of model mean, U random",
    "mean-only": "the one leading direction of all tuned adapters (K = 1)",
}
"""Name -> what it is. The first eight are measured at every K."""
CONTROLS = ("random-1", "random-2", "permuted", "u-mined", "v-mined", "mean-only")
"""Measured at the main K alone."""
FEW_SHOT = ("random-0", "psv", "mean", "gradient", "own")
FAMILY = {"random-1": "random-0", "random-2": "random-0"}
"""Draws of one kind share a learning rate."""
RATE_SEED = 0
SECONDS_PER_RUN = 45.0
"""Of a run at nano scale, with its measurements, on one thread of a core of its own."""


@dataclass(frozen=True)
class Sizes:
    """How much of everything.

    Attributes:
        main: the K of the claims, with all seeds and the controls.
        others: further K, with two seeds.
        wide: still further K, on the ablated task alone, with the first seed.
        rates: of AdamW.
        steps: at which the held-out loss is measured; the last is the length of a run.
        shots: numbers of training scenes, fewer than all.
        held_out: scenes per task that are not trained on; the first half chooses the rate, the other is measured.
        gradient_rank: of gradient adapters.
        batches: whose gradient the energies are taken on, in two halves.
    """

    main: int
    others: tuple[int, ...]
    wide: tuple[int, ...]
    rates: tuple[float, ...]
    steps: tuple[int, ...]
    shots: tuple[int, ...]
    held_out: int
    gradient_rank: int
    batches: int


SIZES = {
    "nano": Sizes(8, (4, 16), (2, 32), (3e-3, 1e-2, 3e-2), (5, 10, 20, 40, 90), (1, 3, 10), 32, 8, 8),
    "smoke": Sizes(2, (1,), (), (1e-3, 1e-2), (1, 2), (1,), 2, 2, 2),
}


@dataclass(frozen=True)
class Run:
    """One tuning run of cores alone."""

    task: Task
    basis: str
    K: int
    rate: float
    seed: int
    scenes: int = 0  # of the training scenes the first so many; 0: all

    @property
    def name(self) -> str:
        """Unique in its task."""
        few = f"_n{self.scenes}" if self.scenes else ""
        return f"{self.basis}_K{self.K}{few}_lr{self.rate:g}_s{self.seed}"

    @property
    def cell(self) -> Cell:
        return Cell(self.task, self.basis, self.K)


@dataclass(frozen=True)
class Cell:
    """What has one learning rate of its own."""

    task: Task
    basis: str
    K: int

    @property
    def finder(self) -> Cell:
        """The cell whose rate is used."""
        return replace(self, basis=FAMILY.get(self.basis, self.basis))


def cells(scale: Scale, sizes: Sizes, bases: Sequence[str] = (), only: Sequence[int] = ()) -> list[Cell]:
    """Everything that is compared, of these bases and K (none: all)."""
    found = []
    for task in scale.tasks:
        wide = sizes.wide if task == scale.ablated else ()
        for K in (sizes.main, *sizes.others, *wide):
            for basis in BASES:
                if basis in CONTROLS and sizes.main != K:
                    continue
                found.append(Cell(task, basis, 1 if basis == "mean-only" else K))
    kept = [cell for cell in found if not bases or cell.basis in bases]
    return [cell for cell in kept if not only or cell.K in only or (cell.basis == "mean-only" and sizes.main in only)]


def rate_runs(chosen: Iterable[Cell], sizes: Sizes) -> list[Run]:
    """Every rate with the first seed."""
    finders = dict.fromkeys(cell.finder for cell in chosen)
    return [Run(cell.task, cell.basis, cell.K, rate, RATE_SEED) for cell in finders for rate in sizes.rates]


def final_runs(
    scale: Scale, chosen: Sequence[Cell], sizes: Sizes, seeds: int, rates: Mapping[Cell, float]
) -> list[Run]:
    """The seeds at the chosen rate, seed by seed, then few shots; cells whose rate is not known are left out."""
    runs = []
    for seed in range(seeds):
        for cell in chosen:
            at_main = sizes.main == cell.K or cell.basis == "mean-only"
            count = seeds if at_main else 2 if cell.K in sizes.others else 1
            if seed < count and cell.finder in rates:
                runs.append(Run(cell.task, cell.basis, cell.K, rates[cell.finder], seed))
    for seed in range(seeds):
        for cell in chosen:
            few = cell.task == scale.ablated and sizes.main == cell.K and cell.basis in FEW_SHOT
            if few and cell.finder in rates:
                runs += [Run(cell.task, cell.basis, cell.K, rates[cell.finder], seed, n) for n in sizes.shots]
    return runs


def core_hours(scale: Scale, chosen: Sequence[Cell], sizes: Sizes, seeds: int) -> float:
    """Of a whole run, by `SECONDS_PER_RUN`."""
    rates = {cell.finder: sizes.rates[0] for cell in chosen}
    runs = {
        (run.task, run.name) for run in (*rate_runs(chosen, sizes), *final_runs(scale, chosen, sizes, seeds, rates))
    }
    return len(runs) * SECONDS_PER_RUN / 3600
