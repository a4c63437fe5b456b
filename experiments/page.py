"""The page of results: docs/results.md, the two figures, and the block in the README. All of it is generated.

What is kept of an earlier page are its notes, which people write: the text between the markers ``notes``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import tables
from experiments.claims import TABLES, TASK_NAMES, Claim, Results, further_claims, paper_claims
from experiments.figures import draw_parameters, draw_rows
from experiments.layout import Layout
from experiments.paired import ALPHA
from experiments.plan import budget
from experiments.results import MAIN, MARGIN, RowResult, load
from experiments.scale import Scale
from experiments.settings import EXPERIMENTS
from subspace3d import outputs
from subspace3d.evaluation.table import METRICS as SHOWN
from subspace3d.files import atomic_path, read_json, write_text
from subspace3d.reporting.figures import to_png

FIGURES = {
    "results-parameters": (draw_parameters, "error against trainable parameters"),
    "results-rows": (draw_rows, "every row with its spread over seeds"),
}
TITLES = {
    "psv": "Table 4: mined subspaces or singular vectors of the weights",
    "rank": "Table 5: rank of the mined adapters",
    "attributes": "Each attribute left out",
    "source": "Where the directions come from",
    "mining": "Mining by IRLS or by the plain mean, with bad adapters planted",
}
PLANNED_SEEDS = 3
_NOTES = ("<!-- notes: kept when this page is written again -->", "<!-- /notes -->")
_README = ("<!-- results: written by make experiments -->", "<!-- /results -->")


def write(layout: Layout, scale: Scale, failures: Mapping[str, str], publish: Path | None) -> Path:
    """Write OUT/results.md and its figures, and the same into a checkout of the project; returns the former."""
    results = load(layout, scale)
    images = {}
    for name, (draw, _) in FIGURES.items():
        figure = draw(results, scale)
        if figure is not None:
            images[name] = to_png(figure)
    context = _read(layout, scale)
    paper = paper_claims(results, scale, context["analysis"])
    text = render(results, scale, paper, context, failures, tuple(images))
    path = layout.out / "results.md"
    _write_page(path, text, images)
    if publish is not None:
        _write_page(publish / "docs" / "results.md", text, images)
        readme = publish / "README.md"
        block = readme_block(results, scale, paper, tuple(images))
        write_text(readme, replace_block(readme.read_text(encoding="utf-8"), _README, block))
    return path


_PAGE = outputs.Kind(
    "a page of results", False, lambda path: _NOTES[0] in path.read_text(encoding="utf-8", errors="replace")
)


def _write_page(path: Path, text: str, images: Mapping[str, bytes]) -> None:
    path = outputs.claim(path, _PAGE, "out")
    notes = ""
    if path.is_file():
        notes = read_block(path.read_text(encoding="utf-8"), _NOTES)
    write_text(path, replace_block(text, _NOTES, notes))
    for name in FIGURES:
        target = path.parent / "images" / f"{name}.png"
        if name in images:
            with atomic_path(target) as temporary:
                temporary.write_bytes(images[name])
        else:
            target.unlink(missing_ok=True)


def _read(layout: Layout, scale: Scale) -> dict[str, Any]:
    """What stands beside the results: starts, mining, analyses of the ablated task's subspaces."""
    usual = scale.tasks[scale.ablated]
    paths = {
        "run": layout.out / "experiments.json",
        "mining": layout.out / "mining.json",
        "analysis": layout.analysis(usual),
        "gradient": layout.analysis(f"{usual}-gradient"),
    }
    return {key: read_json(path) if path.is_file() else None for key, path in paths.items()}


