"""The paper's claims as comparisons of rows, and what the measured numbers say about them.

A comparison is decided metric by metric, over pairs of the same scene and seed (`results.compare`). Nothing here knows
how a comparison should end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from experiments.plan import Row, table_rows
from experiments.results import METRICS, Outcome, RowResult, TaskResults, compare
from experiments.scale import Scale, Task
from subspace3d.mining.cross_validation import own_and_nearest

Results = Mapping[Task, TaskResults]
TESTS = ("test", "cross")
SPLIT_NAMES = {"test": "in-domain", "cross": "cross-domain", "generic": "generic scenes"}
TABLES: dict[Task, int] = {"faces": 1, "bodies": 2, "glass": 3}
"""The paper's table of each task."""
TASK_NAMES = {"faces": "printed faces", "bodies": "clothed bodies", "glass": "transparent objects"}


@dataclass(frozen=True)
class Comparison:
    """Two rows on one split, and what the claim expects of the first."""

    what: str
    outcomes: dict[str, Outcome]
    expected: Literal["better", "alike"] = "better"

    @property
    def verdict(self) -> str:
        """holds, contradicted, mixed, open (no difference is shown) or unknown.

        Expected better: holds where some metric is better and none worse, contradicted the other way round. Expected
        alike: holds where all metrics are, contradicted where one is not and is better or worse, open otherwise.
        """
        known = [outcome for outcome in self.outcomes.values() if outcome.word != "unknown"]
        words = {outcome.word for outcome in known}
        if not words:
            return "unknown"
        if self.expected == "alike":
            apart = [outcome.word for outcome in known if not outcome.alike]
            return "holds" if not apart else "open" if set(apart) == {"level"} else "contradicted"
        if words == {"level"}:
            return "open"
        if "worse" not in words:
            return "holds"
        return "mixed" if "better" in words else "contradicted"


@dataclass(frozen=True)
class Check:
    """A measured number against a bound, in a sentence."""

    sentence: str
    holds: bool

    @property
    def verdict(self) -> str:
        return "holds" if self.holds else "contradicted"


@dataclass(frozen=True)
class Claim:
    """A statement, where it is from, and what bears on it."""

    text: str
    source: str
    comparisons: list[Comparison] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)

    @property
    def counts(self) -> Counter[str]:
        verdicts = [comparison.verdict for comparison in self.comparisons]
        return Counter([*verdicts, *(check.verdict for check in self.checks)])

    @property
    def verdict(self) -> str:
        """One phrase, from the verdicts of its parts alone."""
        counts = self.counts
        against = counts["contradicted"] + counts["mixed"]
        if not counts.total() or counts["unknown"] == counts.total():
            return "not run"
        if counts["holds"] and not against:
            return "holds"
        if counts["holds"]:
            return "holds in part"
        return "does not hold" if against else "not shown"


def paper_claims(results: Results, scale: Scale, analysis: Mapping[str, Any] | None) -> list[Claim]:
    """Tables 1 to 5 and Figure 6.

    Args:
        analysis (Mapping | None): analysis.json of the subspaces of the ablated task.
    """
    claims = [claim for name, task in results.items() for claim in _task_claims(task, scale, f"Table {TABLES[name]}")]
    ablated = results[scale.ablated]
    return [*claims, *_size_claims(ablated, scale), *_source_claims(ablated, scale), _disentangled(analysis)]


def further_claims(
    results: Results,
    scale: Scale,
    mining: Mapping[str, Any] | None,
    analysis: Mapping[str, Any] | None,
    gradient: Mapping[str, Any] | None,
) -> list[Claim]:
    """What the paper does not measure.

    Args:
        mining (Mapping | None): mining.json, see `planted.compare`.
        analysis (Mapping | None): as in `paper_claims`.
        gradient (Mapping | None): the same of the subspaces mined from adapters that started at the gradient.
    """
    return [
        _own_attribute(analysis),
        _own_attribute(gradient, "adapters that started at the gradient: "),
        *_direction_claims(results[scale.ablated], scale),
        _attributes_matter(results[scale.ablated], scale),
        _irls_is_robust(results[scale.ablated], scale, mining),
        *(_forgets_less(task, scale) for task in results.values()),
    ]


