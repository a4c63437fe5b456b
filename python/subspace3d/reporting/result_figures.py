"""The figures of the results and of the training runs, drawn by matplotlib from plain JSON values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from subspace3d.reporting.figures import COLOURS, INK, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

TRUTH_COLOUR = "#8a8a8a"
_PANEL = (3.9, 2.9)  # inches
_MORE_COLOURS = ("#332288", "#117733", "#882255", "#88CCEE", "#C4A000")
_FIXED = dict(zip(("full", "lora", "subspace", "pissa", "adalora", "psv"), COLOURS)) | {"base": "#7a5c48"}


def method_colours(names: Iterable[str]) -> dict[str, str]:
    """Method -> hex colour: the usual methods always have the same, others one that is free while there are any."""
    names = list(names)
    taken = {_FIXED[name] for name in names if name in _FIXED}
    free = [colour for colour in (*COLOURS, *_MORE_COLOURS) if colour not in taken]
    others = [name for name in names if name not in _FIXED]
    chosen = {name: free[index % len(free)] for index, name in enumerate(others)}
    return {name: _FIXED.get(name) or chosen[name] for name in names}


def draw_scenes(results: Mapping[str, Any], metric: str) -> Figure:
    """A point per scene and method, a thin line through each scene, a bar at the mean."""
    methods = results["methods"]
    colours = method_colours(methods)
    places = {name: place for place, name in enumerate(methods)}
    figure, axes = panels(1, 1, max(_PANEL[0], 0.6 * len(methods) + 0.8), _PANEL[1])
    axis = axes[0][0]
    for scene in results["scenes"]:
        known = {
            name: method["per_scene"][scene][metric]
            for name, method in methods.items()
            if method["per_scene"].get(scene, {}).get(metric) is not None
        }
        axis.plot([places[name] for name in known], list(known.values()), color="#bbbbbb", linewidth=0.7, zorder=1)
        for name, value in known.items():
            axis.plot(places[name], value, "o", color=colours[name], markersize=3.6, alpha=0.65, mew=0, zorder=2)
    for name, method in methods.items():
        mean = method["mean"].get(metric)
        if mean is not None:
            ends = places[name] - 0.28, places[name] + 0.28
            axis.plot(ends, (mean, mean), color=colours[name], linewidth=2.6, zorder=3)
    slanted = sum(map(len, methods)) > 30
    axis.set_xticks(
        range(len(methods)), list(methods), rotation=30 if slanted else 0, ha="right" if slanted else "center"
    )
    axis.set_xlim(-0.6, len(methods) - 0.4)
    axis.set_ylim(bottom=0)
    _title(axis, f"{results['metrics'][metric]['label']} of every scene")
    return figure


def _title(axis: Axes, text: str) -> None:
    axis.set_title(text, fontsize=9.5, color=INK, loc="left")


def draw_cost(results: Mapping[str, Any], metric: str) -> Figure | None:
    """The mean of a metric over the number of trained parameters; the untuned model as a line. None: nothing tuned."""
    methods = results["methods"]
    colours = method_colours(methods)
    known = {
        name: (method["trainable_parameters"], method["mean"][metric])
        for name, method in methods.items()
        if method.get("trainable_parameters") is not None and method["mean"].get(metric) is not None
    }
    tuned = {name: point for name, point in known.items() if point[0] > 0}
    if not tuned:
        return None
    figure, axes = panels(1, 1, *_PANEL)
    axis = axes[0][0]
    for name, (_, value) in known.items():
        if name not in tuned:
            axis.axhline(value, color=colours[name], linestyle="--", linewidth=1.2)
            axis.annotate(
                name, (1, value), xycoords=("axes fraction", "data"), xytext=(-4, 3), textcoords="offset points",
                ha="right", fontsize=8.5, color=colours[name],
            )  # fmt: skip
    for index, (name, point) in enumerate(sorted(tuned.items(), key=lambda item: item[1])):
        axis.plot(*point, "o", color=colours[name], markersize=7)
        # neighbours in size have their names above and below in turn
        offset = (0, 7) if index % 2 == 0 else (0, -15)
        axis.annotate(name, point, xytext=offset, textcoords="offset points", ha="center", fontsize=8.5)
    axis.set_xscale("log")
    axis.margins(x=0.2, y=0.25)
    axis.set_xlabel("trained parameters", fontsize=9)
    _title(axis, f"mean {results['metrics'][metric]['label']}")
    return figure


def draw_training(curves: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    """Loss over steps, one line per run, smoothed by a running mean over a twentieth of the run.

    Args:
        curves: name of the run -> (step, loss) in the order of the steps.
    """
    figure, axes = panels(1, 1, 7.4, 3.0)
    axis = axes[0][0]
    colours = method_colours(curves)
    lines: list[Line2D] = []
    for name, points in curves.items():
        steps, losses = zip(*points)
        window = max(1, len(losses) // 20)
        recent = [losses[max(0, end - window) : end] for end in range(1, len(losses) + 1)]
        smooth = [sum(part) / len(part) for part in recent]
        axis.plot(steps, losses, color=colours[name], linewidth=0.7, alpha=0.25)
        lines += axis.plot(steps, smooth, color=colours[name], linewidth=1.8)
    values = [loss for points in curves.values() for _, loss in points]
    if min(values) > 0 and max(values) > 10 * min(values):
        axis.set_yscale("log")
    axis.set_xlabel("optimiser step", fontsize=9)
    axis.set_ylabel("training loss", fontsize=9)
    # of labels on the lines those that begin with _ would be left out
    axis.legend(lines, list(curves), frameon=False, fontsize=9, ncols=4, loc="upper right")
    return figure
