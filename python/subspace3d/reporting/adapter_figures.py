"""Figures of the adapters: their weights, how stable the subspace is without one, how much of each it explains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from subspace3d.reporting.analysis_style import (
    RANDOM_COLOUR,
    attribute_colour,
    by_layer,
    families,
    finish_layers,
    kinds,
    legend,
    title,
)
from subspace3d.reporting.figures import INK, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_weights(analysis: Mapping[str, Any]) -> Figure:
    """Weight of each adapter over the mean weight: a point per module, a bar at the mean; 1 is like the others."""
    attributes = analysis["attributes"]
    columns = min(2, len(attributes))
    rows = -(-len(attributes) // columns)
    figure, axes = panels(rows, columns, 4.6, 2.3, sharey=True)
    flat = [axis for row in axes for axis in row]
    highest = max(max(row) for name in attributes for row in analysis["weights"][name]["modules"].values())
    for index, (axis, attribute) in enumerate(zip(flat, attributes)):
        weights, colour = analysis["weights"][attribute], attribute_colour(attribute, index)
        points = list(weights["modules"].values())
        for adapter, mean in enumerate(weights["mean"]):
            offsets = [adapter + 0.25 * (2 * place / max(1, len(points) - 1) - 1) for place in range(len(points))]
            axis.plot(offsets, [row[adapter] for row in points], "o", color=colour, markersize=2.4, alpha=0.35, mew=0)
            axis.plot([adapter - 0.36, adapter + 0.36], [mean, mean], color=colour, linewidth=2.4)
        axis.axhline(1, color=RANDOM_COLOUR, linewidth=1, linestyle="--")
        labels = [name if len(name) <= 18 else f"…{name[-17:]}" for name in weights["adapters"]]
        slanted = sum(map(len, labels)) > 50
        axis.set_xticks(
            range(len(labels)), labels, rotation=25 if slanted else 0, ha="right" if slanted else "center", fontsize=7.5
        )
        axis.set_ylim(0, 1.08 * max(1.0, highest))
        title(axis, attribute, colour)
    for axis in flat[len(attributes) :]:
        axis.set_visible(False)
    for row in axes:
        row[0].set_ylabel("weight / mean weight", fontsize=8.5)
    return figure


def draw_stability(analysis: Mapping[str, Any]) -> Figure | None:
    """Overlap of the subspace with the one mined without one adapter, over the layers: mean, least and largest."""
    from matplotlib.lines import Line2D

    modules, validation = analysis["modules"], analysis["cross_validation"]
    stability = {name: entry for name, entry in (validation or {"stability": {}})["stability"].items() if entry}
    if not stability:
        return None
    columns = kinds(modules)
    figure, axes = panels(2, len(columns), 2.9, 2.2, sharex=True, sharey=True)
    for row, side in zip(axes, ("output", "input")):
        for axis, kind in zip(row, columns):
            layers = _by_layer_of_all_families(modules, kind)
            for index, attribute in enumerate(analysis["attributes"]):
                if attribute not in stability:
                    continue
                found = stability[attribute][side]["modules"]
                values = [
                    (layer, [value for name in names for value in found[name] if value is not None])
                    for layer, names in layers.items()
                ]
                x = [layer for layer, overlaps in values if overlaps]
                spans = [overlaps for _, overlaps in values if overlaps]
                colour = attribute_colour(attribute, index)
                axis.fill_between(x, [min(s) for s in spans], [max(s) for s in spans], color=colour, alpha=0.13, lw=0)
                means = [sum(s) / len(s) for s in spans]
                axis.plot(x, means, color=colour, marker="o", markersize=2.8, linewidth=1.5)
            key = "out" if side == "output" else "in"
            k = analysis["spectra"][analysis["attributes"][0]]
            chance = [k[names[0]]["k"] / modules[names[0]][key] for names in layers.values()]
            axis.plot(list(layers), chance, color=RANDOM_COLOUR, linewidth=1.4, linestyle="--")
        row[0].set_ylabel(f"{side} side\nmean cos² θ", fontsize=9, color=INK)
    finish_layers(axes, columns)
    handles = [
        Line2D([], [], color=attribute_colour(name, index), marker="o", markersize=3, label=name)
        for index, name in enumerate(analysis["attributes"])
        if name in stability
    ]
    handles.append(Line2D([], [], color=RANDOM_COLOUR, linestyle="--", label="random subspaces"))
    legend(figure, handles)
    return figure


def _by_layer_of_all_families(modules: Mapping[str, Mapping[str, Any]], kind: str) -> dict[int, list[str]]:
    layers: dict[int, list[str]] = {}
    for family in families(modules):
        for layer, name in by_layer(modules, kind, family):
            layers.setdefault(layer, []).append(name)
    return dict(sorted(layers.items()))


def draw_explained(analysis: Mapping[str, Any]) -> Figure | None:
    """Share of an adapter's energy inside each subspace: means per pair of attributes, and every adapter."""
    from matplotlib.lines import Line2D

    validation, attributes = analysis["cross_validation"], analysis["attributes"]
    if not validation:
        return None
    explained = validation["explained"]
    count = sum(len(entry["adapters"]) for entry in explained.values())
    widths = [1.1 + 0.62 * (len(attributes) + 2), max(3.2, 1.0 + 0.3 * count)]
    figure, ((table, points),) = panels(
        1, 2, sum(widths) / 2, 1.1 + 0.62 * max(3, len(attributes)), width_ratios=widths
    )
    _draw_share_table(table, attributes, explained)

    x = 0.0
    ticks: list[float] = []
    for attribute in attributes:
        entry = explained[attribute]
        start = x
        for adapter in range(len(entry["adapters"])):
            for index, other in enumerate(attributes):
                share = entry["subspaces"][other]["adapters"][adapter]
                if share is None:
                    continue
                own = other == attribute
                # the others lie close together near zero
                offset = 0 if own else 0.22 * (index - 0.5 * (len(attributes) - 1))
                size, shape = (6.0, "o") if own else (4.0, "D")
                colour = attribute_colour(other, index)
                points.plot(x + offset, 100 * share, shape, color=colour, markersize=size, mew=0, clip_on=False)
            for source, style in (("held_out", _HELD_OUT), ("random", _RANDOM)):
                share = entry[source] and entry[source]["adapters"][adapter]
                if share is not None:
                    points.plot(x, 100 * share, **style)
            x += 1
        ticks.append((start + x - 1) / 2)
        points.axvline(x, color="#cccccc", linewidth=0.8)
        x += 1
    points.set_xlim(-1, x - 1)
    points.set_ylim(bottom=-0.02 * points.get_ylim()[1])
    points.set_xticks(ticks, [f"adapters of\n{name}" for name in attributes], fontsize=8)
    points.grid(False, axis="x")
    points.set_ylabel("energy inside the subspace, %", fontsize=8.5)
    title(points, "every adapter")
    handles = [
        Line2D(
            [], [], color=attribute_colour(name, i), linestyle="", marker="o", markersize=5, label=f"{name} subspace"
        )
        for i, name in enumerate(attributes)
    ]
    handles.append(Line2D([], [], linestyle="", label="own, held out", **_HELD_OUT))
    handles.append(Line2D([], [], linestyle="", label="random subspaces", **_RANDOM))
    legend(figure, handles)
    return figure


