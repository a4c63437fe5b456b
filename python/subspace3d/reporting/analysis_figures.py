"""The figures of the analysis, drawn by matplotlib from the content of analysis.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from subspace3d import files
from subspace3d.reporting.figures import COLOURS, INK, panels, to_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ATTRIBUTE_COLOURS = dict(zip(("texture", "geometry", "camera", "lighting"), COLOURS))
# Pairs of attributes: none of the colours above, so that no pair is taken for an attribute.
_PAIR_COLOURS = ("#332288", "#44AA99", "#AA4499", "#C4A000", "#88CCEE", "#882255", "#117733", "#777777")
_RANDOM_COLOUR = "#777777"
_LINE_STYLES: tuple[Literal["-", "--"], ...] = ("-", "--")
_MARKERS = ("o", "s")

_MOST_KINDS = 4
_USUAL_KINDS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
_TYPICAL_MODULES = 3
_FLOOR = 1e-5


def draw_analysis(analysis: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw ``spectra.png``, ``largest.png``, ``disentanglement.png`` (two attributes or more), ``weights.png``.

    Args:
        analysis: what `subspace3d.mining.analyze.analyze` returns, or its JSON file read again.
        folder: where the figures go; made if needed.

    Returns:
        the files written.
    """
    written = []
    for name, draw in DRAWERS.items():
        figure = draw(analysis)
        if figure is not None:
            path = Path(folder) / f"{name}.png"
            with files.atomic_path(path) as temporary:
                temporary.write_bytes(to_png(figure))
            written.append(path)
    return written


def attribute_colour(name: str, index: int) -> str:
    return _ATTRIBUTE_COLOURS.get(name, COLOURS[(index + 4) % len(COLOURS)])


def _title(axis: Axes, text: str, colour: str = INK) -> None:
    axis.set_title(text, fontsize=9.5, color=colour, loc="left")


