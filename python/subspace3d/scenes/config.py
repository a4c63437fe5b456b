"""The settings that decide what a scene looks like, cheap to import; the string under a field is its help text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from subspace3d.settings import require


@dataclass(frozen=True, kw_only=True)
class SceneConfig:
    """What is drawn and how it is rendered."""

    attribute: Literal["texture", "geometry", "camera", "lighting", "all"] = "texture"
    """What varies within a data set; the other attributes are drawn once per data set. all: everything varies."""
    preset: Literal["paper", "release", "generic"] = "paper"
    """paper: extreme ranges. release: those of the authors' release. generic: milder, objects on a ground."""
    regime: Literal["object", "room"] = "object"
    """object: a group of objects alone. room: an indoor scene with walls, a window and furniture."""
    trajectory: Literal["wide", "walk", "tremor"] = "wide"
    """wide: a path around the objects, or views from all over the room. walk, tremor: micro-baseline videos."""
    task: Literal["none", "faces", "bodies", "glass"] = "none"
    """Render a task instead: data sets <task>_train, <task>_test (in-domain) and <task>_cross (cross-domain)."""
    textures: Path | None = None
    """Folder of texture maps (basecolor, roughness, metallic, normal) to draw materials from; none: procedural ones."""
    pictures: Path | None = None
    """Folder of face images for the task faces; none: drawn ones."""
    views: int | None = None
    """Images per scene; none: 100 on wide paths, 48 in rooms, 42 in videos, 96 of bodies, 60 of glass."""
    arc: float = 360.0
    """Degrees of the ring of cameras around bodies that the views fill evenly: 6 views of 120 are 20 degrees apart."""
    resolution: int = 518
    """Image width in pixels; images are square, or 3:4 portrait with trajectory tremor."""
    spp: int = 64
    """Samples per pixel."""
    seed: int = 0
    """Root seed; every random draw follows from it."""

    def __post_init__(self) -> None:
        for name in ("resolution", "spp"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        require(self.views is None or self.views >= 1, "views", "at least 1", self.views)
        require(0 < self.arc <= 360, "arc", "in (0, 360]", self.arc)
        if self.task != "bodies":
            require(self.arc == 360, "arc", "given with the task bodies only", self.arc)
        if self.task != "faces":
            require(self.pictures is None, "pictures", "given with the task faces only", self.pictures)

    @property
    def scene_views(self) -> int:
        """Images per scene, resolved."""
        if self.views is not None:
            return self.views
        if self.task != "none":
            return {"faces": 42, "bodies": 96, "glass": 60}[self.task]
        return 42 if self.trajectory != "wide" else 100 if self.regime == "object" else 48
