"""Published protocols in the report: which numbers stand where, and what is said of them."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

import pytest

from subspace3d.formats.results import ResultsRecord
from subspace3d.reporting.protocol_section import protocols
from subspace3d.schema import check

ACCURACY = {"label": "Acc", "unit": "scene", "lower_is_better": True}
AUC = {"label": "AUC@30", "unit": "", "lower_is_better": False}
EMPTY = {"label": "DTU", "unit": "", "lower_is_better": True}


def record_of(*names: str) -> dict[str, Any]:
    values = {
        "base": {"vggt": {"accuracy": 0.5, "auc_30": 0.25}, "da3": {"accuracy": 4.0}},
        "run": {"vggt": {"accuracy": 0.125, "auc_30": 0.0625}, "da3": {"accuracy": 8.0}},
    }
    words = {"source": "a paper", "frames": "every 5th", "size": "518 wide", "alignment": "a Sim(3) <of all>"}
    return {
        "format": "subspace3d-results",
        "version": 1,
        "scenes": ["a"],
        "metrics": {},
        "protocols": {
            name: {**words, "metrics": {"accuracy": ACCURACY, "auc_30": AUC, "overall_dtu": EMPTY}} for name in names
        },
        "methods": {
            method: {
                "mean": {},
                "per_scene": {},
                "failed": {},
                "protocols": {name: {"mean": measured[name], "per_scene": {}} for name in names},
            }
            for method, measured in values.items()
        },
    }


def rows_of(page: str) -> list[list[str]]:
    rows = re.findall(r"<tr>(.*?)</tr>", page)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]


def test_a_row_per_metric_and_method_and_a_column_per_protocol() -> None:
    page = protocols(record_of("vggt", "da3"))
    assert page is not None
    assert rows_of(page) == [
        ["metric", "method", "vggt", "da3"],
        ["Acc ↓", "base", "0.5000", "<strong>4.000</strong>"],
        ["", "run", "<strong>0.1250</strong>", "8.000"],
        ["AUC@30 ↑", "base", "<strong>0.2500</strong>", "–"],
        ["", "run", "0.06250", "–"],
    ]
    assert page.count("alignment: a Sim(3) &lt;of all&gt;") == 2
    # the same predictions for all of them: no protocol had its own frames
    assert "every 5th" not in page and "same predictions" in unescape(page)


def test_methods_of_different_scenes_are_not_compared() -> None:
    record = record_of("vggt")
    for name, scenes in (("base", ("a", "b")), ("run", ("a",))):
        record["methods"][name]["protocols"]["vggt"]["per_scene"] = {scene: {"accuracy": 0.5} for scene in scenes}
    page = protocols(record)
    assert page is not None
    assert [row[2] for row in rows_of(page)[1:]] == ["0.5000", "0.1250", "<strong>0.2500</strong>", "0.06250"]
    assert "vggt: means of run are over 1 of 2 scenes in Acc: not to be compared" in page


def test_a_single_protocol_says_its_frames_and_sizes() -> None:
    page = protocols(record_of("vggt"))
    assert page is not None and "frames: every 5th" in page and "image size: 518 wide" in page
    assert "same predictions" not in page


def test_without_protocols_there_is_nothing() -> None:
    assert protocols(record_of()) is None
    assert protocols({"methods": {}}) is None


def test_a_protocol_without_metrics_is_refused_by_name() -> None:
    record = record_of("vggt")
    assert check(record, ResultsRecord, "results.json") is not None
    del record["protocols"]["vggt"]["metrics"]
    with pytest.raises(ValueError, match=r"protocols.*metrics"):
        check(record, ResultsRecord, "results.json")
