"""The two figures of the results: error against trainable parameters, and every row with its spread."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from experiments.claims import SPLIT_NAMES, TASK_NAMES
from experiments.plan import table_rows
from experiments.results import MAIN, RowResult, TaskResults
from experiments.scale import Scale, Task
from subspace3d.evaluation.table import METRICS as SHOWN

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which people with a colour vision deficiency can tell apart; the markers differ as well.
_STYLES = {
    "full": ("#555555", "D", "full"),
    "lora": ("#0072B2", "o", "LoRA"),
    "pissa": ("#CC79A7", "v", "PiSSA"),
    "adalora": ("#E69F00", "^", "AdaLoRA"),
    "psv": ("#56B4E9", "P", "PSV"),
    "subspace": ("#D55E00", "s", "subspace"),
}
_INK = "#333333"
_ROOM = 0.6  # the share of its length by which an axis may grow for the base model


def draw_parameters(results: Mapping[Task, TaskResults], scale: Scale) -> Figure | None:
    """`MAIN` error on the in-domain test against trainable parameters, a panel per task; None without results."""
    from matplotlib.ticker import NullFormatter

    known = _known(results, scale)
    if not known:
        return None
    figure, panels = _panels(len(known), 3.6, 3.2)
    for axis, (task, rows) in zip(panels, known.items()):
        for family, (colour, marker, label) in _STYLES.items():
            members = [row for row in rows if row.row and row.row.family == family]
            points = [(row.cost("trainable"), row.stat("test", MAIN)) for row in members]
            drawn = [(cost.mean, stat.mean, stat.spread or 0.0) for cost, stat in points if cost and stat]
            if drawn:
                x, y, spread = zip(*drawn)
                axis.errorbar(
                    x, y, spread, color=colour, marker=marker, markersize=6, linewidth=1.2, capsize=3, label=label
                )
        axis.set_xscale("log")
        axis.set_xlim(*_decades(known))
        axis.xaxis.set_minor_formatter(NullFormatter())
        _draw_title(axis, results[task], vertical=False)
        axis.set_xlabel("trainable parameters", fontsize=9, color=_INK)
    panels[0].set_ylabel(f"{SHOWN[MAIN].label} error, in-domain test", fontsize=9, color=_INK)
    _add_legend(figure, panels)
    return figure


def draw_rows(results: Mapping[Task, TaskResults], scale: Scale) -> Figure | None:
    """Every row's `MAIN` error on both tests, with the spread over seeds, a panel per task; None without results."""
    from matplotlib.ticker import MaxNLocator

    known = _known(results, scale)
    if not known:
        return None
    figure, panels = _panels(len(known), 3.9, 0.9 + 0.27 * max(map(len, known.values())))
    for axis, (task, rows) in zip(panels, known.items()):
        places = list(range(len(rows)))[::-1]
        for split, filled, offset in (("test", True, 0.12), ("cross", False, -0.12)):
            for place, row in zip(places, rows):
                stat = row.stat(split, MAIN)
                if stat is not None and row.row is not None:
                    colour, marker, _ = _STYLES[row.row.family]
                    axis.errorbar(
                        stat.mean, place + offset, xerr=stat.spread or 0.0, color=colour, marker=marker, markersize=6,
                        markerfacecolor=colour if filled else "white", linestyle="", linewidth=1.2, capsize=3,
                    )  # fmt: skip
            axis.plot([], [], "o", color=_INK, markerfacecolor=_INK if filled else "white", label=SPLIT_NAMES[split])
        axis.set_yticks(places, [row.label for row in rows], fontsize=8)
        axis.set_ylim(-0.7, len(rows) - 0.3)
        _draw_title(axis, results[task], vertical=True)
        axis.xaxis.set_major_locator(MaxNLocator(nbins=5))
        axis.set_xlabel(f"{SHOWN[MAIN].label} error", fontsize=9, color=_INK)
    _add_legend(figure, panels)
    return figure


def _known(results: Mapping[Task, TaskResults], scale: Scale) -> dict[Task, list[RowResult]]:
    """Rows of Tables 1 to 3 that have a result, of the tasks that have any."""
    known = {}
    for name, task in results.items():
        rows = [task.rows[row.name] for row in table_rows(scale, "tasks", name)]
        if shown := [row for row in rows if row.stat("test", MAIN) is not None]:
            known[name] = shown
    return known


def _decades(known: Mapping[Task, list[RowResult]]) -> tuple[float, float]:
    """Powers of ten around the trainable parameters of all rows."""
    sizes = [cost.mean for rows in known.values() for row in rows if row.row and (cost := row.cost("trainable"))]
    low = math.floor(math.log10(min(sizes)))
    return 10**low, 10 ** max(low + 1, math.ceil(math.log10(max(sizes))))


def _draw_title(axis: Axes, task: TaskResults, vertical: bool) -> None:
    """The panel's title, and the base model: a line, or part of the title where it would press all rows together."""
    low, high = axis.get_xlim() if vertical else axis.get_ylim()
    notes = []
    for split, style in (("test", "--"), *([("cross", ":")] if vertical else [])):
        stat = task.base.stat(split, MAIN)
        if stat is None:
            continue
        name = f"base, {SPLIT_NAMES[split]}" if vertical else "base"
        if low - _ROOM * (high - low) <= stat.mean <= high + _ROOM * (high - low):
            draw = axis.axvline if vertical else axis.axhline
            draw(stat.mean, color="#999999", linestyle=style, linewidth=1.2, label=name, zorder=1)
        else:
            notes.append(f"{name}: {stat.mean:.3g}")
    outside = f"\n({'; '.join(notes)}; outside)" if notes else ""
    axis.set_title(f"{TASK_NAMES[task.task]}{outside}", fontsize=9, color=_INK)


def _panels(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * count, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color("#999999")
        axis.tick_params(colors=_INK, labelsize=8)
        axis.grid(True, color="#e6e6e6", linewidth=0.7)
        axis.set_axisbelow(True)
    return figure, axes


def _add_legend(figure: Figure, panels: list[Axes]) -> None:
    """One legend of what is in any of the panels."""
    named = {label: handle for axis in panels for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(
        named.values(), named.keys(), loc="outside lower center", ncols=min(len(named), 7), fontsize=8, frameon=False
    )
