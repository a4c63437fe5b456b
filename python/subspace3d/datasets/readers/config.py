"""The settings of the readers, cheap to import; the string under a field is its help text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from subspace3d.choices import Variant
from subspace3d.settings import flag, require

Kind = Literal[
    "colmap", "nerfstudio", "rgbd", "images", "renderings", "co3d",
    "7scenes", "nrgbd", "scannet", "scannet++", "bonn", "hiroom", "eth3d", "dtu", "sintel", "da3-bench",
    "thuman", "2k2k", "clearpose", "soap", "hndr",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ReaderConfig:
    """Which data set is read, and how."""

    from_: Annotated[Kind, flag("from")]
    """Kind of data set, in its official layout."""
    root: Path
    """Its folder."""
    frame_step: int = 0
    """Keep the frames whose number is a multiple of it; 0: 1, for clearpose the paper's 100 (to test 12 of these)."""
    max_side: int = 0
    """Reduce images whose longer side has more pixels than this to it; 0: keep them as they are."""
    scan_views: int = 96
    """Views around each scan of thuman and 2k2k."""
    scan_scale: float = 1.0
    """Factor on the size of the scans of thuman and 2k2k."""
    poses: Literal["c2w", "w2c"] = "c2w"
    """What the poses of an rgbd folder are: camera-to-world (TUM) or camera-from-world."""
    depth_scale: float = 0.0
    """Units of the cameras per stored unit of depth; 0: 0.001 for integers (beside TUM's rgb.txt 0.0002), else 1."""
    exif: Literal["auto", "stored", "shown"] = "auto"
    """Whether cameras belong to images as stored or as their EXIF orientation shows them; auto: by their sizes."""
    allow_pickle: bool = False
    """Read the pickled members of soap and hndr bundles, of which only numpy arrays and plain values are accepted."""
    resolution: int = 518
    """Width and height in pixels of the views of scans."""
    spp: int = 64
    """Samples per pixel of the views of scans."""
    variant: Variant = "auto"
    """Mitsuba variant; auto: the fastest that works on this machine."""

    def __post_init__(self) -> None:
        for name in ("frame_step", "max_side", "depth_scale"):
            require(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        for name in ("scan_views", "resolution", "spp"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        require(self.scan_scale > 0, "scan_scale", "positive", self.scan_scale)
