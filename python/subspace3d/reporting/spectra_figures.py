"""Figures of the spectra: singular values, the largest one by layer, and how each module's spectrum behaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from subspace3d.reporting.analysis_style import attribute_colour, by_layer, families, kinds, legend, title
from subspace3d.reporting.figures import INK, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LINE_STYLES: tuple[Literal["-", "--"], ...] = ("-", "--")
_MARKERS = ("o", "s")
_FLOOR = 1e-5
# the paper's colours of its four kinds of curves: black, red, blue, green
_BEHAVIOUR_COLOURS: dict[str | None, str] = {
    "at rank": "#222222",
    "at rank and beyond": "#D55E00",
    "beyond rank": "#0072B2",
    "none": "#8FCFB0",
    None: "#EEEEEE",
}


def draw_spectra(analysis: Mapping[str, Any]) -> Figure:
    """Singular values of every module over the first one; a row per attribute, a column per kind of module."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    modules, attributes = analysis["modules"], analysis["attributes"]
    columns = kinds(modules)
    layers = [
        module["layer"] for module in modules.values() if module["layer"] is not None and module["kind"] in columns
    ]
    depth = Normalize(0, max([1, *layers]))
    colours = colormaps["viridis"].resampled(256)
    figure, axes = panels(len(attributes), len(columns), 2.9, 2.2, sharex=True, sharey=True)
    lowest = 1.0
    for row, attribute in zip(axes, attributes):
        for axis, kind in zip(row, columns):
            names = [name for name, module in modules.items() if module["kind"] == kind]
            for name in names:
                values = analysis["spectra"][attribute][name]["singular_values"]
                if not values or values[0] <= 0:
                    continue
                normalised = [max(value / values[0], _FLOOR) for value in values]
                lowest = min(lowest, normalised[-1])
                colour = colours(0.92 * depth(modules[name]["layer"] or 0))
                axis.plot(range(1, len(values) + 1), normalised, color=colour, linewidth=1.0, alpha=0.85)
            _mark_ranks(axis, [analysis["spectra"][attribute][name] for name in names])
            axis.set_yscale("log")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
            if axis in axes[0]:
                title(axis, kind)
            if axis in axes[-1]:
                axis.set_xlabel("index i", fontsize=8.5)
        row[0].set_ylabel(f"{attribute}\nsᵢ / s₁", fontsize=9, color=INK)
    axes[0][0].set_ylim(0.7 * lowest, 1.4)
    bar = figure.colorbar(
        ScalarMappable(depth, colours),
        ax=[axis for row in axes for axis in row],
        pad=0.01,
        aspect=40,
        shrink=0.8,
        ticks=MaxNLocator(integer=True, nbins=8),
    )
    bar.set_label("layer", fontsize=8.5)
    bar.ax.tick_params(labelsize=8)
    return figure


def _mark_ranks(axis: Axes, spectra: Sequence[Mapping[str, Any]]) -> None:
    for key, label, style in (("rank", "r", ":"), ("k", "k", "--")):
        values = {spectrum[key] for spectrum in spectra if spectrum[key]}
        if len(values) == 1 and not (key == "k" and values == {spectra[0]["rank"]}):
            at = values.pop()
            axis.axvline(at + 0.5, color="#888888", linestyle=style, linewidth=0.9)
            axis.annotate(
                label, (at + 0.5, 0.98), xycoords=("data", "axes fraction"), xytext=(3, 0), textcoords="offset points",
                va="top", fontsize=8, color="#666666", style="italic",
            )  # fmt: skip


