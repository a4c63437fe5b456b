"""Contact sheets: what an attribute or a task looks like, at a glance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from subspace3d.choices import ATTRIBUTES
from subspace3d.files import atomic_path
from subspace3d.formats.scene import load_scene

_GAP, _MARGIN, _LABELS = 4, 22, 96  # pixels: between scenes, above the pictures, left of them
_QUALITY = 72  # of the JPEG

_TITLES = {
    "texture": "within a row only the materials change",
    "geometry": "within a row only the shapes change",
    "camera": "within a row only the cameras change",
    "lighting": "within a row only the light changes",
    "faces": "flat pictures of faces; first and last frame, and the depth of the first",
    "bodies": "clothed bodies; three of the azimuths, and the depth of the first",
    "glass": "transparent objects; three views along the arc, and the depth of the first",
}


def draw_sheet(path: Path, name: str, datasets: Sequence[Path]) -> None:
    """Write a JPEG with one row per data set and, along it, the views of each of its scenes; of a task also depth.

    Args:
        path (Path): file to write.
        name (str): attribute or task.
        datasets (sequence of Path): folders of scenes.
    """
    from PIL import Image, ImageDraw, ImageFont

    rows = [[_strip(scene, name not in ATTRIBUTES) for scene in sorted(folder.glob("scene_*"))] for folder in datasets]
    columns = [max(strip.shape[1] for strip in column) + _GAP for column in zip(*rows)]
    heights = [max(strip.shape[0] for strip in row) + _GAP for row in rows]
    sheet = Image.new("RGB", (_LABELS + sum(columns), 2 * _MARGIN + sum(heights)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    draw.text((_GAP, 4), f"{name}: {_TITLES[name]}", "black", font)
    lefts, tops = np.cumsum([_LABELS, *columns]).tolist(), np.cumsum([2 * _MARGIN, *heights]).tolist()
    for index, left in enumerate(lefts[:-1]):
        draw.text((left, _MARGIN + 2), f"scene {index}", "black", font)
    for folder, row, top, height in zip(datasets, rows, tops, heights):
        draw.text((_GAP, top + height // 2 - 8), folder.name, "black", font)
        for strip, left in zip(row, lefts):
            sheet.paste(Image.fromarray(strip), (left, top))
    with atomic_path(path) as temporary:
        sheet.save(temporary, quality=_QUALITY)


def _strip(folder: Path, with_depth: bool) -> np.ndarray:
    """The views of a scene side by side, uint8 [H, W, 3], and if wanted the depth of the first: near is light.

    The greys of the depth span at least 0.3 of its median, so that what is flat looks flat.
    """
    scene = load_scene(folder)
    pictures = list(scene.images)
    if with_depth:
        depth = scene.depths[0]
        low, high = np.percentile(depth[depth > 0], (1, 99))
        shade = 1 - 0.85 * np.clip((depth - low) / max(high - low, 0.3 * np.median(depth[depth > 0])), 0, 1)
        grey = np.where(depth > 0, 255 * shade, 0).astype(np.uint8)
        pictures.append(np.repeat(grey[..., None], 3, axis=2))
    return np.concatenate(pictures, axis=1)
