"""The comparison of two checkpoints as a figure and as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subspace3d.files import atomic_path
from subspace3d.reporting.analysis_style import RANDOM_COLOUR, attribute_colour, legend, title
from subspace3d.reporting.figures import COLOURS, INK, panels, to_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIDES = ("output", "input")
_MOST_TICKS = 14


def draw_comparison(comparison: Mapping[str, Any], path: Path) -> None:
    """Draw comparison.json as a PNG: overlap by block and side beside the null, where directions were compared; stable
    ranks and shared energy of either checkpoint."""
    from matplotlib.lines import Line2D

    agreement = comparison["agreement"]
    figure, (axes,) = panels(1, 4 if agreement else 2, 4.2, 3.4)
    if agreement:
        for axis, side in zip(axes, _SIDES):
            _draw_blocks(axis, comparison, side)
    _draw_ranks(axes[-2], comparison)
    _draw_shared(axes[-1], comparison)
    attributes = comparison["attributes"]
    handles = [Line2D([], [], color=attribute_colour(a, i), marker="o", label=a) for i, a in enumerate(attributes)]
    if agreement:
        handles.append(Line2D([], [], color=RANDOM_COLOUR, linestyle="--", label="random subspaces"))
        if len(attributes) > 1:
            handles.append(Line2D([], [], color=RANDOM_COLOUR, linestyle=":", label="different attributes"))
    legend(figure, handles)
    with atomic_path(path) as temporary:
        temporary.write_bytes(to_png(figure))


def _draw_blocks(axis: Axes, comparison: Mapping[str, Any], side: str) -> None:
    labels: list[str] = []
    for index, attribute in enumerate(comparison["attributes"]):
        blocks = [block for block in comparison["agreement"][attribute][side]["blocks"] if block["measured"]]
        colour = attribute_colour(attribute, index)
        axis.plot(range(len(blocks)), [block["overlap"] for block in blocks], color=colour, marker="o", markersize=3.5)
        if blocks and blocks[0]["others"] is not None:
            axis.plot(range(len(blocks)), [b["others"] for b in blocks], color=colour, linestyle=":", linewidth=1)
        if len(blocks) > len(labels):
            labels = [_block_name(block).rpartition("aggregator.")[2] for block in blocks]
            axis.plot(range(len(blocks)), [b["random"] for b in blocks], color=RANDOM_COLOUR, linestyle="--")
    step = max(1, -(-len(labels) // _MOST_TICKS))
    axis.set_xticks(range(0, len(labels), step), labels[::step], fontsize=7, rotation=60, ha="right")
    axis.set_ylim(bottom=0)
    axis.set_ylabel("overlap, mean cos² of the angles", fontsize=9, color=INK)
    title(axis, f"{side} side, by block")


def _bars(axis: Axes, comparison: Mapping[str, Any], values: Mapping[str, Sequence[float | None]]) -> None:
    for offset, (name, colour) in enumerate(zip(values, COLOURS[1:])):
        places = [index + 0.36 * (offset - 0.5) for index in range(len(comparison["attributes"]))]
        axis.bar(places, [value or 0.0 for value in values[name]], 0.32, color=colour, label=_model(comparison, name))
    axis.set_xticks(range(len(comparison["attributes"])), comparison["attributes"], fontsize=8)
    axis.legend(fontsize=7, frameon=False)


def _draw_ranks(axis: Axes, comparison: Mapping[str, Any]) -> None:
    spectra = comparison["spectra"]
    medians = {c: [row[a]["stable_rank"]["median"] for a in comparison["attributes"]] for c, row in spectra.items()}
    _bars(axis, comparison, medians)
    title(axis, "stable rank, median over modules")


def _draw_shared(axis: Axes, comparison: Mapping[str, Any]) -> None:
    rows = comparison["shared"]
    measured = all(row[a]["held_out"] is not None for row in rows.values() for a in comparison["attributes"])
    key, of = ("held_out", "an adapter left out") if measured else ("explained", "adapters that took part")
    _bars(
        axis, comparison, {c: [100 * (row[a][key] or 0) for a in comparison["attributes"]] for c, row in rows.items()}
    )
    title(axis, f"energy shared, %, of {of}")


def _model(comparison: Mapping[str, Any], name: str) -> str:
    return f"{name}: {comparison['base_models'][name]}"


def _block_name(block: Mapping[str, Any]) -> str:
    return block["family"] if block["layer"] is None else f"{block['family']}.{block['layer']}"


def attribute_table(comparison: Mapping[str, Any]) -> list[str]:
    """A Markdown table with a row for each attribute."""
    agreement = comparison["agreement"]
    heads = ["attribute"]
    if agreement:
        heads += [f"{side}: {what}" for side in _SIDES for what in ("agree", "overlap", "random", "others")]
    heads += [f"stable rank {c}" for c in "AB"] + [f"shared {c}, %" for c in "AB"] + [f"left out {c}, %" for c in "AB"]
    rows = []
    for attribute in comparison["attributes"]:
        row = [attribute]
        for side in _SIDES if agreement else ():
            level = agreement[attribute][side]
            row += [f"{level['agree']} of {level['measured']}", *map(_number, _levels(level))]
        row += [_number(comparison["spectra"][c][attribute]["stable_rank"]["median"], 2) for c in "AB"]
        for key in ("explained", "held_out"):
            row += [_number(_percent(comparison["shared"][c][attribute][key]), 1) for c in "AB"]
        rows.append(row)
    return _table(heads, rows)


def block_table(comparison: Mapping[str, Any]) -> list[str]:
    """A Markdown table with a row for each attribute, side and block; empty where no directions were compared."""
    if comparison["agreement"] is None:
        return []
    rows = []
    for attribute in comparison["attributes"]:
        for side in _SIDES:
            for block in comparison["agreement"][attribute][side]["blocks"]:
                agree = f"{block['agree']} of {block['measured']}"
                rows.append([attribute, side, _block_name(block), agree, *map(_number, _levels(block))])
    return _table(["attribute", "side", "block", "agree", "overlap", "random", "others"], rows)


def _levels(level: Mapping[str, Any]) -> list[float | None]:
    return [level["overlap"], level["random"], level["others"]]


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[index]) for row in [heads, *rows]) for index in range(len(heads))]
    lines = [heads, ["-" * width for width in widths], *rows]
    return ["| " + " | ".join(text.ljust(width) for text, width in zip(line, widths)) + " |" for line in lines]
