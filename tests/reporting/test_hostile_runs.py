"""Markup and ways out of the folder in the files of a run: the page shows one as text and does not follow the other."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from reporting.synthetic_run import write_results, write_run

from subspace3d.commands import report
from subspace3d.commands.report import ReportConfig
from subspace3d.reporting.collect import collect

MARKUP = "<script>alert('x')</script>\"'><img src=x onerror=alert(1)>&amp;"


class _Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, list]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.found.append((tag, [(name, None if tag == "img" and name == "src" else value) for name, value in attrs]))


def _strings(value) -> set[str]:
    """Every string that is a value."""
    if isinstance(value, str):
        return set() if _is_fixed(value) else {value}
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return set().union(*map(_strings, items))


def _with_markup(value, marked: str, named: set[str]):
    """``marked`` before every string, and before every key that a string names, so that the parts still fit."""
    if isinstance(value, dict):
        return {f"{marked}{k}" if k in named else k: _with_markup(item, marked, named) for k, item in value.items()}
    if isinstance(value, list):
        return [_with_markup(item, marked, named) for item in value]
    return f"{marked}{value}" if isinstance(value, str) and not _is_fixed(value) else value


def _is_fixed(value: str) -> bool:
    """Words of a closed set, which are refused when they are others."""
    return value.startswith("subspace3d-") or value in ("mean", "shared")


@pytest.mark.parametrize("file", ["evaluation/results.json", "analysis/analysis.json"])
def test_the_report_escapes_every_string(tmp_path: Path, file: str) -> None:
    """With markup in every string of a file, the page has the tags it has with a harmless word there."""
    run = write_run(tmp_path / "run", ("texture", "camera"), layers=1, scenes=2)
    record = json.loads((run / file).read_text())
    pages = []
    named = _strings(record) if "attributes" in record else set()
    for marked in ("harmless", MARKUP):
        (run / file).write_text(json.dumps(_with_markup(record, marked, named)))
        pages.append(report.run(ReportConfig(run)).read_text(encoding="utf-8"))
    plain, attacked = (_Tags(page) for page in pages)
    assert [tag for tag, _ in attacked.found] == [tag for tag, _ in plain.found]
    assert [[name for name, _ in attrs] for _, attrs in attacked.found] == [
        [name for name, _ in attrs] for _, attrs in plain.found
    ]
    assert MARKUP not in pages[1] and pages[1].count("<script") == pages[0].count("<script")


def test_the_report_embeds_no_file_from_outside(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ("texture",), layers=1, scenes=1)
    results = run / "evaluation/results.json"
    record = json.loads(results.read_text())
    (tmp_path / "secret.txt").write_text("secret")
    for way in (str(tmp_path / "secret.txt"), "../../secret.txt", "results.json"):
        record["pictures"][0]["true"] = way
        results.write_text(json.dumps(record))
        page = report.run(ReportConfig(run)).read_text(encoding="utf-8")
        assert "c2VjcmV0" not in page and ("must stay inside" in page or "is not a whole safetensors file" in page)


@pytest.mark.parametrize("name", ["config.yaml", "evaluation/results.json", "metrics.jsonl"])
def test_a_linked_file_of_a_run_is_not_shown(tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    write_results(run / "evaluation", ["a"])
    (run / "config.yaml").write_text("seed: 0\n")
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    collect(run)
    outside = tmp_path / "outside"
    (run / name).rename(outside)
    (run / name).symlink_to(outside)
    with pytest.raises(ValueError, match="run must stay inside"):
        collect(run)


def test_a_figure_that_is_a_link_out_of_the_run_is_not_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ("texture", "camera"), layers=1, scenes=1)
    (tmp_path / "secret.txt").write_text("secret")
    figures = sorted((run / "analysis").glob("*.png"))
    assert figures
    for figure in figures:
        figure.unlink()
        figure.symlink_to(tmp_path / "secret.txt")
    assert "c2VjcmV0" not in report.run(ReportConfig(run)).read_text(encoding="utf-8")


def _drop_module(record: dict) -> None:
    record["weights"]["texture"]["modules"].popitem()


def _drop_weight(record: dict) -> None:
    record["weights"]["texture"]["mean"].pop()


def _drop_attribute(record: dict) -> None:
    del record["spectra"]["texture"]


def _other_random(record: dict) -> None:
    record["disentanglement"]["random"].clear()


@pytest.mark.parametrize("change", [_drop_module, _drop_weight, _drop_attribute, _other_random])
def test_an_analysis_that_does_not_hold_together_is_named(tmp_path: Path, change) -> None:
    from fuzz.readers import READERS

    READERS["analysis.json"].make(tmp_path)
    path = tmp_path / "analysis/analysis.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"analysis\.json: (weights|spectra|disentanglement).* must have"):
        collect(tmp_path)