def _against(first: RowResult | None, second: RowResult | None, split: str, **options: Any) -> list[Comparison]:
    """One comparison, or none where a row has no result at all."""
    if first is None or second is None or not first.seeds or not second.seeds:
        return []
    outcomes = {metric: compare(first, second, split, metric) for metric in METRICS}
    return [Comparison(f"{SPLIT_NAMES[split]}: {first.label} against {second.label}", outcomes, **options)]


def _family(task: TaskResults, scale: Scale, family: str) -> list[RowResult]:
    """Results of a family's rows in Tables 1 to 3, smallest size first."""
    return [task.rows[row.name] for row in table_rows(scale, "tasks", task.task) if row.family == family]


def _best(task: TaskResults, scale: Scale, family: str) -> RowResult | None:
    return task.best(_family(task, scale, family))


def _task_claims(task: TaskResults, scale: Scale, table: str) -> list[Claim]:
    ours, name = _best(task, scale, "subspace"), TASK_NAMES[task.task]
    others = [_best(task, scale, family) for family in ("full", "lora", "pissa", "adalora")]
    beats = [part for split in TESTS for other in others for part in _against(ours, other, split)]
    better_than_base = [part for split in TESTS for part in _against(ours, task.base, split)]
    smallest = _family(task, scale, "lora")[0]
    equal: RowResult | None = None
    if (size := smallest.cost("trainable")) is not None:
        known = [(cost.mean, row) for row in _family(task, scale, "subspace") if (cost := row.cost("trainable"))]
        equal = min(known, key=lambda pair: abs(pair[0] - size.mean))[1] if known else None
    same_size = [part for split in TESTS for part in _against(equal, smallest, split)]
    return [
        Claim(f"{name}: subspace tuning is better than full tuning, LoRA, PiSSA and AdaLoRA", table, beats),
        Claim(f"{name}: subspace tuning is better than the base model", table, better_than_base),
        Claim(f"{name}: with about as many parameters, subspace tuning is better than LoRA", table, same_size),
    ]


