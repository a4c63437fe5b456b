"""What all figures share, and the figure of the training runs; drawn by matplotlib from plain values."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which people with a colour vision deficiency can tell apart.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555", "#999933")
_METHOD_COLOURS = dict(zip(("full", "lora", "subspace", "pissa", "adalora", "psv", "none"), COLOURS))
INK = "#333333"


def to_png(figure: Figure, dpi: int = 130) -> bytes:
    buffer = io.BytesIO()
    # no software version in the file, so that the same numbers give the same bytes
    figure.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight", pad_inches=0.12, metadata={"Software": None})
    return buffer.getvalue()


def panels(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Figure, list[list[Axes]]]:
    """A figure of ``rows`` x ``columns`` panels, each ``width`` x ``height`` inches, without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color("#999999")
        axis.tick_params(colors=INK, labelsize=8)
        axis.grid(True, color="#e6e6e6", linewidth=0.7)
        axis.set_axisbelow(True)
    return figure, [list(row) for row in axes]


def draw_training(curves: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    """Loss over steps, one line per run, smoothed by a running mean over a twentieth of the run.

    Args:
        curves: name of the run -> (step, loss) in the order of the steps.
    """
    figure, axes = panels(1, 1, 7.4, 3.0)
    axis = axes[0][0]
    for index, (name, points) in enumerate(curves.items()):
        steps, losses = zip(*points)
        window = max(1, len(losses) // 20)
        recent = [losses[max(0, end - window) : end] for end in range(1, len(losses) + 1)]
        smooth = [sum(part) / len(part) for part in recent]
        colour = _METHOD_COLOURS.get(name, COLOURS[(index + 3) % len(COLOURS)])
        axis.plot(steps, losses, color=colour, linewidth=0.7, alpha=0.25)
        axis.plot(steps, smooth, color=colour, linewidth=1.8, label=name)
    values = [loss for points in curves.values() for _, loss in points]
    if min(values) > 0 and max(values) > 10 * min(values):
        axis.set_yscale("log")
    axis.set_xlabel("optimiser step", fontsize=9)
    axis.set_ylabel("training loss", fontsize=9)
    axis.legend(frameon=False, fontsize=9, ncols=4, loc="upper right")
    return figure