def render(
    results: Results,
    scale: Scale,
    paper: Sequence[Claim],
    context: Mapping[str, Any],
    failures: Mapping[str, str],
    images: Sequence[str],
) -> str:
    """The page as Markdown, from measured numbers alone; notes are left empty."""
    parts = [
        "# Results",
        "Written by `make experiments` from the result files; everything but the notes is replaced when it runs again. "
        "[How the experiments are set up](experiments.md).",
        _what_was_run(context["run"], scale),
        _missing(results),
        "## Which of the paper's claims hold at this scale",
        _method_of_judgement(),
        summary(paper),
        _claims(paper),
        "## Further questions",
        _claims(further_claims(results, scale, context["mining"], context["analysis"], context["gradient"])),
        "## Notes\n\n" + "\n".join(_NOTES),
        "## Pictures" if images else "",
        *(f"![{FIGURES[name][1]}](images/{name}.png)" for name in images),
        *_table_sections(results, scale),
        *_rate_sections(results, scale),
        _budget(scale, results),
        _failures(failures),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _what_was_run(run: Mapping[str, Any] | None, scale: Scale) -> str:
    starts = run["starts"] if run else []
    if not starts:
        return "**The experiments have not been run yet.** The plan is at the end of this page."
    first: dict[tuple[str, str, str], Mapping[str, Any]] = {}
    for start in starts:
        first.setdefault((start["command"], start["commit"], start["device"]), start)
    listed = [
        f"- `{start['command']}`, commit {start['commit']}, {start['time']}, {start['device']}, torch {start['torch']}"
        for start in first.values()
    ]
    more = f" {len(starts)} starts, of each kind the first:" if len(starts) > len(listed) else ""
    warning = "\n\n**Smoke scale: the numbers mean nothing.**" if scale.name == "smoke" else ""
    weights = f"vggt-nano, sha256 of the weights {run['weights'][:12]}" if run else ""
    return f"{weights}; {scale.name} scale.{more}\n\n" + "\n".join(listed) + warning


def _missing(results: Results) -> str:
    """Which rows have no or fewer runs than others; nothing is said about them below."""
    most = max((row.seeds for task in results.values() for row in task.rows.values()), default=0)
    lines = []
    for task in results.values():
        absent = [row.label for row in task.rows.values() if not row.seeds and not row.diverged]
        fewer = [row for row in task.rows.values() if row.seeds and row.seeds + len(row.diverged) < most]
        if len(absent) == len(task.rows):
            lines.append(f"- {TASK_NAMES[task.task]}: nothing")
        elif absent:
            lines.append(f"- {TASK_NAMES[task.task]}: {', '.join(absent)}")
        if fewer:
            listed = ", ".join(f"{row.label} ({row.seeds} of {most} seeds)" for row in fewer)
            lines.append(f"- {TASK_NAMES[task.task]}, in part: {listed}")
    if most == 1:
        lines.append("- more than one seed, so that no spread is known and nothing is decided")
    return "**Not run:**\n\n" + "\n".join(lines) if lines else ""


def _method_of_judgement() -> str:
    metrics = ", ".join(f"{SHOWN[metric].label} {tables.arrow(metric)}" for metric in tables.METRICS)
    return (
        f"Rows are compared in {metrics}, in-domain and cross-domain, scene by scene: rows of one seed saw the same "
        f"batches. A row is better or worse where the differences of the scenes (mean over seeds) differ from zero by "
        f"sign flips at {ALPHA:.0%}, which with six scenes takes the same sign on all of them, and the difference has "
        "the same sign with every seed. Brackets hold the 95 % interval over scenes (BCa bootstrap), positive where "
        f"the first row is better. Alike are two rows where it lies within {MARGIN:.0%} of the second's value. A "
        "comparison holds where a metric is better and none worse, is contradicted the other way round, mixed with "
        "both, open where neither is shown. A claim holds where some of its comparisons hold and none is contradicted "
        "or mixed; it is not shown where all are open. There are several hundred such differences: some will have come "
        f"about by chance. Of a family of sizes the one of least {SHOWN[MAIN].label} on the in-domain test takes part, "
        "for all families alike."
    )


def summary(claims: Sequence[Claim]) -> str:
    """One sentence: how many claims have which verdict."""
    verdicts = [claim.verdict for claim in claims]
    words = ("holds", "holds in part", "does not hold", "not shown", "not run")
    listed = [f"{count} × {word}" for word in words if (count := verdicts.count(word))]
    return f"The paper's {len(claims)} claims at this scale: {', '.join(listed)}."


def _claims(claims: Sequence[Claim]) -> str:
    overview = tables.markdown(
        ["claim", "source", "at this scale"],
        [[claim.text, claim.source, f"**{claim.verdict}**{_counted(claim)}"] for claim in claims],
    )
    details = [
        f"<details><summary>{claim.source}: {claim.text}</summary>\n\n{tables.claim_table(claim)}\n\n</details>"
        for claim in claims
        if claim.comparisons or claim.checks
    ]
    return "\n\n".join([overview, *details])


def _counted(claim: Claim) -> str:
    words = {"holds": "hold", "contradicted": "contradicted", "mixed": "mixed", "open": "open", "unknown": "unknown"}
    listed = [f"{count} {shown}" for word, shown in words.items() if (count := claim.counts[word])]
    return f": {', '.join(listed)}" if listed else ""


def _table_sections(results: Results, scale: Scale) -> list[str]:
    """The tables of which anything has been run."""
    titles = [(f"Table {TABLES[name]}: {TASK_NAMES[name]}", task, EXPERIMENTS[0]) for name, task in results.items()]
    ablated = results[scale.ablated]
    titles += [(f"{TITLES[name]} ({TASK_NAMES[scale.ablated]})", ablated, name) for name in EXPERIMENTS[1:]]
    sections = [
        f"### {title}\n\n{tables.task_table(task, scale, experiment)}"
        for title, task, experiment in titles
        # one row beside the base model is in Tables 1 to 3 already
        if len(tables.shown_rows(task, scale, experiment)) > 2
    ]
    explained = (
        "## Tables\n\nMean ± standard deviation over seeds; best mean of a column in bold. `generic` is the error on "
        "generic scenes after tuning: what it is above the base model's has been forgotten. `rate` is the learning "
        "rate; `seconds` of training, on the CPU on one thread beside other jobs; `MiB` is the peak resident memory of "
        "the process (on a GPU the most that tensors took), most of it libraries and the same for all."
    )
    return [explained, *sections] if sections else []


def _rate_sections(results: Results, scale: Scale) -> list[str]:
    sections = [
        f"**{TASK_NAMES[name]}**\n\n{tables.rates_table(task, scale)}"
        for name, task in results.items()
        if any(choice.errors for choice in task.choices.values())
    ]
    explained = (
        f"## Learning rates\n\n{SHOWN[MAIN].label} on the validation scenes of each task. One size of each family is "
        "tuned at every rate with the first seed, and at the best of them with all seeds (mean ± standard deviation); "
        "the family takes the least mean over the seeds that the best ones have in common."
    )
    return [explained, *sections] if sections else []


def _budget(scale: Scale, results: Results) -> str:
    runs: list[RowResult] = [row for task in results.values() for row in task.rows.values()]
    seconds = [cost["seconds"] for row in runs for cost in row.costs.values()]
    measured = (
        f"\n\nThe {len(seconds)} runs in the tables trained for {sum(seconds) / 60:.0f} minutes in all, "
        f"{sum(seconds) / len(seconds):.0f} s each."
        if seconds
        else ""
    )
    if scale.name != "nano":
        return ""
    return f"## Plan\n\n{tables.budget_table(budget(scale, EXPERIMENTS, PLANNED_SEEDS))}{measured}"


def _failures(failures: Mapping[str, str]) -> str:
    if not failures:
        return ""
    return "## Failed jobs\n\n" + "\n".join(f"- {name}: {message}" for name, message in failures.items())


def readme_block(results: Results, scale: Scale, paper: Sequence[Claim], images: Sequence[str]) -> str:
    """The short table, a sentence on the claims and the first figure; or one sentence that nothing has been run."""
    if not images:
        return "The experiments (`make experiments`, a few hours on two cores) have not been run on these weights yet."
    seeds = max(row.seeds for task in results.values() for row in task.rows.values())
    return "\n\n".join(
        [
            f"`make experiments` on vggt-nano: {SHOWN[MAIN].label} (half the sum of accuracy and completeness) on the "
            f"in-domain test of each task, mean ± standard deviation over {seeds} seed{'s' * (seeds != 1)}. "
            f"{summary(paper)}{' Some rows have not been run.' if _missing(results) else ''} "
            "[All results](docs/results.md).",
            tables.short_table(results, scale),
            f"![{FIGURES[images[0]][1]}](docs/images/{images[0]}.png)",
        ]
    )


def read_block(text: str, markers: tuple[str, str]) -> str:
    """What stands between two markers; nothing where they are missing."""
    found = re.search(re.escape(markers[0]) + r"\n(.*?)" + re.escape(markers[1]), text, flags=re.DOTALL)
    return found[1].strip("\n") if found else ""


def replace_block(text: str, markers: tuple[str, str], block: str) -> str:
    """``text`` with ``block`` between its markers.

    Raises:
        ValueError: the markers are not there, once and in this order.
    """
    start, end = text.find(markers[0]), text.find(markers[1])
    if not 0 <= start < end or text.count(markers[0]) != 1 or text.count(markers[1]) != 1:
        raise ValueError(f"the text must hold the lines {markers[0]!r} and {markers[1]!r} once, in this order")
    inside = f"\n{block}\n" if block else "\n"
    return text[: start + len(markers[0])] + inside + text[end:]
