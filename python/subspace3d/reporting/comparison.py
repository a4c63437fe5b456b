"""The comparison of two checkpoints as a figure and as tables."""

from __future__ import annotations

import math
import statistics
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
    """Write `comparison_png` to a file."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(comparison_png(comparison))


def comparison_png(comparison: Mapping[str, Any]) -> bytes:
    """comparison.json as a PNG: overlap by block and side beside the null, where directions were compared; stable ranks
    and shared energy of either checkpoint."""
    agreement = comparison["agreement"]
    rows = 2 if agreement else 1
    figure, axes = panels(rows, 2, 6.0, 3.4)
    if agreement:
        for axis, side in zip(axes[0], _SIDES):
            _draw_blocks(axis, comparison, side)
        legend(figure, _handles(comparison))
    _draw_ranks(axes[-1][0], comparison)
    _draw_shared(axes[-1][1], comparison)
    return to_png(figure)


def _handles(comparison: Mapping[str, Any]) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    attributes = comparison["attributes"]
    handles: list[Any] = [
        Line2D([], [], color=attribute_colour(a, i), marker="o", label=a) for i, a in enumerate(attributes)
    ]
    said = "half of its modules or fewer agree"
    handles.append(Line2D([], [], color=INK, linestyle="", marker="o", markerfacecolor="white", label=said))
    handles.append(Patch(facecolor=RANDOM_COLOUR, alpha=0.3, label="random subspaces: mean to threshold"))
    if len(attributes) > 1:
        handles.append(Line2D([], [], color=RANDOM_COLOUR, linestyle=":", label="different attributes"))
    return handles


def _draw_blocks(axis: Axes, comparison: Mapping[str, Any], side: str) -> None:
    """Blocks in the order of the layers; one where nothing was trained on either side has a gap."""
    order = block_order(comparison, side)
    null = _null(comparison, side, order)
    axis.fill_between(
        range(len(order)), [low for low, _ in null], [high for _, high in null], color=RANDOM_COLOUR, alpha=0.3,
        linewidth=0,
    )  # fmt: skip
    for index, attribute in enumerate(comparison["attributes"]):
        blocks = {block_name(block): block for block in comparison["agreement"][attribute][side]["blocks"]}
        values = [_gap(blocks[name]["overlap"]) if name in blocks else math.nan for name in order]
        others = [_gap(blocks[name]["others"]) if name in blocks else math.nan for name in order]
        colour = attribute_colour(attribute, index)
        axis.plot(range(len(order)), values, color=colour, linewidth=1.3)
        axis.plot(range(len(order)), others, color=colour, linestyle=":", linewidth=1)
        for at, name in enumerate(order):
            face = colour if name in blocks and agrees(blocks[name]) else "white"
            axis.plot([at], [values[at]], color=colour, marker="o", markersize=4.5, markerfacecolor=face)
    step = max(1, -(-len(order) // _MOST_TICKS))
    axis.set_xticks(range(0, len(order), step), _short(order)[::step], fontsize=7, rotation=60, ha="right")
    axis.set_ylim(bottom=0)
    axis.set_ylabel("overlap, mean cos² of the angles", fontsize=9, color=INK)
    title(axis, f"{side} side, by block")


def _gap(value: float | None) -> float:
    return math.nan if value is None else value


def block_order(comparison: Mapping[str, Any], side: str) -> list[str]:
    """Names of the blocks of all attributes, in the order of the layers."""
    tables = (comparison["agreement"][attribute][side]["blocks"] for attribute in comparison["attributes"])
    return list(dict.fromkeys(block_name(block) for blocks in tables for block in blocks))


def _null(comparison: Mapping[str, Any], side: str, order: Sequence[str]) -> list[tuple[float, float]]:
    """Mean and threshold of the overlap of random subspaces in every block, means over its modules."""
    sizes = comparison["agreement"]["random"]
    found: dict[str, list[Mapping[str, float]]] = {name: [] for name in order}
    for attribute in comparison["attributes"]:
        for name, row in comparison["agreement"][attribute][side]["modules"].items():
            if row["random"] is not None:
                found.setdefault(block_name(comparison["modules"][name]), []).append(sizes[row["random"]])
    levels = []
    for name in order:
        rows = found[name]
        values = [statistics.fmean(row[key] for row in rows) if rows else math.nan for key in ("mean", "threshold")]
        levels.append((values[0], values[1]))
    return levels


def agrees(block: Mapping[str, Any]) -> bool:
    """Whether more than half of a block's modules agree."""
    return 2 * block["agree"] > block["measured"]


def agreeing_blocks(comparison: Mapping[str, Any], attribute: str, side: str) -> list[str]:
    """Short names of the blocks that agree, in the order of the layers."""
    order = block_order(comparison, side)
    agreeing = {block_name(b) for b in comparison["agreement"][attribute][side]["blocks"] if agrees(b)}
    return [short for name, short in zip(order, _short(order)) if name in agreeing]


def _short(names: Sequence[str]) -> list[str]:
    """``names`` without the modules that all of them lie in."""
    parts = [name.split(".") for name in names]
    same = 0
    while all(len(part) > same + 2 and part[same] == parts[0][same] for part in parts):
        same += 1
    return [".".join(part[same:]) for part in parts] if parts else []


def _bars(axis: Axes, comparison: Mapping[str, Any], values: Mapping[str, Sequence[float | None]]) -> None:
    for offset, (name, colour) in enumerate(zip(values, COLOURS[1:])):
        places = [index + 0.36 * (offset - 0.5) for index in range(len(comparison["attributes"]))]
        axis.bar(places, [value or 0.0 for value in values[name]], 0.32, color=colour, label=_model(comparison, name))
    axis.set_xticks(range(len(comparison["attributes"])), comparison["attributes"], fontsize=8)
    axis.set_ylim(top=1.25 * axis.get_ylim()[1])  # room for the legend above the bars
    axis.legend(fontsize=7, frameon=False, loc="upper left")


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


def block_name(block: Mapping[str, Any]) -> str:
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
                rows.append([attribute, side, block_name(block), agree, *map(_number, _levels(block))])
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
