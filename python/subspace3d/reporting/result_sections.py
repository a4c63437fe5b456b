"""The sections of the report about fine-tuning: results, costs, training curves."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from subspace3d.evaluation.table import is_comparable, mixed_units, partial_means
from subspace3d.progress import format_duration
from subspace3d.reporting import result_figures
from subspace3d.reporting.collect import RunContent
from subspace3d.reporting.figures import to_png
from subspace3d.reporting.html import Html, bar, details, element, join, number, plot, section, table
from subspace3d.reporting.protocol_section import protocols

_UNITS = {"scene": "scene units", "deg": "degrees"}
# of every scene a point is drawn for the first two of these that were measured
_DRAWN = ("abs_rel", "accuracy", "completeness", "rotation_error_deg")


def results(content: RunContent) -> Html:
    title = "Results"
    if content.results is None:
        missing = "There is no results.json: no model was evaluated in this run (subspace3d evaluate)."
        return section("results", title, element("p", missing, class_="missing"))
    measured = content.results.value
    main = [name for name, metric in measured["metrics"].items() if metric["main"]]
    rest = [name for name, metric in measured["metrics"].items() if not metric["main"]]
    scenes = f"{len(measured['scenes'])} scene{'s' if len(measured['scenes']) != 1 else ''}"
    return section(
        "results",
        title,
        _methods_table(measured, main, f"Mean over {scenes}; best value of a column marked."),
        _improvements(measured),
        _problems(measured, content.tuned),
        _figures(measured),
        protocols(measured),
        details("All other metrics", *_other_tables(measured, rest)),
        details(
            f"Every scene ({len(measured['scenes'])})",
            *(_scene_table(measured, name, main) for name in measured["methods"]),
        ),
        details("How it was measured", _protocol(measured.get("protocol", {}))),
    )


def _other_tables(measured: Mapping[str, Any], metrics: list[str]) -> list[Html]:
    """A table per alignment, where the metrics name theirs."""
    words = measured.get("protocol", {}).get("alignments", {})
    groups: dict[str, list[str]] = {}
    for name in metrics:
        groups.setdefault(measured["metrics"][name].get("alignment", ""), []).append(name)
    tables = []
    for alignment, names in groups.items():
        said = f"Alignment: {words[alignment]}." if alignment in words else "Means, as above."
        tables.append(_methods_table(measured, names, said))
    return tables


def _methods_table(measured: Mapping[str, Any], metrics: list[str], caption: str) -> Html:
    methods: Mapping[str, Any] = measured["methods"]
    comparable = [m for m in metrics if len(methods) > 1 and is_comparable(methods.values(), m)]
    best = {m: _best(measured, m) if m in comparable else None for m in metrics}
    header = ["method", element("span", "trained", element("small", "parameters"))]
    header += [_metric_head(measured["metrics"][m], measured) for m in metrics]
    rows = []
    for name, method in methods.items():
        cells = {m: number(method["mean"].get(m)) for m in metrics}
        # what is equal in print is equally good
        row = [element("strong", cell) if cell == best[m] else cell for m, cell in cells.items()]
        rows.append([name, _count(method.get("trainable_parameters")), *row])
    return table(header, rows, caption)


def _metric_head(metric: Mapping[str, Any], measured: Mapping[str, Any]) -> Html:
    lower = metric["lower_is_better"]
    arrow = element("span", "↓" if lower else "↑", title="lower is better" if lower else "higher is better")
    return join([metric["label"], " ", arrow, element("small", _unit(metric["unit"], measured))])


def _unit(unit: str, measured: Mapping[str, Any]) -> str:
    """In words; of lengths the scenes' own where they have one."""
    units = set(measured.get("units", {}).values())
    if unit == "scene" and len(units) == 1 and units != {"scene"}:
        return units.pop()
    return _UNITS.get(unit, "")


def _best(measured: Mapping[str, Any], metric: str) -> str | None:
    values = [method["mean"].get(metric) for method in measured["methods"].values()]
    known = [value for value in values if value is not None]
    if not known:
        return None
    return number(min(known) if measured["metrics"][metric]["lower_is_better"] else max(known))


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _improvements(measured: Mapping[str, Any]) -> Html | None:
    """In how many scenes each method is better than the base, by the depth error."""
    base = measured["methods"].get("base", {}).get("per_scene", {})
    parts = []
    for name, method in measured["methods"].items():
        pairs = [
            (metrics["abs_rel"], base[scene]["abs_rel"])
            for scene, metrics in method["per_scene"].items()
            if metrics.get("abs_rel") is not None and base.get(scene, {}).get("abs_rel") is not None
        ]
        if name != "base" and pairs:
            parts.append(f"{name} in {sum(mine < other for mine, other in pairs)} of {len(pairs)} scenes")
    if not parts:
        return None
    return element("p", f"Smaller depth error (AbsRel) than the base: {'; '.join(parts)}.", class_="note")


def _problems(measured: Mapping[str, Any], tuned: Mapping[str, Mapping[str, Any]]) -> Html | None:
    lacks = (measured.get("backbone") or {}).get("lacks") or {}
    absent = [name for name in ("extrinsics", "intrinsics") if lacks.get(name) == "missing"]
    texts = [f"not predicted, so that what needs them is not measured: {', '.join(absent)}"] if absent else []
    texts += mixed_units(measured)
    labels = {name: metric["label"] for name, metric in measured["metrics"].items()}
    texts += partial_means(measured["methods"], labels)
    texts += [f"{entry['scene']} was left out: {entry['reason']}" for entry in measured.get("skipped", [])]
    for name, method in measured["methods"].items():
        if name in tuned and method.get("training") not in (None, tuned[name].get("training")):
            texts.append(f"{name} was tuned anew after it was evaluated: its results are those of an earlier run")
        texts += [f"{name} failed on {scene}: {reason}" for scene, reason in method.get("failed", {}).items()]
    return element("ul", *(element("li", text) for text in texts)) if texts else None


