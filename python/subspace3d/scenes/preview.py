"""Contact sheets: what an attribute or a task looks like, at a glance."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from subspace3d.configs import ATTRIBUTES, GenerateConfig
from subspace3d.datasets.scene_format import load_scene
from subspace3d.files import atomic_path

_WIDTH = 160  # pixels of one picture
_SPP = 64
_GAP, _MARGIN, _LABELS = 4, 22, 84  # pixels: between scenes, above the pictures, left of them
_QUALITY = 80  # of the JPEG

_TITLES = {
    "texture": "within a row only the materials change",
    "geometry": "within a row only the shapes change",
    "camera": "within a row only the cameras change",
    "lighting": "within a row only the light changes",
    "faces": "flat pictures of faces; left and right of a pair: first and last frame",
    "bodies": "clothed bodies; three of the azimuths of each",
    "glass": "transparent objects; three views along the arc",
}


def previews(config: GenerateConfig) -> list[GenerateConfig]:
    """One small run per attribute, or one for the task, with the settings of ``config`` otherwise."""
    small = dataclasses.replace(config, out=config.out / "preview", resolution=_WIDTH, spp=_SPP)
    if config.task != "none":
        views = 2 if config.task == "faces" else 3
        return [dataclasses.replace(small, name=config.task, scenes=3, views=views)]
    return [
        dataclasses.replace(small, name=attribute, attribute=attribute, datasets=3, scenes=4, views=2)
        for attribute in ATTRIBUTES
    ]


def draw_sheet(path: Path, name: str, datasets: Sequence[Path]) -> None:
    """Write a JPEG with one row per data set and, along it, the views of each of its scenes.

    Args:
        path (Path): file to write.
        name (str): attribute or task.
        datasets (sequence of Path): folders of scenes, of equal numbers of views of one size.
    """
    from PIL import Image, ImageDraw, ImageFont

    rows = [[load_scene(scene).images for scene in sorted(folder.glob("scene_*"))] for folder in datasets]
    height, width = max((images.shape[1], images.shape[2]) for row in rows for images in row)
    views = len(rows[0][0])
    scene_width = views * width + _GAP
    size = _LABELS + max(map(len, rows)) * scene_width, 2 * _MARGIN + len(rows) * (height + _GAP)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    draw.text((_GAP, 4), f"{name}: {_TITLES[name]}", "black", font)
    for column in range(max(map(len, rows))):
        draw.text((_LABELS + column * scene_width, _MARGIN + 2), f"scene {column}, {views} views", "black", font)
    for index, (folder, row) in enumerate(zip(datasets, rows)):
        top = 2 * _MARGIN + index * (height + _GAP)
        draw.text((_GAP, top + height // 2 - 8), folder.name, "black", font)
        for column, images in enumerate(row):
            for view, image in enumerate(images):
                sheet.paste(Image.fromarray(image), (_LABELS + column * scene_width + view * width, top))
    with atomic_path(path) as temporary:
        sheet.save(temporary, quality=_QUALITY)
