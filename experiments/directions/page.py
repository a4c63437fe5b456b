"""docs/directions.md's generated part: tables and verdicts, from the records alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.claims import TASK_NAMES
from experiments.directions.plan import BASES, CONTROLS, Cell, Sizes
from experiments.directions.results import (
    ORDERS,
    Answer,
    Records,
    Summary,
    after,
    answers,
    area,
    final,
    forgetting_at,
    order_by_energy,
)
from experiments.page import replace_block
from experiments.paired import ALPHA, Paired
from experiments.scale import Task
from experiments.tables import markdown
from subspace3d.files import write_text

MARKERS = ("<!-- directions: written by python -m experiments.directions -->", "<!-- /directions -->")
ORDER_STEP = 40
Shots = Mapping[tuple[str, int], Mapping[int, Mapping[str, Any]]]
"""(basis, training scenes) -> seed -> record, of the ablated task."""


def render(
    records: Records,
    grid: Mapping[float, Records],
    energies: Mapping[Task, Mapping[str, Mapping[str, float]]],
    shots: Shots,
    sizes: Sizes,
    tasks: Sequence[Task],
    smoke: bool = False,
) -> str:
    """The block, in Markdown; what has not been run is left out or named.

    Args:
        records (Records): every cell at its own rate.
        grid (Mapping): rate -> every cell at that rate, first seed.
    """
    if not records:
        return "The direction experiment (`python -m experiments.directions`) has not been run on these weights yet."
    found = answers(records, sizes, tasks)
    parts = ["**Smoke scale: the numbers mean nothing.**"] if smoke else []
    parts += [verdict_sentence(found), "### Answers", _answers(found), *_order(records, grid, energies, sizes)]
    for task in tasks:
        for K in sorted({cell.K for cell in records if cell.task == task and cell.basis != "mean-only"}):
            parts += [f"### {TASK_NAMES[task]}, K = {K}", _table(records, energies.get(task, {}), task, K, sizes)]
    if shots:
        parts += ["### Few scenes", _few(shots, records, sizes)]
    return "\n\n".join(parts)


def verdict_sentence(found: Sequence[Answer]) -> str:
    together = [answer for answer in found if answer.task is None]
    counts = {word: sum(answer.verdict == word for answer in together) for word in ("holds", "contradicted")}
    scenes = min((answer.pairs.count for answer in together), default=0)
    few = "" if 2 * len(together) / 2**scenes <= ALPHA else f" {scenes} scenes are too few to show anything of so many."
    return (
        f"{len(together)} questions about the held-out loss, cores alone, heads frozen: {counts['holds']} shown, "
        f"{counts['contradicted']} shown the other way round, the others not decided (differences scene by scene over "
        f"the means of the seeds, sign flips, Holm over all).{few}"
    )


def _answers(found: Sequence[Answer]) -> str:
    head = ["question", "scenes", "difference of loss (95 % BCa)", "depth part", "camera part"]
    together = [answer for answer in found if answer.task is None]
    tables = [
        markdown([*head, "p", "p (Holm)", ""], [[*_row(a), f"{a.adjusted:.3f}", f"**{a.verdict}**"] for a in together])
    ]
    single = [answer for answer in found if answer.task is not None]
    if single:
        rows = [[TASK_NAMES[a.task], *_row(a), a.verdict] for a in single if a.task is not None]
        tables += ["By task, each interval on its own:", markdown(["task", *head, "p", ""], rows)]
    return "\n\n".join([*tables, "Negative: the first is better."])


def _row(answer: Answer) -> list[str]:
    parts = [_difference(pairs) for pairs in (answer.pairs, answer.depth, answer.camera)]
    return [answer.question.text, f"{answer.pairs.count}", *parts, f"{answer.pairs.p:.3f}"]


def _difference(pairs: Paired) -> str:
    ends = "" if pairs.low is None or pairs.high is None else f" [{pairs.low:+.3f}, {pairs.high:+.3f}]"
    return f"{pairs.mean:+.3f}{ends}"


def _order(
    records: Records,
    grid: Mapping[float, Records],
    energies: Mapping[Task, Mapping[str, Mapping[str, float]]],
    sizes: Sizes,
) -> list[str]:
    step = ORDER_STEP if ORDER_STEP in sizes.steps else sizes.steps[-1]
    found = {"its own": order_by_energy(records, energies, sizes.main, step)}
    found |= {f"{rate:g}": order_by_energy(at, energies, sizes.main, step) for rate, at in sorted(grid.items())}
    rows = []
    for task in found["its own"]:
        for rate, by_task in found.items():
            if task not in by_task:
                continue
            terms, count = by_task[task]
            word = "too few bases" if count < 8 else "holds" if terms["loss"] > ORDERS else "does not hold"
            cells = ["–" if math.isnan(value) else f"{value:.2f}" for value in terms.values()]
            rows.append([TASK_NAMES[task], rate, f"{count}", *cells, word])
    if not rows:
        return []
    what = (
        f"Spearman rank correlation of energy inside and held-out loss, {step} steps, K = {sizes.main}; each "
        "basis at the rate chosen for it, and all at one rate with the first seed:"
    )
    head = ["task", "rate", "bases", "loss", "depth part", "camera part", f"loss above {ORDERS:g}"]
    return ["### Does the energy order the bases?", what, markdown(head, rows)]


def _table(records: Records, energies: Mapping[str, Mapping[str, float]], task: Task, K: int, sizes: Sizes) -> str:
    head = ["basis", "energy core / U / V", *(f"loss, {step}" for step in sizes.steps), "area", "depth", "camera"]
    head += ["generic at equal loss", "update / weight", "seeds", "rate"]
    level = _common_level(records, task, K)
    body = []
    for basis, label in BASES.items():
        seeds = records.get(Cell(task, basis, K)) or {}
        if basis == "mean-only" and sizes.main == K:
            seeds = records.get(Cell(task, basis, 1)) or {}
        if not seeds or (basis in CONTROLS and sizes.main != K):
            continue
        runs = list(seeds.values())
        share = energies.get(f"{basis} {runs[0]['run']['K']}")
        forgot = [value for run in runs if (value := forgetting_at(run, level)) is not None]
        body.append(
            [
                label,
                "–" if share is None else " / ".join(f"{share[side]:.3g}" for side in ("core", "U", "V")),
                *(str(Summary([_at(run, step) for run in runs])) for step in sizes.steps),
                str(Summary([area(run) for run in runs])),
                str(Summary([final(run, "depth") for run in runs])),
                str(Summary([final(run, "camera") for run in runs])),
                str(Summary(forgot)),
                f"{statistics.fmean(run['update_norm'] / run['weight_norm'] for run in runs):.3f}",
                f"{len(runs)}",
                f"{runs[0]['run']['rate']:g}",
            ]
        )
    return markdown(head, body)


def _at(record: Mapping[str, Any], step: int) -> float:
    return math.inf if record["diverged"] or str(step) not in record["curve"] else after(record, step)


def _common_level(records: Records, task: Task, K: int) -> float:
    """The least held-out loss that every run of the table reaches: there forgetting is compared."""
    runs = [run for cell, seeds in records.items() if (cell.task, cell.K) == (task, K) for run in seeds.values()]
    reached = [min(after(run, step) for step in (0, *run["steps"])) for run in runs if not run["diverged"]]
    return max(reached, default=math.inf)


def _few(shots: Shots, records: Records, sizes: Sizes) -> str:
    counts = sorted({count for _, count in shots})
    bases = [basis for basis in BASES if any(name == basis for name, _ in shots)]
    task = next(iter(next(iter(shots.values())).values()))["run"]["task"]
    body = []
    for basis in bases:
        whole = records.get(Cell(task, basis, sizes.main)) or {}
        cells = [str(Summary([final(run) for run in shots.get((basis, count), {}).values()])) for count in counts]
        body.append([BASES[basis], *cells, str(Summary([final(run) for run in whole.values()]))])
    heads = [f"{count} scene{'s' * (count != 1)}" for count in counts]
    return f"{TASK_NAMES[task]}, K = {sizes.main}:\n\n" + markdown(["basis", *heads, "all"], body)


def write(path: Path, block: str, published: Path | None) -> None:
    """Write the block as a page of its own, and between the markers of docs/directions.md of a checkout."""
    write_text(path, f"# Do the directions matter?\n\n{block}\n")
    if published is not None:
        page = published / "docs" / "directions.md"
        write_text(page, replace_block(page.read_text(encoding="utf-8"), MARKERS, block))
