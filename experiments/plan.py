"""Which runs the experiments consist of: the rows of every table, the grid of learning rates, and what all that costs.

Tables share rows: a row has one name in its task, and a run is done once for all tables it is in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from experiments.scale import Scale, Task
from experiments.settings import Experiment
from subspace3d.choices import Method

Source = Literal["attributes", "gradient", "pooled", "random"]
"""attributes: one subspace per attribute; gradient: the same from adapters that start at the gradient; pooled: one
subspace of the adapters of all attributes; random: directions that come from nowhere."""
SPLITS = ("test", "cross", "generic")
VALIDATION = "validation"
HELD_OUT = "held-out"
"""Of the direction experiment: scenes that choose the rate, then those that are measured."""
RATE_SEED = 0

# Seconds on one thread of a process that has a core of its own, measured at nano scale (docs/experiments.md).
SECONDS_PER_STEP = {"adapters": 0.56, "tune": 0.48}
SECONDS_PER_IMAGE = {"attributes": 0.16, "faces": 0.33, "bodies": 0.12, "glass": 0.37, "generic": 0.16}
SECONDS_PER_SCENE_MEASURED = {"faces": 1.5, "bodies": 0.75, "glass": 1.5, "generic": 1.4}


@dataclass(frozen=True)
class Mined:
    """One set of subspace files: of which adapters, and how they were mined."""

    bank: str
    rank: int  # of the adapters
    k: int
    p: float = 1.0  # 2: plain mean
    planted: bool = False  # bad adapters among them
    source: Source = "attributes"

    @property
    def adapters(self) -> str:
        """Below OUT/adapters; random directions need none."""
        return f"{self.bank}-r{self.rank}{'-gradient' * (self.source == 'gradient')}{'-planted' * self.planted}"

    @property
    def folder(self) -> str:
        """Below OUT/subspaces."""
        drawn = f"-{self.source}" * (self.source in ("pooled", "random"))
        return f"{self.adapters}{drawn}{'-mean' * (self.p == 2)}/k{self.k}"


@dataclass(frozen=True)
class Row:
    """One row of a table: a method with everything but learning rate and seed."""

    name: str  # unique in its task
    label: str
    family: str  # rows of one family share their learning rate
    method: Method
    rank: int
    K: int = 0
    mined: Mined | None = None
    attributes: tuple[str, ...] = ()  # of the mined ones; empty: all
    targets: str = "all"  # of the LoRA family
    finds_rate: bool = False  # the row of its family on which the learning rate is chosen
    rate: float = 0.0  # in place of the family's


@dataclass(frozen=True)
class Run:
    """One tuning run."""

    task: Task
    row: Row
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Unique in its task; the name of its folder, and of the method in the evaluation."""
        return f"{self.row.name}_lr{self.rate:g}_s{self.seed}"


def table_rows(scale: Scale, experiment: Experiment, task: Task) -> list[Row]:
    """The rows an experiment has on a task, besides the base model; none where the experiment is not done."""
    if experiment != "tasks" and task != scale.ablated:
        return []
    subspace = {k: _subspace(scale, task, k) for k in scale.ks}
    middle = _middle(scale.ks)
    if experiment == "tasks":
        return _task_rows(scale, task)
    if experiment == "psv":
        return [*(_psv(scale, task, k) for k in scale.ks), *subspace.values()]
    if experiment == "rank":
        high = [_subspace(scale, task, k, rank=scale.high_rank) for k in scale.ks]
        return [*subspace.values(), *high]
    if experiment == "attributes":
        return [subspace[middle], *_without_attributes(scale, task, subspace[middle])]
    if experiment == "source":
        K = middle * len(scale.bank_of(task).attributes)
        gradient = [_subspace(scale, task, k, source="gradient") for k in scale.ks]
        return [
            *subspace.values(),
            *gradient,
            _subspace(scale, task, K, source="pooled"),
            _subspace(scale, task, K, source="random"),
            # the same adapters on the heads, at the same rate, and nothing on the aggregator
            Row(
                "heads",
                "no cores, LoRA on the heads",
                "subspace",
                "lora",
                scale.adapter_rank,
                targets="heads",
                rate=scale.head_rate,
            ),
        ]
    return [_subspace(scale, task, middle, p=p, planted=planted) for planted in (False, True) for p in (1.0, 2.0)]


def all_rows(scale: Scale, experiments: Iterable[Experiment], task: Task) -> list[Row]:
    """Rows of several experiments on a task, each once, as far as the scale has them."""
    rows = {row.name: row for name in experiments for row in table_rows(scale, name, task)}
    return [row for name, row in rows.items() if not scale.rows or name in scale.rows]


