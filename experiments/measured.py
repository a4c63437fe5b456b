"""What was measured, as one file of the checkout: from it the pages can be written again, and other machines go on.

The first line of ``experiments/measured.jsonl`` is the record of the run folder (scale, weights, version, starts).
Every other one is a file of the folder, by its path there, with what the pages need of it; figures have six digits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from experiments.results import MAIN
from experiments.results import METRICS as COMPARED
from subspace3d import outputs, records
from subspace3d.evaluation.table import METRICS as SHOWN
from subspace3d.files import read_json, stays_inside, write_json, write_text
from subspace3d.reading import parse_json, read_text

FILE = Path("experiments") / "measured.jsonl"
RUN_RECORD = "experiments.json"
_LARGEST = 1 << 28
_KEPT = {*COMPARED, MAIN, *(name for name, metric in SHOWN.items() if metric.main)}


def _whole(record: Any) -> Any:
    return record


def _result(record: Mapping[str, Any]) -> dict[str, Any]:
    """Of one method on one split: the metrics that tables and claims are about, scene by scene, and what it cost."""

    def kept(values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if name in _KEPT}

    training = record["training"] or {}
    return {
        "mean": kept(record["mean"]),
        "per_scene": {scene: kept(values) for scene, values in record["per_scene"].items()},
        "failed": record["failed"],
        "trainable_parameters": record["trainable_parameters"],
        "training": {name: training[name] for name in ("seconds", "peak_memory_bytes") if name in training},
    }


def _analysis(record: Mapping[str, Any]) -> dict[str, Any]:
    """Means over modules."""
    kept = {name: record[name] for name in ("disentanglement", "cross_validation") if name in record}
    return _without(kept, {"modules", "stability"})


PARTS: dict[str, Callable[[Any], Any]] = {
    "runs/*/*/job.json": _whole,
    "evaluation/*/*/methods/*.json": _result,
    "analysis/*/analysis.json": _analysis,
    "mining.json": _whole,
    "directions/energy/*.json": _whole,
    "directions/runs/*/*.json": _whole,
}
MARKED = {"evaluation/*/*": outputs.EVALUATION, "analysis/*": outputs.ANALYSIS}
"""Folders that the records alone do not show to be our own, so that nothing would be added to them."""


def require_checkout(path: Path) -> None:
    """Raise FileNotFoundError unless ``path`` is a checkout of this project: pages and figures in it are replaced."""
    project = path / "pyproject.toml"
    if not (project.is_file() and 'name = "subspace3d"' in read_text(project, _LARGEST)):
        raise FileNotFoundError(f"publish: no checkout of subspace3d in {path}")


def keep(out: Path, checkout: Path) -> None:
    """Write what the run folder ``out`` holds to `FILE` of a checkout."""
    lines = [read_json(out / RUN_RECORD)]
    for pattern, part in PARTS.items():
        lines += [
            {"path": path.relative_to(out).as_posix(), "record": _rounded(part(read_json(path)))}
            for path in sorted(out.glob(pattern))
        ]
    write_text(checkout / FILE, "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))


def take_over(path: Path, out: Path, wanted: Mapping[str, Any]) -> int:
    """Put the records of a file that `keep` wrote into the run folder ``out``; those that are there stay.

    Args:
        wanted (Mapping): scale, weights and version that the file must be of.

    Returns:
        How many were added.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is of another scale, other weights or another version, or not such a file.
    """
    text = read_text(path, _LARGEST)
    head, *lines = [parse_json(line, f"{path}, line {number}") for number, line in enumerate(text.splitlines(), 1)]
    if not isinstance(head, dict) or "starts" not in head:
        raise ValueError(f"measured: {path} must be written by --publish")
    records.check_same(path, head, wanted, "leave out --measured")
    found = {_target(out, line, path): line["record"] for line in lines}
    missing = {target: record for target, record in found.items() if not target.is_file()}
    for target, record in missing.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        write_json(target, record)
    for pattern, kind in MARKED.items():
        for folder in out.glob(pattern):
            outputs.mark(folder, kind)
    if not (out / RUN_RECORD).is_file():
        write_json(out / RUN_RECORD, head)
    return len(missing)


def _target(out: Path, line: Any, path: Path) -> Path:
    name = line["path"] if isinstance(line, dict) and {"path", "record"} <= line.keys() else None
    if isinstance(name, str) and ".." not in name and any(fnmatchcase(name, pattern) for pattern in PARTS):
        target = out / name
        if stays_inside(out, target):
            return target
    raise ValueError(f"measured: {path} must hold records of {', '.join(PARTS)}, got {str(line)[:80]}")


def _without(value: Any, names: set[str]) -> Any:
    if isinstance(value, dict):
        return {name: _without(part, names) for name, part in value.items() if name not in names}
    return [_without(part, names) for part in value] if isinstance(value, list) else value


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return value
