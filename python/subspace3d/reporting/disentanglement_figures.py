"""Figures of the angles between the subspaces of two attributes, beside those of random subspaces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from subspace3d.reporting.analysis_style import (
    RANDOM_COLOUR,
    by_layer,
    families,
    finish_layers,
    kinds,
    legend,
    pair_colour,
    title,
)
from subspace3d.reporting.figures import INK, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TYPICAL_MODULES = 3


def draw_disentanglement(analysis: Mapping[str, Any]) -> Figure | None:
    """Eigenvalues ``1 - cos(theta)``: the smallest over all modules, and all of them for typical modules."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    result = analysis["disentanglement"]
    pairs = [" / ".join(pair["attributes"]) for pair in result["output"]]
    if not pairs:
        return None
    colours = [pair_colour(index) for index in range(len(pairs))]
    typical = _typical_modules(analysis)
    figure, axes = panels(2, 1 + len(typical), 2.9, 2.5)
    for row, side in zip(axes, ("output", "input")):
        _draw_smallest(row[0], result, side, colours)
        row[0].set_ylabel(f"{side} side\n1 − cos θ", fontsize=9.5, color=INK)
        for axis, name in zip(row[1:], typical):
            level = result["random"][result[side][0]["modules"][name]["random"]]
            axis.fill_between(
                range(1, len(level["mean"]) + 1), level["low"], level["high"], color=RANDOM_COLOUR, alpha=0.25, lw=0
            )
            for pair, colour in zip(result[side], colours):
                values = pair["modules"][name]["eigenvalues"]
                axis.plot(range(1, len(values) + 1), values, color=colour, marker="o", markersize=2.6, linewidth=1.3)
            axis.set_ylim(-0.03, 1.05)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
            if side == "output":
                title(axis, name.removeprefix("aggregator."))
            else:
                axis.set_xlabel("index, ascending", fontsize=8.5)
    title(axes[0][0], "smallest, all modules")
    handles: list[Line2D | Patch] = []
    for pair, colour in zip(pairs, colours):
        handles.append(Line2D([], [], color=colour, marker="o", markersize=3, label=pair))
    handles.append(Patch(color=RANDOM_COLOUR, alpha=0.4, lw=0, label="random subspaces, 5 to 95 %"))
    legend(figure, handles)
    return figure


def _draw_smallest(axis: Axes, result: Mapping[str, Any], side: str, colours: Sequence[str]) -> None:
    """A column of points per pair, one point per module; a bar at their mean, a grey bar where chance would put it."""
    for index, (pair, colour) in enumerate(zip(result[side], colours)):
        values = [row["eigenvalues"][0] for row in pair["modules"].values() if row["eigenvalues"]]
        offsets = [index + 0.24 * (2 * position / max(1, len(values) - 1) - 1) for position in range(len(values))]
        axis.plot(offsets, values, "o", color=colour, markersize=2.4, alpha=0.45, markeredgewidth=0)
        mean, chance = pair["mean_smallest"], pair["mean_smallest_random"]
        if mean is None:
            continue
        axis.plot([index - 0.36, index + 0.36], [chance, chance], color=RANDOM_COLOUR, linewidth=3, alpha=0.6)
        axis.plot([index - 0.36, index + 0.36], [mean, mean], color=colour, linewidth=2.2)
    axis.set_xticks([])
    axis.set_ylim(-0.03, 1.05)


def _typical_modules(analysis: Mapping[str, Any]) -> list[str]:
    """Modules of the first kind, spread evenly over the depth of the network."""
    kind = kinds(analysis["modules"])[0]
    names = [name for name, module in analysis["modules"].items() if module["kind"] == kind]
    names.sort(key=lambda name: (analysis["modules"][name]["layer"] or 0, name))
    if len(names) <= _TYPICAL_MODULES:
        return names
    return [names[round(index * (len(names) - 1) / (_TYPICAL_MODULES - 1))] for index in range(_TYPICAL_MODULES)]


def draw_disentanglement_layers(analysis: Mapping[str, Any]) -> Figure | None:
    """Smallest eigenvalue over the layers: a row per side and family, a column per kind, a line per pair."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    modules, result = analysis["modules"], analysis["disentanglement"]
    pairs = [" / ".join(pair["attributes"]) for pair in result["output"]]
    if not pairs:
        return None
    columns = kinds(modules)
    rows = [(side, family) for side in ("output", "input") for family in families(modules)]
    figure, axes = panels(len(rows), len(columns), 2.9, 1.7, sharex=True, sharey=True)
    for line, (side, family) in zip(axes, rows):
        for axis, kind in zip(line, columns):
            names = by_layer(modules, kind, family)
            if not names:
                continue
            levels = [result["random"][result[side][0]["modules"][name]["random"]] for _, name in names]
            low, high = ([level[end][0] for level in levels] for end in ("low", "high"))
            layers = [layer for layer, _ in names]
            # a band of its own width where there is one layer only
            axis.fill_between(layers, low, high, color=RANDOM_COLOUR, alpha=0.3, lw=2)
            for index, pair in enumerate(result[side]):
                points = [
                    (layer, row["eigenvalues"][0])
                    for layer, name in names
                    if (row := pair["modules"][name])["eigenvalues"]
                ]
                if points:
                    axis.plot(*zip(*points), color=pair_colour(index), marker="o", markersize=2.6, linewidth=1.2)
        line[0].set_ylabel(f"{side}\n{family.rpartition('.')[2]}", fontsize=8.5, color=INK)
    finish_layers(axes, columns)
    handles: list[Line2D | Patch] = [
        Line2D([], [], color=pair_colour(index), marker="o", markersize=3, label=pair)
        for index, pair in enumerate(pairs)
    ]
    handles.append(Patch(color=RANDOM_COLOUR, alpha=0.4, lw=0, label="random subspaces, 5 to 95 %"))
    legend(figure, handles)
    return figure