def draw_largest(analysis: Mapping[str, Any]) -> Figure:
    """Largest singular value over the layers; a panel per kind of module, a colour per attribute."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    modules, attributes = analysis["modules"], analysis["attributes"]
    columns = kinds(modules)
    lines = families(modules)
    figure, axes = panels(1, len(columns), 2.9, 2.6)
    values: list[float] = []
    for axis, kind in zip(axes[0], columns):
        for index, attribute in enumerate(attributes):
            for family, style, marker in zip(lines, _LINE_STYLES, _MARKERS):
                points = [
                    (module["layer"] or 0, analysis["spectra"][attribute][name]["singular_values"][0])
                    for name, module in modules.items()
                    if module["kind"] == kind and module["family"] == family
                ]
                if points:
                    x, y = zip(*sorted(points))
                    values += y
                    axis.plot(
                        x,
                        y,
                        style,
                        color=attribute_colour(attribute, index),
                        marker=marker,
                        markersize=3.2,
                        linewidth=1.4,
                    )
        title(axis, kind)
        axis.set_xlabel("layer", fontsize=8.5)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    positive = [value for value in values if value > 0]
    log = bool(positive) and max(positive) > 20 * min(positive)
    for axis in axes[0]:
        if log:
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
    axes[0][0].set_ylabel("largest singular value", fontsize=9)
    handles = [Line2D([], [], color=attribute_colour(name, i), label=name) for i, name in enumerate(attributes)]
    if len(lines) > 1:
        handles += [
            Line2D([], [], color=INK, linestyle=style, marker=marker, markersize=3.5, label=family)
            for family, style, marker in zip(lines, _LINE_STYLES, _MARKERS)
        ]
    legend(figure, handles)
    return figure


def draw_behaviours(analysis: Mapping[str, Any]) -> Figure | None:
    """How the spectrum of every module behaves; a panel per attribute, a row per kind and family, a cell per layer.

    None where no attribute was mined by the model mean, the only one whose spectra tell.
    """
    if "mean" not in analysis["models"].values():
        return None
    from matplotlib.patches import Patch, Rectangle
    from matplotlib.ticker import MaxNLocator

    modules, attributes = analysis["modules"], analysis["attributes"]
    rows = [(kind, family) for kind in kinds(modules) for family in families(modules)]
    rows = [row for row in rows if by_layer(modules, *row)]
    columns = min(2, len(attributes))
    height = 1.2 + 0.2 * len(rows)
    figure, axes = panels(-(-len(attributes) // columns), columns, 5.2, height, sharex=True, sharey=True)
    flat = [axis for row in axes for axis in row]
    last = 0
    seen: set[str | None] = set()
    for axis, attribute in zip(flat, attributes):
        for row, (kind, family) in enumerate(rows):
            for layer, name in by_layer(modules, kind, family):
                behaviour = analysis["spectra"][attribute][name]["behaviour"]
                colour = _BEHAVIOUR_COLOURS[behaviour]
                axis.add_patch(Rectangle((layer - 0.45, row - 0.42), 0.9, 0.84, facecolor=colour, linewidth=0))
                last = max(last, layer)
                seen.add(behaviour)
        # not in the attribute's colour, which may be that of a behaviour
        title(axis, attribute)
        axis.grid(False)
        axis.tick_params(left=False)
        axis.tick_params(axis="y", labelsize=7.5)
    for axis in flat[len(attributes) :]:
        axis.set_visible(False)
    axis = flat[0]
    axis.set_xlim(-0.6, last + 0.6)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    labels = [f"{kind}  {_short(family)}" for kind, family in rows]
    axis.set_yticks(range(len(rows)), labels)
    for axis in flat[max(0, len(attributes) - columns) : len(attributes)]:
        axis.set_xlabel("layer", fontsize=8.5)
    names: dict[str | None, str] = {
        "at rank": "drop at r",
        "at rank and beyond": "drop at r and later",
        "beyond rank": "drop later than r",
        "none": "no drop",
    }
    if None in seen:
        names[None] = "spectrum ends at r"
    legend(figure, [Patch(color=_BEHAVIOUR_COLOURS[key], label=name) for key, name in names.items()])
    return figure


def _short(family: str) -> str:
    """``aggregator.frame_blocks`` -> ``frame``."""
    return family.rpartition(".")[2].removesuffix("_blocks")
