"""The tables of the results page, in Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from experiments.claims import TASK_NAMES, Claim, Comparison, Results
from experiments.plan import RATE_SEED, Cost, table_rows
from experiments.results import MAIN, METRICS, Outcome, RowResult, Stat, TaskResults, summarize
from experiments.scale import Scale
from experiments.settings import Experiment
from subspace3d.evaluation.table import METRICS as SHOWN


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def task_table(task: TaskResults, scale: Scale, experiment: Experiment) -> str:
    """Both tests side by side, forgetting and cost; the best mean of each column in bold."""
    rows = shown_rows(task, scale, experiment)
    columns = [(split, metric) for split in ("test", "cross") for metric in METRICS] + [("generic", "abs_rel")]
    stats = [[row.stat(*column) for column in columns] for row in rows]
    best = [_best([line[index] for line in stats], metric) for index, (_, metric) in enumerate(columns)]
    head = ["", "trained"]
    for prefix in ("", "cross: "):
        head += [f"{prefix}{SHOWN[metric].label} {arrow(metric)}" for metric in METRICS]
    head += [f"generic: {SHOWN['abs_rel'].label} ↓", "seeds", "rate", "seconds", "MiB"]
    body = []
    for row, line in zip(rows, stats):
        cells = [_bold(number(stat), stat is not None and stat.mean == top) for stat, top in zip(line, best)]
        body.append([row.label, *_size(row), *cells, *_costs(row)])
    return markdown(head, body)


def shown_rows(task: TaskResults, scale: Scale, experiment: Experiment) -> list[RowResult]:
    """The base model and the rows of an experiment that have been run; the page names the others."""
    rows = [task.rows[row.name] for row in table_rows(scale, experiment, task.task)]
    return [task.base, *(row for row in rows if row.seeds or row.diverged)]


def short_table(results: Results, scale: Scale) -> str:
    """The `MAIN` error on the in-domain test: base, the middle size of each family, and LoRA of the least rank."""
    columns = {
        name: {label_of(row): row for row in shown_rows(task, scale, "tasks") if _is_short(row, task, scale)}
        for name, task in results.items()
    }
    names = list(dict.fromkeys(label for column in columns.values() for label in column))
    body = []
    for label in names:
        rows = [column.get(label) for column in columns.values()]
        sizes = sorted({cost.mean for row in rows if row and (cost := row.cost("trainable"))})
        size = "" if not sizes else f"{sizes[0]:,.0f}" + (f" to {sizes[-1]:,.0f}" if len(sizes) > 1 else "")
        cells = []
        for row, column in zip(rows, columns.values()):
            stats = [known for other in column.values() if (known := other.stat("test", MAIN))]
            stat = row.stat("test", MAIN) if row else None
            cells.append(_bold(number(stat), stat is not None and stat.mean == min(each.mean for each in stats)))
        body.append([label, size, *cells])
    return markdown(["", "trained", *(f"{TASK_NAMES[name]} ↓" for name in results)], body)


def _is_short(row: RowResult, task: TaskResults, scale: Scale) -> bool:
    short = {each.name for each in table_rows(scale, "tasks", task.task) if each.finds_rate}
    return row.row is None or row.row.name in {*short, f"lora-{min(scale.ranks)}"}


def label_of(row: RowResult) -> str:
    """As in the short table, where PSV has one row although its K depends on the number of attributes."""
    return "PSV" if row.row and row.row.method == "psv" else row.label


def rates_table(task: TaskResults, scale: Scale) -> str:
    """The grid: error on the validation scenes at every rate, of finalists mean and spread; the chosen one in bold."""
    body = []
    for choice in task.choices.values():
        cells = []
        for rate in scale.rates:
            errors = choice.errors.get(rate, {})
            if rate not in choice.finalists:
                errors = {seed: error for seed, error in errors.items() if seed == RATE_SEED}
            text = "diverged" if None in errors.values() else number(summarize(errors.values()))
            cells.append(_bold(text, rate == choice.rate))
        note = "not finished" if not choice.complete else "edge of the grid" if choice.at_edge else ""
        body.append([choice.row, *cells, note])
    return markdown(["tuned", *(f"{rate:g}" for rate in scale.rates), ""], body)


def claim_table(claim: Claim) -> str:
    """What a claim's verdict comes from."""
    body = [[part.what, *(_outcome(part, metric) for metric in METRICS), part.verdict] for part in claim.comparisons]
    table = markdown(["", *(SHOWN[metric].label for metric in METRICS), ""], body) if body else ""
    checks = "\n".join(f"- {check.sentence}: {check.verdict}" for check in claim.checks)
    return "\n\n".join(part for part in (table, checks) if part)


def budget_table(costs: Sequence[Cost]) -> str:
    body = [
        [
            cost.what,
            str(cost.count),
            f"{cost.steps} {cost.unit}",
            f"{cost.seconds_per_step:g}",
            f"{cost.seconds / 60:.0f}",
        ]
        for cost in costs
    ]
    total = sum(cost.seconds for cost in costs) / 60
    body.append(["sum", "", "", "", f"{total:.0f}, on two cores {total / 2:.0f}"])
    return markdown(["", "jobs", "each", "s per unit", "minutes of one core"], body)


def number(stat: Stat | None) -> str:
    """``0.0412 ± 0.0007``: three digits of the mean, the spread to the same place."""
    if stat is None:
        return "–"
    places = max(0, 2 - math.floor(math.log10(abs(stat.mean)))) if stat.mean else 2
    spread = f" ± {stat.spread:.{places}f}" if stat.spread is not None else ""
    return f"{stat.mean:.{places}f}{spread}"


def arrow(metric: str) -> str:
    return "↓" if SHOWN[metric].lower_is_better else "↑"


def _best(stats: Sequence[Stat | None], metric: str) -> float | None:
    known = [stat.mean for stat in stats if stat is not None]
    return None if not known else min(known) if SHOWN[metric].lower_is_better else max(known)


def _bold(text: str, bold: bool) -> str:
    return f"**{text}**" if bold else text


def _size(row: RowResult) -> list[str]:
    cost = row.cost("trainable")
    return [f"{cost.mean:,.0f}" if cost else "–"]


def _costs(row: RowResult) -> list[str]:
    if row.row is None:
        return ["", "", "", ""]
    seconds, size = row.cost("seconds"), row.cost("bytes")
    diverged = f", {len(row.diverged)} diverged" if row.diverged else ""
    failed = f", {row.failed} scenes failed" if row.failed else ""
    return [
        f"{row.seeds}{diverged}{failed}",
        f"{row.rate:g}" if row.rate else "–",
        f"{seconds.mean:.0f}" if seconds else "–",
        f"{size.mean / 2**20:.0f}" if size else "–",
    ]


def _outcome(part: Comparison, metric: str) -> str:
    outcome: Outcome = part.outcomes[metric]
    if math.isnan(outcome.low):
        return "unknown"
    word = f"{outcome.word}{', alike' * outcome.alike}"
    return f"{word} ({outcome.difference:+.2g} [{outcome.low:+.2g}, {outcome.high:+.2g}])"
