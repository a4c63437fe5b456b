"""The part of the report about published protocols: the same predictions as each of them measures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from subspace3d.evaluation.table import is_comparable, partial_means
from subspace3d.reporting.html import Html, details, element, join, number, table

_TOLD = {"source": "source", "frames": "frames", "size": "image size", "mask": "mask", "alignment": "alignment"}
_OWN = ("frames", "size")  # what a protocol chooses where it is the only one


def protocols(measured: Mapping[str, Any]) -> Html | None:
    """A row per metric and method, a column per protocol, and what each does; None where none was asked for.

    Of several protocols the predictions are the same, so their own frames and sizes are not told: they were not used.
    """
    records: Mapping[str, Any] = measured.get("protocols", {})
    metrics: dict[str, Mapping[str, Any]] = {}
    for record in records.values():
        metrics |= record["metrics"]
    if not metrics:
        return None
    methods: Mapping[str, Any] = measured["methods"]
    rows: list[list[str]] = []
    for name, metric in metrics.items():
        if not any(_means(name, methods, protocol) != [None] * len(methods) for protocol in records):
            continue
        columns = [_cells(metric, name, methods, protocol) for protocol in records]
        for index, method in enumerate(methods):
            rows.append([_head(metric) if index == 0 else "", method, *(column[index] for column in columns)])
    told_of = [key for key in _TOLD if len(records) == 1 or key not in _OWN]
    caption = "The best method of a metric and a protocol is marked; –: the protocol does not have the metric."
    if len(records) > 1:
        caption += (
            " All of them measure the same predictions, of the frames and sizes under “How it was measured”. Their "
            "alignments differ, so numbers of different columns must not be compared."
        )
    told = [
        join(
            [
                element("h3", name),
                element("ul", *(element("li", f"{_TOLD[key]}: {record[key]}") for key in told_of if key in record)),
            ]
        )
        for name, record in records.items()
    ]
    partial = [
        f"{name}: {line}"
        for name, record in records.items()
        for line in partial_means(
            _under(name, methods), {key: value["label"] for key, value in record["metrics"].items()}
        )
    ]
    return details(
        f"Published protocols ({', '.join(records)})",
        table(["metric", "method", *records], rows, caption),
        element("ul", *(element("li", line) for line in partial)) if partial else None,
        *told,
    )


def _cells(metric: Mapping[str, Any], name: str, methods: Mapping[str, Any], protocol: str) -> list[str]:
    values = _means(name, methods, protocol)
    texts = [number(value) for value in values]
    known = [value for value in values if value is not None]
    if len(known) < 2 or not is_comparable(_under(protocol, methods).values(), name):
        return texts
    best = number((min if metric["lower_is_better"] else max)(known))
    return [element("strong", text) if text == best else text for text in texts]


def _means(name: str, methods: Mapping[str, Any], protocol: str) -> list[float | None]:
    return [record.get("mean", {}).get(name) for record in _under(protocol, methods).values()]


def _under(protocol: str, methods: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What each method has measured under a protocol."""
    return {label: method.get("protocols", {}).get(protocol, {}) for label, method in methods.items()}


def _head(metric: Mapping[str, Any]) -> str:
    return f"{metric['label']} {'↓' if metric['lower_is_better'] else '↑'}"
