"""The figure of the command fit: energy by K, by side, and by layer, beside what needs no mining."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subspace3d.files import atomic_path, natural
from subspace3d.mining.spectra import place
from subspace3d.reporting.figures import COLOURS, INK, panels, to_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# source -> colour, marker, name in the legend
_SOURCES = {
    "gradient": (COLOURS[6], "^", "this gradient's own directions"),
    "basis": (COLOURS[0], "o", "the basis"),
    "psv": (COLOURS[1], "s", "singular vectors of the weights"),
    "random": ("#999999", "x", "random directions"),
}
_FLOOR = 1e-5  # shares below it are drawn at it
_MOST_LABELS = 12  # blocks named below an axis


def draw_fit(record: Mapping[str, Any], path: Path) -> None:
    """Write the figure of the record of `commands.fit` as a PNG."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(fit_png(record))


def fit_png(record: Mapping[str, Any]) -> bytes:
    figure, ((by_k, sides, layers),) = panels(1, 3, 4.3, 3.5)
    _draw_by_size(by_k, record)
    _draw_sides(sides, record)
    _draw_layers(layers, record)
    by_k.set_ylabel("share of the gradient's energy, %", fontsize=9, color=INK)
    handles, labels = by_k.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    return to_png(figure)


def _percent(value: float | None) -> float:
    return 100 * max(value or 0.0, _FLOOR)


def _draw_by_size(axis: Axes, record: Mapping[str, Any]) -> None:
    for source, (colour, marker, label) in _SOURCES.items():
        values = [_percent(value) for value in record["by_K"][source]]
        axis.plot(
            range(1, len(values) + 1), values, color=colour, marker=marker, markersize=4, linewidth=1.3, label=label
        )
    axis.set_yscale("log")
    axis.set_xlabel("K, leading directions on either side", fontsize=9, color=INK)
    axis.set_title("inside both sides", fontsize=9.5, color=INK, loc="left")


def _draw_sides(axis: Axes, record: Mapping[str, Any]) -> None:
    names = ("core", "U", "V")
    for offset, (source, (colour, _, _)) in enumerate(_SOURCES.items()):
        values = [_percent(record["shares"][source][side]) for side in names]
        places = [index + 0.2 * (offset - 1.5) for index in range(len(names))]
        axis.bar(places, values, 0.18, color=colour)
    axis.set_yscale("log")
    axis.set_xticks(range(len(names)), ["both sides", "output side U alone", "input side V alone"], fontsize=8)
    axis.set_title(f"at K = {record['K']}", fontsize=9.5, color=INK, loc="left")


def _draw_layers(axis: Axes, record: Mapping[str, Any]) -> None:
    """Energy of the modules of each block together: the gradient differs by orders of magnitude between modules."""
    blocks: dict[tuple[str, int | None], list[Mapping[str, Any]]] = {}
    for name in sorted(record["modules"], key=natural):
        where = place(name)
        blocks.setdefault((where.family, where.layer), []).append(record["modules"][name])
    # frame and global blocks take turns; the heads come after them, not among the first
    order = sorted(blocks, key=lambda key: (not key[0], key[0].partition(".")[0], key[1] or 0, key[0]))
    for source in ("gradient", "basis", "psv", "random"):
        colour, marker, _ = _SOURCES[source]
        shares = []
        for key in order:
            energies = [module["norm"] ** 2 for module in blocks[key]]
            inside = sum(e * (m["shares"][source]["core"] or 0.0) for e, m in zip(energies, blocks[key]))
            shares.append(_percent(inside / sum(energies)) if sum(energies) else math.nan)
        axis.plot(range(len(order)), shares, color=colour, marker=marker, markersize=3.5, linewidth=1.0)
    axis.set_yscale("log")
    labels = [f"{family.rpartition('.')[2].split('_')[0]} {layer}" if family else "others" for family, layer in order]
    step = math.ceil(len(order) / _MOST_LABELS)
    axis.set_xticks(range(0, len(order), step), labels[::step], fontsize=7, rotation=60, ha="right")
    axis.set_title(f"by block, both sides, K = {record['K']}", fontsize=9.5, color=INK, loc="left")