def rate_runs(scale: Scale, experiments: Sequence[Experiment]) -> list[Run]:
    """The grid: for each task and family that is run, its middle size at every rate, with the first seed.

    `final_rate_runs` has the other seeds.
    """
    runs = []
    for task in scale.tasks:
        families = {row.family for row in all_rows(scale, experiments, task)}
        finders = [row for row in _task_rows(scale, task) if row.finds_rate and row.family in families]
        runs += [Run(task, row, rate, RATE_SEED) for row in finders for rate in scale.rates]
    return runs


def final_rate_runs(
    grid: Sequence[Run], seeds: int, finalists: Mapping[Task, Mapping[str, Sequence[float]]]
) -> list[Run]:
    """The grid's rows with the other seeds, at the rates that were best with the first.

    Args:
        finalists (Mapping): task -> family -> rates.
    """
    return [
        dataclasses.replace(run, seed=seed)
        for run in grid
        if run.rate in finalists.get(run.task, {}).get(run.row.family, ())
        for seed in range(seeds)
        if seed != run.seed
    ]


def table_runs(
    scale: Scale, experiments: Sequence[Experiment], seeds: int, chosen: Mapping[Task, Mapping[str, float]]
) -> list[Run]:
    """All runs of the tables, seed by seed, so that a run that is cut off has whole tables of fewer seeds.

    Args:
        chosen (Mapping): task -> family -> learning rate; rows of a family without one are left out.
    """
    return [
        Run(task, row, row.rate or chosen[task][row.family], seed)
        for seed in range(seeds)
        for task in scale.tasks
        for row in all_rows(scale, experiments, task)
        if row.family in chosen.get(task, {})
    ]


def mined_sets(scale: Scale, experiments: Sequence[Experiment]) -> list[Mined]:
    """The subspaces that the rows need."""
    rows = [row for task in scale.tasks for row in all_rows(scale, experiments, task)]
    finders = [run.row for run in rate_runs(scale, experiments)]
    return list(dict.fromkeys(row.mined for row in (*rows, *finders) if row.mined is not None))


def analyzed(scale: Scale) -> dict[str, Mined]:
    """Name -> the sets whose spectra and angles are looked at: those of the middle k, of either start of adapters.

    The other start has the ablated task alone, which may be left out.
    """
    k = _middle(scale.ks)
    usual = {bank.name: Mined(bank.name, scale.adapter_rank, k) for bank in scale.banks}
    if scale.ablated not in scale.tasks:
        return usual
    ablated = scale.tasks[scale.ablated]
    return {**usual, f"{ablated}-gradient": dataclasses.replace(usual[ablated], source="gradient")}


@dataclass(frozen=True)
class Cost:
    """A line of the budget: ``count`` jobs of ``steps`` units of work."""

    what: str
    count: int
    unit: str
    steps: int
    seconds_per_step: float

    @property
    def seconds(self) -> float:
        """On one thread, all jobs one after the other."""
        return self.count * self.steps * self.seconds_per_step


def budget(scale: Scale, experiments: Sequence[Experiment], seeds: int) -> list[Cost]:
    """What the runs will cost, by the measured seconds above; divide by the processes that run at a time."""
    sets = mined_sets(scale, experiments)
    grid = rate_runs(scale, experiments)
    chosen = {task: dict.fromkeys({run.row.family for run in grid if run.task == task}, 0.0) for task in scale.tasks}
    tables = table_runs(scale, experiments, seeds, chosen)
    # whichever rates are the best: it is their number that costs
    best = {task: dict.fromkeys(families, scale.rates[: scale.finalists]) for task, families in chosen.items()}
    finals = final_rate_runs(grid, seeds, best)
    # the runs at the chosen rate are those of their row in the tables
    finders = {(run.task, run.row.name) for run in grid}
    again = sum((run.task, run.row.name) in finders for run in tables)
    steps, seconds = scale.tune.steps, SECONDS_PER_STEP["tune"]
    costs = [
        *_render_costs(scale, sets),
        Cost("tune adapters", _count_adapters(scale, sets), "steps", scale.adapt.steps, SECONDS_PER_STEP["adapters"]),
        Cost("learning rates: tune", len(grid), "steps", steps, seconds),
        Cost("learning rates, finalists: tune", len(finals), "steps", steps, seconds),
        *_measure_costs(scale, "learning rates", [*grid, *finals], (VALIDATION,)),
        Cost("tables: tune", len(tables) - again, "steps", steps, seconds),
        *_measure_costs(scale, "tables", tables, SPLITS),
    ]
    return [cost for cost in costs if cost.count]


