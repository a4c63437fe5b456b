"""The section of the report that shows image, true depth, and each method's depth and error of single frames."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from subspace3d.evaluation import pictures
from subspace3d.evaluation.alignment import scale_alignment
from subspace3d.reporting.collect import RunContent
from subspace3d.reporting.html import Html, details, element, inline_picture, join, picture, section

DEPTH_COLOURS = "turbo_r"  # near is red
ERROR_COLOURS = "magma"
LARGEST_ERROR = 0.5
NEARER, FARTHER = (255, 105, 213), (150, 150, 150)  # in neither end of the colour map
_FRAMES = 2  # of each scene
_OPEN_SCENES = 2
_MARGIN = 0.1  # of the range of the true depth, and of the cut-out's side
_STEPS = 253  # colours of a map; the rest of a palette is nearer, farther and nothing
_TITLE = "Depth of the test scenes"

Values = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Frame:
    """One frame of one scene, cut to where there is true depth.

    Args:
        image (NDArray[np.uint8]): [h, w, 3] sRGB.
        true (Values): [h, w] z-depth, 0 = invalid.
        low (float): where the colours of depth begin.
        high (float): where they end.
    """

    image: NDArray[np.uint8]
    true: Values
    low: float
    high: float


def depth(content: RunContent) -> Html:
    if content.results is None or not content.results.value.get("pictures"):
        return section("depth", _TITLE, element("p", "No scenes were kept in this run.", class_="missing"))
    folder, shown = content.results.path.parent, content.results.value["pictures"]
    explanation = (
        "Frames are cut to where there is true depth. Upper row: depth, each frame in the colours of its own true "
        "range (2nd to 98th percentile and a tenth more on both sides), predictions after one scale per frame, so that "
        "their shape can be seen whatever their size. Lower row: relative error |d − d*| / d* after one scale per "
        "scene, as in the table, with its mean over the frame; the same colours for all. A frame that is wrong as a "
        "whole looks right above and is bright below."
    )
    strips = [_scene(folder, scene, list(content.results.value["methods"])) for scene in shown]
    rest = strips[_OPEN_SCENES:]
    more = details(f"{len(rest)} more", *rest) if rest else None
    return section("depth", _TITLE, element("p", explanation, class_="note"), _legend(), *strips[:_OPEN_SCENES], more)


def _legend() -> Html:
    ramp = np.tile(np.linspace(0, 1, 160), (12, 1))
    everywhere = np.ones(ramp.shape, bool)
    square, inside = np.zeros((12, 12)), np.ones((12, 12), bool)
    # the colours stand inside a line that says what they mean, so they need no text of their own
    depth_ramp, error_ramp, nearer, farther = (
        inline_picture(drawn, "")
        for drawn in (
            paint(ramp, 0, 1, DEPTH_COLOURS, everywhere),
            paint(ramp, 0, 1, ERROR_COLOURS, everywhere),
            paint(square - 1, 0, 1, DEPTH_COLOURS, inside),
            paint(square + 2, 0, 1, DEPTH_COLOURS, inside),
        )
    )
    items = [
        join(["near ", depth_ramp, " far"]),
        join([nearer, " nearer than the range"]),
        join([farther, " farther than the range"]),
        join(["error 0 ", error_ramp, f" {LARGEST_ERROR:g} and more"]),
    ]
    return element("p", *(element("span", item) for item in items), class_="legend")


def _scene(folder: Path, scene: Mapping[str, Any], methods: list[str]) -> Html:
    name = scene["scene"]
    try:
        true, predicted = pictures.load_entry(folder, scene, methods)
        chosen = [index for index in _shown_frames(len(true.frames)) if np.any(true.views.depths[index] > 0)]
        strips = [_strip(name, true, predicted, index) for index in chosen]
    except (FileNotFoundError, ValueError) as error:
        return join([element("h3", name), element("p", str(error), class_="missing")])
    return join([element("h3", name), *strips])


def _shown_frames(available: int) -> list[int]:
    """The first frame and the one in the middle, as far from it as a closed path goes."""
    return sorted({index * available // _FRAMES for index in range(_FRAMES)})


def _strip(name: str, true: pictures.ShownViews, predicted: Mapping[str, pictures.ShownViews], index: int) -> Html:
    box = cut_out(true.views.depths[index] > 0)
    frame = make_frame(true.rgb[index][box], true.views.depths[index][box])
    number = true.frames[index]
    where = f"{name}, frame {number}"
    shown = f"true depth, {frame.low:.2f} to {frame.high:.2f}"
    columns = [
        element("div", picture(_image_bytes(frame.image), f"image of {where}", f"frame {number}")),
        element("div", picture(_depth_bytes(frame, frame.true), f"true depth of {where}", shown)),
    ]
    for method, views in predicted.items():
        pred = views.views.depths[index][box]
        try:
            fitted = fit_scale(pred, frame.true)
        except ValueError as failure:
            columns.append(element("div", element("p", f"{method}: {failure}", class_="missing")))
            continue
        error = relative_error(pred * views.depth_scale, frame.true)
        mean = float(error[frame.true > 0].mean())
        columns.append(
            element(
                "div",
                picture(_depth_bytes(frame, pred * fitted), f"depth of {where} by {method}", method),
                picture(_error_bytes(frame, error), f"relative error of {where} by {method}", f"AbsRel {mean:.3f}"),
            )
        )
    label = f"pictures of {where}"
    return element("div", *columns, class_="strip", tabindex="0", role="region", aria_label=label)


def make_frame(image: NDArray[np.uint8], true: Values) -> Frame:
    low, high = np.percentile(true[true > 0], (2, 98))
    # a flat wall seen straight on has one depth; a hundredth of it is a range that shows it as one colour
    margin = max(_MARGIN * (high - low), 0.005 * high)
    return Frame(image, true, float(low - margin), float(high + margin))


def fit_scale(pred: Values, true: Values) -> float:
    """The scale of least Abs Rel on one frame."""
    return scale_alignment(pred[None], true[None], true[None] > 0)


def relative_error(pred: Values, true: Values) -> Values:
    """``|d - d*| / d*`` where ``d* > 0``, else 0."""
    return np.abs(pred - true) / np.where(true > 0, true, np.inf)


def cut_out(valid: Mask) -> tuple[slice, slice]:
    """The smallest square around the valid pixels with a margin, at least half the frame's shorter side, inside it."""
    spans = []
    sides = [np.flatnonzero(valid.any(axis)) for axis in (1, 0)]
    wanted = max(max(int(found[-1] - found[0]) + 1 for found in sides) * (1 + _MARGIN), min(valid.shape) / 2)
    for found, length in zip(sides, valid.shape):
        side = min(length, round(wanted))
        start = int(found[0] + found[-1] + 1 - side) // 2
        start = min(max(start, 0), length - side)
        spans.append(slice(start, start + side))
    return spans[0], spans[1]