def _figures(measured: Mapping[str, Any]) -> Html:
    drawn = [metric for metric in _DRAWN if metric in measured["metrics"] and _best(measured, metric)][:2]
    labels = {metric: measured["metrics"][metric]["label"] for metric in drawn}
    plots = [
        plot(
            to_png(result_figures.draw_scenes(measured, metric)),
            f"{label} of every scene, a column of points per method.",
            "A point per scene, joined by a thin line through the methods; the bar is the mean.",
        )
        for metric, label in labels.items()
    ]
    comparable = bool(drawn) and is_comparable(measured["methods"].values(), drawn[0])
    cost = result_figures.draw_cost(measured, drawn[0]) if comparable else None
    if cost is not None:
        alt = f"Mean {labels[drawn[0]]} over the number of trained parameters."
        plots.append(plot(to_png(cost), alt, "Error over size. The dashed line is the untuned model."))
    return element("div", *plots, class_="plots")


def _scene_table(measured: Mapping[str, Any], method: str, metrics: list[str]) -> Html:
    header = ["scene", *(_metric_head(measured["metrics"][name], measured) for name in metrics)]
    rows = [
        [scene, *(number(values.get(name)) for name in metrics)]
        for scene, values in measured["methods"][method]["per_scene"].items()
    ]
    return join([element("h3", method), table(header, rows, label=f"every scene, {method}")])


def _protocol(protocol: Mapping[str, Any]) -> Html:
    rows = []
    for name, value in protocol.items():
        if name == "protocols" or value is None:  # those have a part of their own
            continue
        items = value.items() if isinstance(value, dict) else [("", value)]
        rows += [element("li", f"{f'{name} {key}'.strip().replace('_', ' ')}: {item}") for key, item in items]
    return element("ul", *rows)


def costs(content: RunContent) -> Html:
    """Parameters, time and memory per method."""
    title = "What each method costs"
    measured = {} if content.results is None else content.results.value["methods"]
    names = list(dict.fromkeys([*measured, *content.tuned]))
    if not names:
        return section("costs", title, element("p", "No tuned model is recorded in this run.", class_="missing"))
    records = {name: _cost(measured.get(name, {}), content.tuned.get(name, {})) for name in names}
    full = (records.get("full") or {}).get("parameters")
    columns = [
        ("trained", "parameters", "parameters", _count),
        ("time", "of training", "seconds", format_duration),
        ("per step", "seconds", "step", lambda value: f"{value:.2f}"),
        ("memory", "peak of training", "memory", lambda value: f"{value / 2**30:.2f} GiB"),
        ("prediction", "seconds per scene", "inference", lambda value: f"{value:.2f}"),
    ]
    shown = [column for column in columns if any(record[column[2]] is not None for record in records.values())]
    header: list[str] = ["method"]
    for name, what, key, _ in shown:
        header.append(join([name, element("small", what)]))
        if key == "parameters" and full:
            header.append(join(["share", element("small", "of full tuning")]))
    largest = {key: max(record[key] or 0.0 for record in records.values()) for _, _, key, _ in shown}
    rows = []
    for name, record in records.items():
        row: list[str] = [name]
        for _, _, key, write in shown:
            value = record[key]
            row.append("–" if value is None else join([write(value), bar(value / (largest[key] or 1.0))]))
            if key == "parameters" and full:
                row.append("–" if value is None else f"{100 * value / full:.3g} %")
        rows.append(row)
    note = (
        "Bars compare the methods within a column. On a CPU memory is the most that the process held, earlier runs in "
        "the same process included."
    )
    return section("costs", title, table(header, rows, note))


def _cost(method: Mapping[str, Any], tuned: Mapping[str, Any]) -> dict[str, float | None]:
    record = tuned or method
    training = record.get("training") or {}
    parameters = method.get("trainable_parameters")
    if parameters is None:
        parameters = (record.get("trainable") or {}).get("total")
    seconds, steps = training.get("seconds"), training.get("steps")
    inference = [entry.get("inference_seconds") for entry in method.get("details", {}).values()]
    known = [value for value in inference if value is not None]
    return {
        "parameters": parameters,
        "seconds": seconds,
        "step": seconds / steps if seconds is not None and steps else None,
        "memory": training.get("peak_memory_bytes"),
        # the first scene of a process pays for what is set up once
        "inference": statistics.median(known) if known else None,
    }


def training(content: RunContent) -> Html:
    title = "Training"
    curves: dict[str, Sequence[tuple[float, float]]] = {}
    for name, lines in content.curves.items():
        points = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
        if points:
            curves[name] = points
    if not curves:
        return section("training", title, element("p", "There are no training curves in this run.", class_="missing"))
    last = "; ".join(f"{name} {points[-1][1]:.3g} after {points[-1][0]} steps" for name, points in curves.items())
    image = plot(
        to_png(result_figures.draw_training(curves)),
        f"Training loss over optimiser steps. Last values: {last}.",
        "Loss per step (thin) and its running mean over a twentieth of the run (thick).",
    )
    return section("training", title, image)