def _render_costs(scale: Scale, sets: Sequence[Mined]) -> list[Cost]:
    banks = [bank for bank in scale.banks if bank.name in {mined.bank for mined in sets}]
    datasets = scale.datasets * sum(len(bank.attributes) for bank in banks)
    # each call of the generator renders two test splits beside the scenes it is asked for
    scenes = sum(asked + 2 * max(1, asked // 5) for asked in (scale.train_scenes, scale.validation_scenes))
    kinds: list[tuple[str, int, int]] = [
        ("attributes", datasets, scale.attribute_scenes),
        *((task, 1, scenes) for task in scale.tasks),
        ("generic", 1, scale.generic_scenes),
    ]
    return [
        Cost(f"render {kind}", count, "images", number * scale.views[kind], SECONDS_PER_IMAGE[kind])
        for kind, count, number in kinds
    ]


def _count_adapters(scale: Scale, sets: Sequence[Mined]) -> int:
    attributes = {bank.name: len(bank.attributes) for bank in scale.banks}
    kinds = {(mined.bank, mined.rank, mined.source == "gradient") for mined in sets if mined.source != "random"}
    good = sum(scale.datasets * attributes[bank] for bank, _, _ in kinds)
    return good + sum(attributes[bank] for bank in {mined.bank for mined in sets if mined.planted})


def _measure_costs(scale: Scale, what: str, runs: Sequence[Run], splits: Sequence[str]) -> list[Cost]:
    costs = []
    for task in scale.tasks:
        sizes = {split: scale.test_scenes(split) for split in splits}
        total = sum(
            count * SECONDS_PER_SCENE_MEASURED["generic" if split == "generic" else task]
            for split, count in sizes.items()
        )
        scenes = sum(sizes.values())
        count = sum(run.task == task for run in runs)
        costs.append(Cost(f"{what}: measure {task}", count, "scenes", scenes, round(total / scenes, 2)))
    return costs


def _task_rows(scale: Scale, task: Task) -> list[Row]:
    """Tables 1, 2 and 3, with the same methods in all of them."""
    middle_k = _middle(scale.ks)
    rows = [Row("full", "full", "full", "full", scale.adapter_rank, finds_rate=True)]
    lora: tuple[tuple[str, Method, tuple[int, ...]], ...] = (
        ("LoRA", "lora", scale.ranks),
        ("PiSSA", "pissa", scale.ranks),
        ("AdaLoRA", "adalora", scale.adalora_ranks),
    )
    for label, method, ranks in lora:
        rows += [
            Row(f"{method}-{rank}", f"{label} r = {rank}", method, method, rank, finds_rate=rank == _middle(ranks))
            for rank in ranks
        ]
    rows.append(dataclasses.replace(_psv(scale, task, middle_k), finds_rate=True))
    rows += [dataclasses.replace(_subspace(scale, task, k), finds_rate=k == middle_k) for k in scale.ks]
    return rows


def _middle(sizes: Sequence[int]) -> int:
    return sizes[len(sizes) // 2]


def _psv(scale: Scale, task: Task, k: int) -> Row:
    """As large a core as the mined subspaces of k directions per attribute have together."""
    K = k * len(scale.bank_of(task).attributes)
    return Row(f"psv-{K}", f"PSV K = {K}", "psv", "psv", scale.adapter_rank, K=K)


def _subspace(
    scale: Scale,
    task: Task,
    k: int,
    rank: int = 0,
    p: float = 1.0,
    planted: bool = False,
    source: Source = "attributes",
) -> Row:
    """The method with all attributes of the task's bank; ``rank`` 0: that of the usual adapters."""
    mined = Mined(scale.tasks[task], rank or scale.adapter_rank, k, p, planted, source)
    if source in ("pooled", "random"):
        label = {"pooled": "one subspace of all adapters", "random": "random directions"}[source]
        return Row(f"{source}-{k}", f"{label}, K = {k}", "subspace", "subspace", scale.adapter_rank, mined=mined)
    name, label = f"subspace-{k}", f"subspace k = {k}"
    if mined.rank != scale.adapter_rank:
        name, label = f"{name}-r{rank}", f"{label}, adapters r = {rank}"
    if source == "gradient":
        name, label = f"{name}-gradient", f"{label}, adapters started at the gradient"
    if p == 2:
        name, label = f"{name}-mean", f"{label}, plain mean"
    if planted:
        name, label = f"{name}-planted", f"{label}, bad adapters planted"
    return Row(name, label, "subspace", "subspace", scale.adapter_rank, mined=mined)


def _without_attributes(scale: Scale, task: Task, whole: Row) -> list[Row]:
    """Each attribute left out, and as a control all of them cut to the same K."""
    assert whole.mined is not None
    attributes = scale.bank_of(task).attributes
    K = whole.mined.k * (len(attributes) - 1)
    rows = [dataclasses.replace(whole, name=f"{whole.name}-K{K}", label=f"all attributes, cut to K = {K}", K=K)]
    for left_out in attributes:
        kept = tuple(name for name in attributes if name != left_out)
        label = f"without {left_out}, K = {K}"
        rows.append(dataclasses.replace(whole, name=f"{whole.name}-no-{left_out}", label=label, attributes=kept))
    return rows