def _depth_bytes(frame: Frame, depths: Values) -> bytes:
    return paint(depths, frame.low, frame.high, DEPTH_COLOURS, (frame.true > 0) & np.isfinite(depths))


def _error_bytes(frame: Frame, error: Values) -> bytes:
    # at the end of the scale the brightest colour stays: what is beyond it is as bad as what reaches it
    return paint(np.minimum(error, LARGEST_ERROR), 0.0, LARGEST_ERROR, ERROR_COLOURS, frame.true > 0)


def paint(values: Values, low: float, high: float, colours: str, valid: Mask) -> bytes:
    """A PNG of ``colour map((values - low) / (high - low))`` with colours of their own below and above the range.

    Args:
        values (Values): [h, w].
        low (float): value of the first colour.
        high (float): value of the last, above ``low``.
        colours (str): name of a matplotlib colour map.
        valid (Mask): [h, w]; elsewhere the picture is transparent.

    Returns:
        bytes: with a palette of 256 colours: the map, `NEARER`, `FARTHER` and nothing.
    """
    import matplotlib
    from PIL import Image

    share = np.where(valid, (values - low) / (high - low), 0.0)
    index = np.rint(np.clip(share, 0, 1) * (_STEPS - 1)).astype(np.uint8)
    index[share < 0], index[share > 1], index[~valid] = _STEPS, _STEPS + 1, _STEPS + 2
    palette = matplotlib.colormaps[colours](np.linspace(0, 1, _STEPS), bytes=True)[:, :3]
    image = Image.frombytes("P", (index.shape[1], index.shape[0]), index.tobytes())
    image.putpalette(np.concatenate([palette, [NEARER, FARTHER, (0, 0, 0)]]).astype(np.uint8).tobytes())
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", transparency=_STEPS + 2, optimize=True)
    return buffer.getvalue()


def _image_bytes(image: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
