"""What a run folder holds that a report can show."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from subspace3d import files
from subspace3d.formats import analysis as analysis_format
from subspace3d.formats import comparison as comparison_format
from subspace3d.formats import fit as fit_format
from subspace3d.formats import results as results_format
from subspace3d.formats.analysis import AnalysisRecord
from subspace3d.formats.results import MetricsLine, ResultsRecord
from subspace3d.formats.run import read_tuned_record
from subspace3d.reading import LARGEST_RECORD, parse_json, read_text
from subspace3d.schema import check

_LARGEST_SETTINGS = 1 << 18  # bytes


@dataclass(frozen=True)
class Document:
    """A JSON file of a run: where it stands, which its pictures are named relative to, and what it says.

    ``others`` are the files of the same name that it was chosen from, which the page does not show.
    """

    path: Path
    value: dict[str, Any]
    others: tuple[Path, ...] = ()


@dataclass(frozen=True)
class RunContent:
    """The parts of a run folder; a part that is not there is None or empty.

    Attributes:
        run: the run folder.
        settings: text of config.yaml.
        results: results.json of the evaluation.
        analysis: analysis.json; its figures stand beside it.
        fit: fit.json of this version; its figure stands beside it.
        comparison: comparison.json of this version.
        curves: name of a training run -> lines of its metrics.jsonl.
        tuned: name of a training run -> its tuned.json.
    """

    run: Path
    settings: str | None = None
    results: Document | None = None
    analysis: Document | None = None
    fit: Document | None = None
    comparison: Document | None = None
    curves: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    tuned: dict[str, dict[str, Any]] = field(default_factory=dict)


def collect(run: Path) -> RunContent:
    """Read what is there.

    Raises:
        FileNotFoundError: ``run`` is no folder, or holds nothing to report.
        ValueError: a file is not valid JSON or not of the format its name promises.
    """
    run = Path(run)
    if not run.is_dir():
        raise FileNotFoundError(f"run: no such folder: {run}")
    results = _find(run, "evaluation/results.json", results_format.FORMAT)
    if results is not None:
        check(results.value, ResultsRecord, results.path)
    analysis = _find(run, "analysis/analysis.json", analysis_format.FORMAT)
    # one of an earlier version is named on the page and not drawn
    if analysis is not None and analysis.value.get("version") == analysis_format.VERSION:
        analysis_format.check_together(check(analysis.value, AnalysisRecord, analysis.path), analysis.path)
    fit = _find(run, "fit/fit.json", fit_format.FORMAT)
    if fit is not None and fit.value.get("version") == fit_format.VERSION:
        check(fit.value, fit_format.FitRecord, fit.path)
    else:
        fit = None
    comparison = _find(run, "comparison/comparison.json", comparison_format.FORMAT)
    if comparison is not None and comparison.value.get("version") == comparison_format.VERSION:
        check(comparison.value, comparison_format.ComparisonRecord, comparison.path)
        comparison_format.check_together(comparison.value, comparison.path)
    else:
        comparison = None
    curves, tuned = {}, {}
    folders = _training_folders(run)
    names = [folder.name for folder in folders]
    for folder in folders:
        name = folder.name if names.count(folder.name) == 1 else folder.relative_to(run).as_posix()
        lines = _read_lines(run, folder / "metrics.jsonl")
        if lines:
            curves[name] = lines
        if (folder / "tuned" / "tuned.json").is_file():
            tuned[name] = dict(read_tuned_record(_inside(run, folder / "tuned" / "tuned.json").parent))
    if not (results or analysis or fit or comparison or curves or tuned):
        raise FileNotFoundError(
            f"run: nothing to report in {run}: no results.json, analysis.json, comparison.json, fit.json or "
            "metrics.jsonl"
        )
    settings = run / "config.yaml"
    return RunContent(
        run=run,
        settings=read_text(_inside(run, settings), _LARGEST_SETTINGS) if settings.is_file() else None,
        results=results,
        analysis=analysis,
        fit=fit,
        comparison=comparison,
        curves=curves,
        tuned=tuned,
    )


def _inside(run: Path, path: Path) -> Path:
    """``path``, which must not be a link out of the run: its text goes into the page."""
    return files.inside(run, path.relative_to(run).as_posix(), "run")


def _find(run: Path, usual: str, expected: str) -> Document | None:
    """The file at its usual place, else the one of that name nearest to the top."""
    path = run / usual
    others: list[Path] = []
    if not path.is_file():
        below = (folder / path.name for folder, _, names in files.walk(run) if path.name in names)
        found = sorted(below, key=lambda item: (len(item.parts), item))
        if not found:
            return None
        path, *others = found
    value = files.read_json(_inside(run, path))
    if not isinstance(value, dict) or value.get("format") != expected:
        raise ValueError(f"{path}: format must be {expected!r}")
    return Document(path, value, tuple(others))


def _training_folders(run: Path) -> list[Path]:
    """RUN itself when it is a fine-tuning run, else those up to two folders below it; adapters are none."""
    if _is_training(run):
        return [run]
    below = [path for pattern in ("*", "*/*") for path in run.glob(pattern) if not path.name.startswith(".")]
    return sorted(path for path in below if path.is_dir() and _is_training(path))


def _is_training(folder: Path) -> bool:
    tuned = (folder / "tuned" / "tuned.json").is_file()
    return tuned or ((folder / "metrics.jsonl").is_file() and not (folder / "adapt.json").is_file())


def _read_lines(run: Path, path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines: list[Any] = []
    # a run that is still going may have written half of its last line
    whole = read_text(_inside(run, path), LARGEST_RECORD).rpartition("\n")[0]
    for number, line in enumerate(whole.splitlines(), 1):
        lines.append(check(parse_json(line, f"{path}, line {number}"), MetricsLine, f"{path}, line {number}"))
    return lines
