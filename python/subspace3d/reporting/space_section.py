"""The section of the report that shows true and predicted points and cameras in space, drawn by viewer.js.

The page carries depths, not points: of each scene the same pixels for the truth and for every method, so that a point
costs two bytes per method, and the viewer can place it with the predicted cameras or with the true ones.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from subspace3d.evaluation import pictures
from subspace3d.reporting.collect import RunContent
from subspace3d.reporting.html import Html, data_block, element, join, section
from subspace3d.reporting.result_figures import TRUTH_COLOUR, method_colours

MOST_BYTES = 2 * 2**20  # of all points on the page; base64 makes it a third more
MOST_POINTS = 24_000  # of one scene
LARGEST_ERROR = 0.5  # of the scene's radius, where the colours of the error end
_TITLE = "Points and cameras in space"
_KEYS = (
    "Drag to turn, drag with two fingers or with Shift to move, pinch or use the wheel (after a click) to zoom. Keys: "
    "arrows turn, Shift and arrows move, + and − zoom, Home returns."
)


def space(content: RunContent) -> Html:
    """The viewer with its data, or what is missing for it."""
    if content.results is None or not content.results.value.get("pictures"):
        return _missing("No scenes were kept in this run, so there are no points to show.")
    results = content.results.value
    names = ["truth", *results["methods"]]
    scenes, left_out = [], []
    for shown in results["pictures"]:
        try:
            scenes.append(_read_scene(content.results.path.parent, shown, names[1:]))
        except (FileNotFoundError, ValueError) as error:
            left_out.append(f"{shown['scene']}: {error}")
    problems = element("ul", *(element("li", text) for text in left_out)) if left_out else None
    if not scenes:
        return _missing("None of the kept scenes can be placed in space.", problems)
    points = _points_per_scene(len(scenes), len(names))
    records = [scene_record(*scene, points) for scene in scenes]
    data = {
        "names": names,
        "colours": [TRUTH_COLOUR, *method_colours(names[1:]).values()],
        "error": LARGEST_ERROR,
        "scenes": records,
    }
    explanation = (
        "The pixels with true depth of every frame, where the truth and each method put them. Predicted cameras and "
        "points are moved onto the true ones by the similarity and ICP of the point-cloud metrics; with “true cameras” "
        "only the predicted depth is used, after one scale per scene, so that errors of the cameras do not hide it. "
        f"Errors are distances to the true point of the same pixel, up to {LARGEST_ERROR:g} of the scene's radius."
    )
    return section(
        "space",
        _TITLE,
        element("p", explanation, class_="note"),
        _viewer(names, [record["name"] for record in records]),
        problems,
        data_block("space-data", data),
    )


def _missing(text: str, more: Html | None = None) -> Html:
    return section("space", _TITLE, element("p", text, class_="missing"), more)


def _points_per_scene(scenes: int, layers: int) -> int:
    """A point costs 7 bytes for its pixel and colour and 3 per layer for depth and confidence."""
    return min(MOST_POINTS, MOST_BYTES // (scenes * (7 + 3 * layers)))


def _read_scene(
    folder: Path, shown: Mapping[str, Any], methods: Sequence[str]
) -> tuple[str, pictures.ShownViews, list[pictures.ShownViews | None]]:
    true, predicted = pictures.load_entry(folder, shown, methods)
    if not true.views.translation_known:
        raise ValueError("where its true cameras stand is not known")
    return shown["scene"], true, [predicted.get(name) for name in methods]


def scene_record(
    name: str, true: pictures.ShownViews, predicted: Sequence[pictures.ShownViews | None], most_points: int
) -> dict[str, Any]:
    """What viewer.js reads of a scene.

    Args:
        name (str): shown name.
        true (ShownViews): with images.
        predicted (Sequence): one per method, None where there is none; frames and size as of ``true``.
        most_points (int): at most so many of the pixels with true depth are kept, evenly spaced.

    Returns:
        dict: ``name``, ``size`` [H, W], ``points`` n, ``layers`` (the truth, then the methods) and ``data``, base64 of
        little-endian arrays one after the other: pixels uint32 [n], ``(frame * H + row) * W + column``; colours uint8
        [n, 3]; then per layer the depth codes uint16 [n] and, where ``confidence`` is true, ranks uint8 [n]. Code 0
        is no depth, code q is ``low (high / low)^((q - 1) / 65534)``: a relative step of ``ln(high / low) / 65534``.
    """
    pixels = np.flatnonzero(true.views.depths > 0)
    if len(pixels) > most_points:
        pixels = pixels[np.arange(most_points) * len(pixels) // most_points]
    blobs = [pixels.astype("<u4").tobytes(), true.rgb.reshape(-1, 3)[pixels].tobytes()]
    layers: list[dict[str, Any] | None] = []
    for shown in (true, *predicted):
        if shown is None:
            layers.append(None)
            continue
        codes, low, high = encode_depths(shown.views.depths.ravel()[pixels])
        blobs.append(codes.astype("<u2").tobytes())
        confidence = shown.views.confidence
        if confidence is not None:
            blobs.append(pictures.ranks(confidence.ravel()[pixels]).tobytes())
        known = {"low": low, "high": high, "scale": shown.depth_scale, "confidence": confidence is not None}
        layers.append({**known, "cameras": _cameras(shown), "alignment": _alignment(shown)})
    size = list(true.views.depths.shape[1:])
    data = base64.b64encode(b"".join(blobs)).decode("ascii")
    return {"name": name, "size": size, "points": len(pixels), "layers": layers, "data": data}


def encode_depths(depths: NDArray[np.float64]) -> tuple[NDArray[np.uint16], float, float]:
    """Codes of depths [n] on a logarithmic scale, and the least and largest depth; see `scene_record`."""
    positive = np.isfinite(depths) & (depths > 0)
    if not positive.any():
        return np.zeros(depths.shape, np.uint16), 1.0, 2.0
    low, high = float(depths[positive].min()), float(depths[positive].max())
    high = max(high, low * (1 + 1e-6))
    share = np.log(np.where(positive, depths, low) / low) / math.log(high / low)
    return np.where(positive, 1 + np.rint(65534 * np.clip(share, 0, 1)), 0).astype(np.uint16), low, high


def _cameras(shown: pictures.ShownViews) -> list[dict[str, list[float]]] | None:
    """None where they are not predicted."""
    views = shown.views
    if views.not_predicted():
        return None
    return [
        {
            "focal": _rounded([k[0, 0], k[1, 1]]),
            "centre": _rounded([k[0, 2], k[1, 2]]),
            "rotation": _rounded(e[:, :3]),
            "translation": _rounded(e[:, 3]),
        }
        for k, e in zip(views.calibration, views.poses)
    ]


def _alignment(shown: pictures.ShownViews) -> dict[str, Any] | None:
    fitted = shown.alignment
    if fitted is None:
        return None
    lists = {"rotation": _rounded(fitted.rotation), "translation": _rounded(fitted.translation)}
    return {"scale": float(f"{fitted.scale:.7g}"), **lists}


def _rounded(values: Any) -> list[float]:
    return [float(f"{value:.7g}") for value in np.ravel(values)]


def _viewer(names: Sequence[str], scenes: Sequence[str]) -> Html:
    canvas = element(
        "canvas",
        "Points and cameras, drawn by WebGL.",
        tabindex="0",
        role="img",
        aria_label="true and predicted points and cameras of a scene in space",
        aria_describedby="space-keys",
    )
    stage = element("div", canvas, element("p", class_="missing", data_message=True, hidden=True), class_="stage")
    # the truth and the last method are what one compares first
    boxes = [
        _tick(name, data_layer=str(index), checked=index in (0, len(names) - 1)) for index, name in enumerate(names)
    ]
    controls = element(
        "div",
        _choice("Scene", "scene", [(str(index), name) for index, name in enumerate(scenes)]),
        element("fieldset", element("legend", "Shown"), *boxes),
        _choice("Placed by", "placement", [("predicted", "predicted cameras, aligned"), ("true", "true cameras")]),
        _choice(
            "Colours",
            "colour",
            [("tinted", "image, methods tinted"), ("image", "image"), ("source", "by method"), ("error", "error")],
        ),
        _slider("Hide the least confident, %", "confidence", 0, 95, 5, 0),
        _slider("Size of points", "size", 1, 12, 1, 4),
        element(
            "div",
            element("label", element("input", type="checkbox", checked=True, data_cameras=True), " cameras"),
            element("button", "Reset view", type="button", data_reset=True),
            class_="row",
        ),
        class_="controls",
    )
    status = element("p", class_="note", data_status=True, aria_live="polite")
    keys = element("p", _KEYS, class_="note", id="space-keys")
    without = element("noscript", element("p", "This part needs JavaScript.", class_="missing"))
    return join([element("div", stage, controls, status, class_="viewer", data_viewer=True), keys, without])


def _tick(name: str, **attributes: str | bool) -> Html:
    box = element("input", type="checkbox", **attributes)
    return element("label", box, element("span", class_="swatch"), name)


def _choice(label: str, name: str, options: Sequence[tuple[str, str]]) -> Html:
    items = [element("option", text, value=value) for value, text in options]
    select = element("select", *items, **{f"data_{name}": True})
    return element("label", element("span", label), select)


def _slider(label: str, name: str, low: int, high: int, step: int, value: int) -> Html:
    numbers = {"min": str(low), "max": str(high), "step": str(step), "value": str(value)}
    slider = element("input", type="range", **numbers, **{f"data_{name}": True})
    return element("label", element("span", label), slider)