def _kinds(modules: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The kinds with the most modules: those of a transformer block first, the others by name."""
    counts = Counter(module["kind"] for module in modules.values())
    order = {kind: index for index, kind in enumerate(_USUAL_KINDS)}
    chosen = [kind for kind, _ in counts.most_common(_MOST_KINDS)]
    return sorted(chosen, key=lambda kind: (order.get(kind, len(order)), kind))


def draw_spectra(analysis: Mapping[str, Any]) -> Figure:
    """Singular values of every module over the first one; a row per attribute, a column per kind of module."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    modules, attributes = analysis["modules"], analysis["attributes"]
    kinds = _kinds(modules)
    layers = [module["layer"] for module in modules.values() if module["layer"] is not None and module["kind"] in kinds]
    depth = Normalize(0, max([1, *layers]))
    colours = colormaps["viridis"].resampled(256)
    figure, axes = panels(len(attributes), len(kinds), 2.9, 2.2, sharex=True, sharey=True)
    lowest = 1.0
    for row, attribute in zip(axes, attributes):
        for axis, kind in zip(row, kinds):
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
                _title(axis, kind)
            if axis in axes[-1]:
                axis.set_xlabel("index i", fontsize=8.5)
        row[0].set_ylabel(f"{attribute}\n$s_i\\,/\\,s_1$", fontsize=9, color=INK)
    axes[0][0].set_ylim(0.7 * lowest, 1.4)
    bar = figure.colorbar(
        ScalarMappable(depth, colours), ax=[axis for row in axes for axis in row], pad=0.01, aspect=40, shrink=0.8
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
    kinds = _kinds(modules)
    families = [name for name, _ in Counter(m["family"] for m in modules.values() if m["kind"] in kinds).most_common(2)]
    figure, axes = panels(1, len(kinds), 2.9, 2.6)
    values: list[float] = []
    for axis, kind in zip(axes[0], kinds):
        for index, attribute in enumerate(attributes):
            for family, style, marker in zip(families, _LINE_STYLES, _MARKERS):
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
        _title(axis, kind)
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
    if len(families) > 1:
        handles += [
            Line2D([], [], color=INK, linestyle=style, marker=marker, markersize=3.5, label=family)
            for family, style, marker in zip(families, _LINE_STYLES, _MARKERS)
        ]
    _legend(figure, handles)
    return figure


def _legend(figure: Figure, handles: Sequence[Any]) -> None:
    rows = 1 + len(handles) // 7
    columns = -(-len(handles) // rows)
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False, fontsize=9)


def draw_disentanglement(analysis: Mapping[str, Any]) -> Figure | None:
    """Eigenvalues ``1 - cos(theta)``: the smallest over all modules, and all of them for typical modules."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    result = analysis["disentanglement"]
    pairs = [" / ".join(pair["attributes"]) for pair in result["output"]]
    if not pairs:
        return None
    colours = [_PAIR_COLOURS[index % len(_PAIR_COLOURS)] for index in range(len(pairs))]
    typical = _typical_modules(analysis)
    figure, axes = panels(2, 1 + len(typical), 2.9, 2.5)
    for row, side in zip(axes, ("output", "input")):
        _draw_smallest(row[0], result, side, colours)
        row[0].set_ylabel(f"{side} side\n$1 - \\cos\\theta$", fontsize=9.5, color=INK)
        for axis, name in zip(row[1:], typical):
            level = result["random"][result[side][0]["modules"][name]["random"]]
            axis.fill_between(
                range(1, len(level["mean"]) + 1), level["low"], level["high"], color=_RANDOM_COLOUR, alpha=0.25, lw=0
            )
            for pair, colour in zip(result[side], colours):
                values = pair["modules"][name]["eigenvalues"]
                axis.plot(range(1, len(values) + 1), values, color=colour, marker="o", markersize=2.6, linewidth=1.3)
            axis.set_ylim(-0.03, 1.05)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
            if side == "output":
                _title(axis, name.removeprefix("aggregator."))
            else:
                axis.set_xlabel("index, ascending", fontsize=8.5)
    _title(axes[0][0], "smallest, all modules")
    handles: list[Line2D | Patch] = []
    for pair, colour in zip(pairs, colours):
        handles.append(Line2D([], [], color=colour, marker="o", markersize=3, label=pair))
    handles.append(Patch(color=_RANDOM_COLOUR, alpha=0.4, lw=0, label="random subspaces, 5 to 95 %"))
    _legend(figure, handles)
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
        axis.plot([index - 0.36, index + 0.36], [chance, chance], color=_RANDOM_COLOUR, linewidth=3, alpha=0.6)
        axis.plot([index - 0.36, index + 0.36], [mean, mean], color=colour, linewidth=2.2)
    axis.set_xticks([])
    axis.set_ylim(-0.03, 1.05)


def _typical_modules(analysis: Mapping[str, Any]) -> list[str]:
    """Modules of the first kind, spread evenly over the depth of the network."""
    kind = _kinds(analysis["modules"])[0]
    names = [name for name, module in analysis["modules"].items() if module["kind"] == kind]
    names.sort(key=lambda name: (analysis["modules"][name]["layer"] or 0, name))
    if len(names) <= _TYPICAL_MODULES:
        return names
    return [names[round(index * (len(names) - 1) / (_TYPICAL_MODULES - 1))] for index in range(_TYPICAL_MODULES)]


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
        axis.axhline(1, color=_RANDOM_COLOUR, linewidth=1, linestyle="--")
        labels = [name if len(name) <= 18 else f"…{name[-17:]}" for name in weights["adapters"]]
        slanted = sum(map(len, labels)) > 50
        axis.set_xticks(
            range(len(labels)), labels, rotation=25 if slanted else 0, ha="right" if slanted else "center", fontsize=7.5
        )
        axis.set_ylim(0, 1.08 * max(1.0, highest))
        _title(axis, attribute, colour)
    for axis in flat[len(attributes) :]:
        axis.set_visible(False)
    for row in axes:
        row[0].set_ylabel("weight / mean weight", fontsize=8.5)
    return figure


DRAWERS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "spectra": draw_spectra,
    "largest": draw_largest,
    "disentanglement": draw_disentanglement,
    "weights": draw_weights,
}
