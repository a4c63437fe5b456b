"""What a run folder holds that a report can show."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from subspace3d import files
from subspace3d.formats import analysis as analysis_format
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
    """A JSON file of a run: where it stands, which its pictures are named relative to, and what it says."""

    path: Path
    value: dict[str, Any]


@dataclass(frozen=True)
class RunContent:
    """The parts of a run folder; a part that is not there is None or empty.

    Attributes:
        run: the run folder.
        settings: text of config.yaml.
        results: results.json of the evaluation.
        analysis: analysis.json; its figures stand beside it.
        fit: fit.json of this version; its figure stands beside it.
        curves: name of a training run -> lines of its metrics.jsonl.
        tuned: name of a training run -> its tuned.json.
    """

    run: Path
    settings: str | None = None
    results: Document | None = None
    analysis: Document | None = None
    fit: Document | None = None
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
    curves, tuned = {}, {}
    for folder in _training_folders(run):
        lines = _read_lines(run, folder / "metrics.jsonl")
        if lines:
            curves[folder.name] = lines
        if (folder / "tuned" / "tuned.json").is_file():
            tuned[folder.name] = dict(read_tuned_record(_inside(run, folder / "tuned" / "tuned.json").parent))
    if results is None and analysis is None and fit is None and not curves and not tuned:
        raise FileNotFoundError(
            f"run: nothing to report in {run}: no results.json, analysis.json, fit.json or metrics.jsonl"
        )
    settings = run / "config.yaml"
    return RunContent(
        run=run,
        settings=read_text(_inside(run, settings), _LARGEST_SETTINGS) if settings.is_file() else None,
        results=results,
        analysis=analysis,
        fit=fit,
        curves=curves,
        tuned=tuned,
    )


def _inside(run: Path, path: Path) -> Path:
    """``path``, which must not be a link out of the run: its text goes into the page."""
    return files.inside(run, path.relative_to(run).as_posix(), "run")


def _find(run: Path, usual: str, expected: str) -> Document | None:
    """The file at its usual place, else the one of that name nearest to the top."""
    path = run / usual
    if not path.is_file():
        found = sorted(run.rglob(path.name), key=lambda item: (len(item.parts), item))
        if not found:
            return None
        path = found[0]
    value = files.read_json(_inside(run, path))
    if not isinstance(value, dict) or value.get("format") != expected:
        raise ValueError(f"{path}: format must be {expected!r}")
    return Document(path, value)


def _training_folders(run: Path) -> list[Path]:
    """RUN/tuned/<method> of a demo run, else RUN itself when it is one fine-tuning run."""
    folders = sorted({path.parent for path in run.glob("tuned/*/metrics.jsonl")})
    folders += sorted({path.parent.parent for path in run.glob("tuned/*/tuned/tuned.json")} - set(folders))
    if not folders and ((run / "metrics.jsonl").is_file() or (run / "tuned" / "tuned.json").is_file()):
        return [run]
    return folders


def _read_lines(run: Path, path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines: list[Any] = []
    # a run that is still going may have written half of its last line
    whole = read_text(_inside(run, path), LARGEST_RECORD).rpartition("\n")[0]
    for number, line in enumerate(whole.splitlines(), 1):
        lines.append(check(parse_json(line, f"{path}, line {number}"), MetricsLine, f"{path}, line {number}"))
    return lines