def _size_claims(task: TaskResults, scale: Scale) -> list[Claim]:
    ours, lora, pissa = (_family(task, scale, family) for family in ("subspace", "lora", "pissa"))
    name = TASK_NAMES[task.task]
    grows = [part for split in TESTS for part in _against(ours[-1], ours[0], split)]
    overfits = [part for split in TESTS for part in _against(lora[len(lora) // 2], lora[-1], split)]
    degrades = [part for split in TESTS for part in _against(pissa[0], pissa[-1], split)]
    tuned = [row for row in task.rows.values() if row.seeds > 1]
    worse = sum(
        any(compare(row, task.base, split, metric).word == "worse" for split in TESTS for metric in METRICS)
        for row in tuned
    )
    sentence = f"{worse} of {len(tuned)} tuned rows are worse than the base model in some metric"
    return [
        Claim(f"{name}: a larger k is better than a small one", "Tables 2, 4", grows),
        Claim(f"{name}: LoRA of the highest rank overfits, a middle one is better", "Table 2", overfits),
        Claim(f"{name}: PiSSA degrades as its rank grows", "Table 2", degrades),
        Claim(
            f"{name}: tuning can end worse than the base model",
            "Table 2",
            checks=[Check(sentence, worse > 0)] if tuned else [],
        ),
    ]


def _source_claims(task: TaskResults, scale: Scale) -> list[Claim]:
    name = TASK_NAMES[task.task]

    def rows(experiment: Literal["psv", "rank"], keep: Any) -> list[RowResult]:
        return [task.rows[row.name] for row in table_rows(scale, experiment, task.task) if keep(row)]

    def is_high(row: Row) -> bool:
        return row.mined is not None and row.mined.rank == scale.high_rank

    mined, high = rows("psv", lambda row: row.mined is not None), rows("rank", is_high)
    psv = rows("psv", lambda row: row.mined is None)
    pairs = [part for split in TESTS for one, two in zip(mined, psv) for part in _against(one, two, split)]
    same = [
        part for split in TESTS for one, two in zip(high, mined) for part in _against(one, two, split, expected="alike")
    ]
    trend = [part for split in TESTS for part in _against(high[-1], high[0], split)]
    ranks = f"rank {scale.high_rank} instead of {scale.adapter_rank}"
    return [
        Claim(f"{name}: mined subspaces are better than singular vectors of the weights, same K", "Table 4", pairs),
        Claim(f"{name}: adapters of {ranks} give subspaces that are about as good", "Table 5", same),
        Claim(f"{name}: with adapters of {ranks}, too, a larger k is better than a small one", "Table 5", trend),
    ]


def _disentangled(analysis: Mapping[str, Any] | None) -> Claim:
    checks = []
    for side, pairs in (analysis or {}).get("disentanglement", {}).items():
        for pair in pairs if side in ("output", "input") else ():
            value, random = pair["mean_smallest"], pair["mean_smallest_random"]
            if value is not None:
                sentence = (
                    f"{' and '.join(pair['attributes'])}, {side} side: {value:.2f} (random subspaces {random:.2f})"
                )
                checks.append(Check(sentence, value > 0.5))
    text = "the subspaces of two attributes are disentangled: smallest eigenvalue above 0.5, mean over modules"
    return Claim(text, "Figure 6", checks=checks)


def _own_attribute(analysis: Mapping[str, Any] | None, which: str = "") -> Claim:
    checks = []
    validation = (analysis or {}).get("cross_validation") or {}
    for attribute, row in validation.get("explained", {}).items():
        own, nearest = own_and_nearest(row, attribute)
        if own is None or nearest is None:
            continue
        name, share = nearest
        sentence = f"{attribute}: {own:.1%} explained by others of its attribute, {share:.1%} by {name}"
        checks.append(Check(sentence, own > share))
    text = f"{which}an adapter's energy lies in the subspace of its own attribute more than in that of any other"
    return Claim(text, "energy explained", checks=checks)


def _direction_claims(task: TaskResults, scale: Scale) -> list[Claim]:
    rows = [task.rows[row.name] for row in table_rows(scale, "source", task.task)]
    count = len(scale.ks)
    usual, gradient, (pooled, random, heads) = rows[:count], rows[count : 2 * count], rows[2 * count :]
    middle, name = usual[count // 2], TASK_NAMES[task.task]

    def against(pairs: Iterable[tuple[RowResult, RowResult]]) -> list[Comparison]:
        return [part for split in TESTS for one, two in pairs for part in _against(one, two, split)]

    source = "directions"
    return [
        Claim(
            f"{name}: cores beside the LoRA on the heads are better than it alone", source, against([(middle, heads)])
        ),
        Claim(f"{name}: mined subspaces are better than random ones, same K", source, against([(middle, random)])),
        Claim(
            f"{name}: one subspace per attribute is better than one of all adapters, same K",
            source,
            against([(middle, pooled)]),
        ),
        Claim(
            f"{name}: adapters that start at the gradient give better subspaces, same k",
            source,
            against(list(zip(gradient, usual))),
        ),
    ]


def _attributes_matter(task: TaskResults, scale: Scale) -> Claim:
    _, control, *without = (task.rows[row.name] for row in table_rows(scale, "attributes", task.task))
    parts = [part for split in TESTS for row in without for part in _against(control, row, split)]
    return Claim(f"{TASK_NAMES[task.task]}: every attribute contributes, at the same K", "each left out", parts)


def _irls_is_robust(task: TaskResults, scale: Scale, mining: Mapping[str, Any] | None) -> Claim:
    checks = []
    if mining and {"irls", "mean"} <= mining.keys():
        for attribute, row in mining["irls"].items():
            irls, mean = row["kept"], mining["mean"][attribute]["kept"]
            checks.append(
                Check(f"{attribute}: {irls:.2f} of the subspace kept by IRLS, {mean:.2f} by the mean", irls > mean)
            )
            weights = {name: value for name, value in row["weights"].items() if name in ("noise", "wrong")}
            listed = ", ".join(f"{name} {value:.2f}" for name, value in weights.items())
            sentence = f"{attribute}: weights of the planted adapters over the mean weight: {listed}"
            checks.append(Check(sentence, max(weights.values()) < 1))
    _, _, planted, planted_mean = (task.rows[row.name] for row in table_rows(scale, "mining", task.task))
    parts = [part for split in TESTS for part in _against(planted, planted_mean, split)]
    return Claim("bad adapters hurt mining by IRLS less than mining by the plain mean", "planted", parts, checks)


def _forgets_less(task: TaskResults, scale: Scale) -> Claim:
    ours = _best(task, scale, "subspace")
    parts = [part for family in ("full", "lora") for part in _against(ours, _best(task, scale, family), "generic")]
    name = TASK_NAMES[task.task]
    return Claim(f"{name}: subspace tuning forgets less than full tuning and LoRA", "generic scenes", parts)
