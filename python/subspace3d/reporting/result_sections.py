"""The sections of the report about fine-tuning: table, scenes, pictures, curves."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from subspace3d.datasets.image_files import open_image
from subspace3d.files import inside
from subspace3d.progress import format_duration
from subspace3d.reporting.collect import RunContent
from subspace3d.reporting.html import Html, details, element, join, picture, section, table

_WIDEST_PICTURE = 320
_UNITS = {"scene": "scene units", "deg": "degrees"}
_COSTS = (("trained", "parameters"), ("time", "of training"), ("memory", "peak"))
_OPEN_SCENES = 2


def results(content: RunContent) -> Html:
    title = "Results"
    if content.results is None:
        missing = "There is no results.json: no model was evaluated in this run (subspace3d evaluate)."
        return section("results", title, element("p", missing, class_="missing"))
    measured = content.results.value
    main = [name for name, metric in measured["metrics"].items() if metric["main"]]
    rest = [name for name, metric in measured["metrics"].items() if not metric["main"]]
    scenes = len(measured["scenes"])
    return section(
        "results",
        title,
        _methods_table(measured, content.tuned, main, f"Mean over {scenes} scenes; best value of a column marked."),
        _improvements(measured),
        _problems(measured),
        details("All other metrics", _methods_table(measured, content.tuned, rest, "Means, as above.")),
        details(f"Every scene ({scenes})", *(_scene_table(measured, name, main) for name in measured["methods"])),
        details("How it was measured", _protocol(measured.get("protocol", {}))),
    )


def _methods_table(measured: Mapping[str, Any], tuned: Mapping[str, Any], metrics: list[str], caption: str) -> Html:
    methods: Mapping[str, Any] = measured["methods"]
    cells = {name: {m: _number(method["mean"].get(m)) for m in metrics} for name, method in methods.items()}
    best = {m: _best(measured, m) if len(methods) > 1 else None for m in metrics}
    header = ["method", *(_metric_head(measured["metrics"][m]) for m in metrics)]
    header += [join([name, element("small", what)]) for name, what in _COSTS]
    rows = []
    for name, method in methods.items():
        # what is equal in print is equally good
        row = [element("strong", cell) if cell == best[m] else cell for m, cell in cells[name].items()]
        rows.append([name, *row, *_costs(method, tuned.get(name, {}))])
    return table(header, rows, caption)


def _metric_head(metric: Mapping[str, Any]) -> Html:
    lower = metric["lower_is_better"]
    arrow = element("span", "↓" if lower else "↑", title="lower is better" if lower else "higher is better")
    return join([metric["label"], " ", arrow, element("small", _UNITS.get(metric["unit"], ""))])


def _best(measured: Mapping[str, Any], metric: str) -> str | None:
    values = [method["mean"].get(metric) for method in measured["methods"].values()]
    known = [value for value in values if value is not None]
    if not known:
        return None
    return _number(min(known) if measured["metrics"][metric]["lower_is_better"] else max(known))


def _costs(method: Mapping[str, Any], tuned: Mapping[str, Any]) -> list[str]:
    record = tuned or method.get("training") or {}
    count = method.get("trainable_parameters")
    if count is None:
        count = (record.get("trainable") or {}).get("total")
    training = record.get("training") or {}
    seconds, memory = training.get("seconds"), training.get("peak_memory_bytes")
    return [
        "–" if count is None else f"{count:,}",
        "–" if seconds is None else format_duration(seconds),
        "–" if memory is None else f"{memory / 2**30:.2f} GiB",
    ]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:#.4g}".rstrip(".")


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


def _problems(measured: Mapping[str, Any]) -> Html | None:
    texts = [f"{entry['scene']} was left out: {entry['reason']}" for entry in measured.get("skipped", [])]
    for name, method in measured["methods"].items():
        texts += [f"{name} failed on {scene}: {reason}" for scene, reason in method.get("failed", {}).items()]
    return element("ul", *(element("li", text) for text in texts)) if texts else None


def _scene_table(measured: Mapping[str, Any], method: str, metrics: list[str]) -> Html:
    header = ["scene", *(_metric_head(measured["metrics"][name]) for name in metrics)]
    rows = [
        [scene, *(_number(values.get(name)) for name in metrics)]
        for scene, values in measured["methods"][method]["per_scene"].items()
    ]
    return join([element("h3", method), table(header, rows)])


def _protocol(protocol: Mapping[str, Any]) -> Html:
    rows = []
    for name, value in protocol.items():
        items = value.items() if isinstance(value, dict) else [("", value)]
        rows += [element("li", f"{f'{name} {key}'.strip().replace('_', ' ')}: {item}") for key, item in items]
    return element("ul", *rows)


def pictures(content: RunContent) -> Html:
    title = "Depth of the test scenes"
    if content.results is None or not content.results.value.get("pictures"):
        return section("pictures", title, element("p", "No pictures were kept in this run.", class_="missing"))
    folder, shown = content.results.path.parent, content.results.value["pictures"]
    explanation = (
        "First frame of each scene. Left: image and true depth. Then each method: its depth after one scale per scene, "
        "in the colours of the true depth, and below it the relative error from 0 (dark) to 0.5 (bright). "
        "Grey: no true depth."
    )
    strips = [_scene_strip(folder, scene) for scene in shown]
    rest = strips[_OPEN_SCENES:]
    more = details(f"{len(rest)} more", *rest) if rest else None
    return section("pictures", title, element("p", explanation, class_="note"), *strips[:_OPEN_SCENES], more)


def _scene_strip(folder: Path, scene: Mapping[str, Any]) -> Html:
    name = scene["scene"]
    columns = [
        _column(
            _tile(folder, scene["image"], f"first image of {name}", "image"),
            _tile(folder, scene["true"], f"true depth of {name}", "true depth"),
        )
    ]
    for method, drawn in scene["methods"].items():
        columns.append(
            _column(
                _tile(folder, drawn["depth"], f"depth of {name} by {method}", method),
                _tile(folder, drawn["error"], f"relative depth error of {name} by {method}", f"{method}, error"),
            )
        )
    low, high = scene["depth_range"]
    heading = element("h3", f"{name} ", element("small", f"depth {low:.2f} to {high:.2f}", class_="note"))
    strip = element("div", *columns, class_="strip", tabindex="0", role="region", aria_label=f"pictures of {name}")
    return join([heading, strip])


def _column(*tiles: Html) -> Html:
    return element("div", *tiles)


def _tile(folder: Path, name: str, alt: str, caption: str) -> Html:
    try:
        path = inside(folder, name, "pictures")
        open_image(path)  # what is embedded is an image, whole and of a bounded size
    except (FileNotFoundError, ValueError):
        return element("p", f"{name} is missing", class_="missing")
    return picture(_shrink(path.read_bytes()), alt, caption)


def _shrink(data: bytes) -> bytes:
    """Pictures wider than a tile can show are reduced, so that the page stays light."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        if image.width <= _WIDEST_PICTURE:
            return data
        size = (_WIDEST_PICTURE, round(image.height * _WIDEST_PICTURE / image.width))
        buffer = io.BytesIO()
        image.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def training(content: RunContent) -> Html:
    from subspace3d.reporting import figures

    title = "Training"
    curves = {
        name: [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
        for name, lines in content.curves.items()
    }
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return section("training", title, element("p", "There are no training curves in this run.", class_="missing"))
    last = "; ".join(f"{name} {points[-1][1]:.3g} after {points[-1][0]} steps" for name, points in curves.items())
    image = picture(
        figures.to_png(figures.draw_training(curves)),
        f"Training loss over optimiser steps. Last values: {last}.",
        "Loss per step (thin) and its running mean over a twentieth of the run (thick).",
    )
    return section("training", title, element("div", image, class_="wide", tabindex="0"))