_HELD_OUT: dict[str, Any] = {
    "marker": "o", "markersize": 8.5, "markerfacecolor": "none", "markeredgecolor": INK, "markeredgewidth": 1.2,
}  # fmt: skip
_RANDOM: dict[str, Any] = {"marker": "_", "markersize": 9, "color": RANDOM_COLOUR, "markeredgewidth": 2}


def _draw_share_table(axis: Axes, attributes: Sequence[str], explained: Mapping[str, Any]) -> None:
    """Rows: the adapters of an attribute; columns: the subspaces they are projected on; own one and held-out framed."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    columns = [*attributes, "own,\nheld out", "random"]
    shades = colormaps["Blues"]
    rows = []
    for attribute in attributes:
        entry = explained[attribute]
        extra = [entry["held_out"] and entry["held_out"]["mean"], entry["random"]["mean"]]
        rows.append([entry["subspaces"][other]["mean"] for other in attributes] + extra)
    largest = max([1e-9, *(value for row in rows for value in row if value is not None)])
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            shade = 0.0 if value is None else value / largest
            edge = INK if x in (y, len(attributes)) else "white"
            axis.add_patch(
                Rectangle((x - 0.47, y - 0.46), 0.94, 0.92, facecolor=shades(0.05 + 0.8 * shade), edgecolor=edge)
            )
            text = "–" if value is None else f"{100 * value:.1f}"
            axis.text(x, y, text, ha="center", va="center", fontsize=9, color="white" if shade > 0.6 else INK)
    axis.set_xlim(-0.55, len(columns) - 0.45)
    axis.set_ylim(len(rows) - 0.45, -0.55)
    axis.set_xticks(range(len(columns)), columns, fontsize=7.5)
    axis.set_yticks(range(len(rows)), attributes, fontsize=8)
    axis.tick_params(length=0)
    axis.grid(False)
    axis.spines[["left", "bottom"]].set_visible(False)
    axis.set_ylabel("adapters of", fontsize=8.5)
    axis.set_xlabel("subspace of", fontsize=8.5)
    title(axis, "mean energy inside, %")
