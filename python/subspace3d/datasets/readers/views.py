"""Views that a data set names one by one, made into frames: one way to read them, whatever the layout was.

A reader lists `View`s; `content` turns them into a scene. What cannot be used of a view costs that view alone and is
reported by its name.
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from subspace3d.datasets import reprojection
from subspace3d.datasets.readers.config import ReaderConfig
from subspace3d.datasets.readers.source import (
    Content,
    Report,
    cut,
    depth_at,
    in_words,
    limit_side,
    nearest_rotation,
    upper_rows,
)
from subspace3d.datasets.readers.undistort import Projection, Undistorter
from subspace3d.files import stays_inside
from subspace3d.formats.images import (
    clean_depth,
    image_header,
    open_image,
    read_oriented,
    read_stored_depth,
    turn_upright,
)
from subspace3d.formats.scene import PNG_MAX, Frame
from subspace3d.geometry import FLIP, invert_pose, near_origin

_ASPECT_ERROR = 0.01  # up to which an image is its camera's, at another resolution
_METRES = 200.0  # median depth beyond which floating point is asked for its unit
_COMPARED = 6  # views, to see whether depth is in the unit of the cameras
_KEPT_MAPS = 4  # of cameras whose images are undistorted
_SKEW = 1e-6  # of the focal length, below which the entry is rounding

Size = tuple[int, int]  # height and width
DepthReader = Callable[[Path], np.ndarray]


@dataclass
class View:
    """One image and what the data set says about it."""

    name: str  # in messages
    image: Path
    intrinsic: np.ndarray | None = None  # [3, 3], pixels from the corner of an image of ``size``; may have skew
    extrinsic: np.ndarray | None = None  # float64 [3, 4], camera-from-world, OpenCV
    depth: Path | None = None
    size: Size | None = None  # of the image that ``intrinsic`` belongs to; None: the size of the image itself
    projection: Projection | None = None  # of a distorted camera; None: ``intrinsic`` is all
    mask: Path | None = None  # where it is 0, depth does not count
    bare: str = ""  # why there is no depth, told once the view is used; empty: nothing, unless other views have some


@dataclass
class DepthFormat:
    """How the depth files of a data set are read.

    Attributes:
        scale: units per step of integers where `--depth-scale` says nothing; 0: the data set does not tell, 0.001.
        read: decodes a file that is none of the usual ones: numbers [H, W], times `--depth-scale`; 0 = invalid.
        unit_known: floating point values are in the scene's unit for sure.
        invalid: the stored integer that stands for no depth, beside 0.
    """

    scale: float = 0.0
    read: DepthReader | None = None
    unit_known: bool = False
    invalid: int | None = None


def content(
    views: Sequence[View],
    config: ReaderConfig,
    report: Report,
    folder: Path,
    source: dict[str, Any],
    depth_format: DepthFormat | None = None,
    unit: str = "m",
    allowed: Sequence[Path] = (),
) -> Content:
    """The scene of some views in the order given, every ``frame_step``-th of them.

    The names under ``images`` of its provenance are complete once its frames are consumed: a frame may yet be left out.

    Args:
        views (Sequence[View]): what was listed; those whose image is missing may be among them.
        config (ReaderConfig): the settings.
        report (Report): takes what is left out.
        folder (Path): of the scene; files must lie below it or below the root, once links are followed.
        source (dict): where the scene comes from, for its provenance.
        depth_format (DepthFormat | None): none: the usual files.
        unit (str): of translations and depth.
        allowed (Sequence[Path]): further folders in which files may lie.

    Raises:
        ValueError: no view can be used.
    """
    report.count(
        len(views),
        sum(view.depth is not None for view in views),
        sum(view.extrinsic is not None for view in views),
    )
    found = max(len(views), report.found["images"])
    earlier = len(report.reasons)
    others_have_depth = any(view.depth is not None for view in views)
    single = _once(views, report)
    taken = single[:: config.frame_step or 1]
    if len(taken) < len(single):
        report(f"{len(single) - len(taken)} images: left out by --frame-step {config.frame_step}")
    views = [
        replace(view, bare="there is none of its name")
        if others_have_depth and view.depth is None and not view.bare
        else view
        for view in taken
    ]
    depth_format = depth_format or DepthFormat()
    maker = _FrameMaker(config, report, depth_format, [config.root, folder, *allowed])
    usable = maker.belonging([view for view in views if maker.look(view)])
    if not usable:
        reasons = report.reasons[earlier:] if views else report.reasons
        first = f"first: {reasons[0]}" if reasons else "none has a pose"
        raise ValueError(f"{folder}: none of its {found} images can be used; {first}")
    moved, origin = _moved(usable)
    provenance = {
        "source": {**source, "images": maker.used},
        **({} if origin is None else {"origin": origin.tolist()}),
    }
    return Content(maker.frames(moved), provenance, unit=unit, depth_scale=maker.depth_scale)


def _once(views: Sequence[View], report: Report) -> list[View]:
    """Without the views whose image an earlier one has: a second camera is the same, or one of them is wrong."""
    seen: set[Path] = set()
    kept = []
    for view in views:
        if view.image in seen:
            report(f"{view.name}: named twice, its first camera is used")
        else:
            kept.append(view)
        seen.add(view.image)
    return kept


def pose_from_c2w(pose: np.ndarray) -> np.ndarray:
    """w2c [3, 4] of a c2w pose [3, 4] or [4, 4] in OpenCV axes."""
    return invert_pose(pose_from_w2c(pose))


def pose_from_opengl(pose: np.ndarray) -> np.ndarray:
    """w2c [3, 4] in OpenCV axes of a c2w pose in OpenGL axes (x right, y up, z backward)."""
    pose = upper_rows(pose)
    return pose_from_c2w(np.concatenate([pose[:, :3] @ FLIP, pose[:, 3:]], axis=1))


def pose_from_w2c(pose: np.ndarray) -> np.ndarray:
    """The pose itself, its rotation freed of rounding."""
    pose = upper_rows(pose)
    rotation, translation = nearest_rotation(pose[:, :3]), pose[:, 3:]
    if not np.isfinite(translation).all():
        raise ValueError(f"a camera's translation must be finite, got {translation.ravel().tolist()}")
    return np.concatenate([rotation, translation], axis=1)


class _FrameMaker:
    """Checks views by their headers, then makes frames of one size of them."""

    def __init__(self, config: ReaderConfig, report: Report, depth_format: DepthFormat, folders: list[Path]) -> None:
        self.config, self.report, self.depth_format, self.folders = config, report, depth_format, folders
        self.depth_scale = config.depth_scale or depth_format.scale or 1e-3
        self.used: list[str] = []  # names of the views that have become frames
        self._notes: list[str] = []  # of the view that is being made a frame
        self._sizes: Counter[Size] = Counter()
        self._looked: dict[Path, Size] = {}
        self._undistorters: dict[Any, Undistorter] = {}

    def look(self, view: View) -> bool:
        """Whether the image is there and its camera belongs to it; else that is reported."""
        try:
            self._inside(view.image)
            stored, orientation = image_header(view.image)
            size = self._shown_size(view, stored, orientation)
            self._looked[view.image] = size
            self._sizes[size] += 1
        except (OSError, ValueError) as error:
            self.report(f"{view.name}: {in_words(error)}")
            return False
        return True

    def belonging(self, views: Sequence[View]) -> list[View]:
        """Without the views of another size than most, where the size of the images of a camera is not told."""
        common = self._sizes.most_common(1)[0][0] if self._sizes else None
        kept = []
        for view in views:
            size = self._looked[view.image]
            if view.intrinsic is not None and view.size is None and size != common and common is not None:
                self.report(
                    f"{view.name}: an image of {size[1]} x {size[0]} pixels cannot have the camera of the others of "
                    f"{common[1]} x {common[0]}"
                )
            else:
                kept.append(view)
        return kept

    def frames(self, views: Sequence[View]) -> Iterator[Frame]:
        size = self._sizes.most_common(1)[0][0]
        self._check_scale(views)
        for view in views:
            try:
                frame = self._frame(view)
            except UnitError:
                raise
            except (OSError, ValueError) as error:
                self.report(f"{view.name}: {in_words(error)}")
                continue
            for note in self._notes:
                self.report(note)
            self.used.append(view.name)
            if frame.image.shape[:2] != size:
                height, width = frame.image.shape[:2]
                self.report(
                    f"{view.name}: used, cut from {width} x {height} to the scene's {size[1]} x {size[0]} pixels"
                )
                frame = cut(frame, _box(frame.intrinsic, (height, width), size), size)
            yield limit_side(frame, self.config.max_side)

    def _check_scale(self, views: Sequence[View]) -> None:
        """Raise where depth fits the cameras far better in another unit, unless its unit is given or the data set's."""
        if self.config.depth_scale or self.depth_format.scale:
            return
        whole = [view for view in views if view.depth is not None and view.extrinsic is not None]
        chosen = np.unique(np.linspace(0, len(whole) - 1, min(len(whole), _COMPARED)).round().astype(int))
        seen, exact = [], False
        for index in chosen.tolist():
            try:
                frame = self._frame(whole[index])
            except UnitError:
                raise
            except (OSError, ValueError):
                continue  # it is told when the frame's turn comes
            if frame.depth is not None and frame.intrinsic is not None and frame.extrinsic is not None:
                exact = exact or frame.exact
                seen.append(reprojection.reduce_view(frame.image, frame.depth, frame.intrinsic, frame.extrinsic))
        if len(seen) < 2:
            return
        pairs = reprojection.choose_pairs(len(seen))
        stored = reprojection.measure(seen, pairs, reprojection.STORED)
        if stored.share >= reprojection.SURE_SHARE and stored.agreeing >= reprojection.LEAST_POINTS:
            return
        better = reprojection.better_reading(seen, pairs, stored)
        if better is not None and better[0].scale != 1:
            factor = (1.0 if exact else self.depth_scale) * better[0].scale
            share = 0.0 if np.isnan(stored.share) else stored.share
            raise UnitError(
                f"depth is in another unit than the cameras: with {'1' if exact else format(self.depth_scale, 'g')} "
                f"units per stored unit {share:.0%} of the reprojected points agree, with {factor:.4g} "
                f"{better[1].share:.0%}; give --depth-scale {factor:.4g} if that is right"
            )

    def _frame(self, view: View) -> Frame:
        self._notes.clear()
        image, orientation = read_oriented(view.image)
        as_shown = orientation != 1 and self._as_shown(view, image.shape[:2], orientation)
        turn = _Turn(image.shape[:2], orientation if as_shown else 1)
        if as_shown:
            image = turn_upright(image, orientation)
        size = image.shape[:2]
        intrinsic, projection = view.intrinsic, view.projection
        if intrinsic is not None and view.size is not None and view.size != size:
            scale = np.array([size[1] / view.size[1], size[0] / view.size[0]])
            intrinsic = np.diag([*scale, 1.0]) @ intrinsic
            projection = None if projection is None else projection.scaled(scale)
        depth, exact = self._depth(view, size, turn)
        mask = None
        if view.mask is not None:
            self._inside(view.mask)
            mask = depth_at(turn.follow(np.array(open_image(view.mask).convert("L"))), size) > 0
        # an orientation that was not followed must not stay in a copy
        file = view.image if orientation == 1 else None
        frame = Frame(image, intrinsic, view.extrinsic, depth, mask, file=file, exact=exact)
        if intrinsic is not None and abs(intrinsic[0, 1]) > _SKEW * intrinsic[0, 0] and projection is None:
            projection = Projection.linear(intrinsic)
        if intrinsic is not None:
            frame.intrinsic = intrinsic * [[1, 0, 1], [1, 1, 1], [1, 1, 1]]
        return frame if projection is None else self._undistort(frame, projection)

    def _undistort(self, frame: Frame, projection: Projection) -> Frame:
        size = frame.image.shape[:2]
        key = (projection.key, size)
        if key not in self._undistorters:
            assert frame.intrinsic is not None
            # every image may have a camera of its own, and a map is as large as a few images
            while len(self._undistorters) >= _KEPT_MAPS:
                del self._undistorters[next(iter(self._undistorters))]
            self._undistorters[key] = Undistorter(projection, frame.intrinsic, (size[0], size[1]))
        maps = self._undistorters[key]
        return replace(
            frame,
            image=maps.image(frame.image),
            intrinsic=maps.intrinsic,
            depth=None if frame.depth is None else maps.nearest(frame.depth),
            mask=None if frame.mask is None else maps.nearest(frame.mask),
            file=None,
        )

    def _depth(self, view: View, size: Size, turn: _Turn) -> tuple[np.ndarray | None, bool]:
        """Depth at the size of the image, and whether a png of 16 bits cannot hold it; none where it cannot be read."""
        if view.depth is None:
            if view.bare:
                self._notes.append(f"{view.name}: used without depth: {view.bare}")
            return None, False
        try:
            self._inside(view.depth)
            stored, exact = self._read_depth(view.depth)
            depth = turn.follow(stored)
            if depth is not stored:
                self._notes.append(f"{view.name}: used, its depth turned upright as its image is")
            return depth_at(depth, size), exact
        except UnitError:
            raise
        except (OSError, ValueError) as error:
            self._notes.append(f"{view.name}: used without depth: {in_words(error)}")
            return None, False

    def _read_depth(self, path: Path) -> tuple[np.ndarray, bool]:
        if self.depth_format.read is not None:
            return clean_depth(self.depth_format.read(path) * (self.config.depth_scale or 1.0), path), True
        stored = read_stored_depth(path)
        if stored.dtype.kind in "iu":
            stored = stored.astype(np.int64)
            stored[(stored == -1) | (stored == self.depth_format.invalid)] = 0
            depth = clean_depth((stored * self.depth_scale).astype(np.float32), path)
            return depth, bool(stored.max() > PNG_MAX)
        depth = clean_depth(stored * (self.config.depth_scale or 1.0), path)
        self._ask_for_unit(depth, path)
        return depth, True

    def _ask_for_unit(self, depth: np.ndarray, path: Path) -> None:
        """Raise where depth in floating point can hardly be meant in metres, unless the unit was given."""
        known = self.depth_format.unit_known or self.config.depth_scale
        if not known and (depth > 0).any() and float(np.median(depth[depth > 0])) > _METRES:
            median = float(np.median(depth[depth > 0]))
            raise UnitError(
                f"{path} has a median depth of {median:.4g}, which can hardly be meant in metres: give its unit, "
                "--depth-scale 0.001 for millimetres, 1 for metres"
            )

    def _inside(self, path: Path) -> None:
        if not os.path.lexists(path):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        if not any(stays_inside(folder, path) for folder in self.folders):
            how = "lies outside" if _target(path) == os.path.abspath(path) else "is a link out"
            raise ValueError(
                f"{path} {how} of {self.folders[0]}, to {_target(path)}; name the folder that holds both as --root"
            )

    def _shown_size(self, view: View, stored: Size, orientation: int) -> Size:
        turned = orientation in (5, 6, 7, 8) and self._as_shown(view, stored, orientation)
        size = (stored[1], stored[0]) if turned else stored
        if view.size is not None and view.intrinsic is not None and not _same_aspect(view.size, size):
            raise ValueError(
                f"the image of {size[1]} x {size[0]} pixels is not the one of its camera, which has "
                f"{view.size[1]} x {view.size[0]}"
            )
        return size

    def _as_shown(self, view: View, stored: Size, orientation: int) -> bool:
        """Whether the camera belongs to the image as its EXIF orientation shows it, not as its pixels are stored.

        Raises:
            ValueError: nothing tells.
        """
        if self.config.exif != "auto":
            return self.config.exif == "shown"
        if view.intrinsic is None:
            return True  # without a camera the upright image is what is wanted
        shown = (stored[1], stored[0])
        wanted = view.size or _size_by_middle(view.intrinsic)
        if orientation in (5, 6, 7, 8) and stored[0] != stored[1] and wanted is not None:
            fits_stored, fits_shown = _same_aspect(wanted, stored), _same_aspect(wanted, shown)
            if view.size is None:  # the principal point tells which side is the longer one, no more
                fits_stored = (wanted[0] > wanted[1]) == (stored[0] > stored[1])
                fits_shown = not fits_stored
            if fits_stored != fits_shown:
                return fits_shown
        raise ValueError(
            f"its EXIF orientation is {orientation}, and nothing tells whether its camera belongs to the pixels as "
            "stored or as shown: say --exif stored or --exif shown"
        )


@dataclass(frozen=True)
class _Turn:
    """How an image was turned upright, for the maps that go with it."""

    stored: Size
    orientation: int

    def follow(self, values: np.ndarray) -> np.ndarray:
        """A map with the aspect of the image as stored, turned as the image was; one with the other aspect as it is."""
        shown = (self.stored[1], self.stored[0])
        if self.orientation < 5 or values.ndim != 2 or not values.size or _same_aspect(self.stored, shown):
            return values
        fits = _same_aspect(values.shape, self.stored) and not _same_aspect(values.shape, shown)
        return turn_upright(values, self.orientation) if fits else values


class UnitError(ValueError):
    """The unit of depth is not clear, which costs the whole scene: every frame would be as wrong."""


def _size_by_middle(intrinsic: np.ndarray) -> Size | None:
    """The size of an image whose middle is the principal point; none where that is a square."""
    width, height = 2 * intrinsic[0, 2], 2 * intrinsic[1, 2]
    return (int(height), int(width)) if max(width, height) > 1.1 * min(width, height) else None


def _same_aspect(first: Size, second: Size) -> bool:
    # a pixel more or less is rounding
    slack = _ASPECT_ERROR + 1 / min(*first, *second)
    return abs(first[0] * second[1] / (first[1] * second[0]) - 1) <= slack


def _box(intrinsic: np.ndarray | None, size: Size, wanted: Size) -> tuple[float, float, float, float]:
    """The largest part of an image of ``size`` with the aspect of ``wanted``, in its middle."""
    scale = min(size[0] / wanted[0], size[1] / wanted[1])
    height, width = wanted[0] * scale, wanted[1] * scale
    left, top = (size[1] - width) / 2, (size[0] - height) / 2
    return left, top, left + width, top + height


def _moved(views: Sequence[View]) -> tuple[list[View], np.ndarray | None]:
    """The views in the world of `near_origin`, and its origin in theirs; none: they are near it as they are."""
    poses = [view.extrinsic for view in views if view.extrinsic is not None]
    if not poses:
        return list(views), None
    near, origin = near_origin(np.stack(poses))
    rest = iter(near)
    return [view if view.extrinsic is None else replace(view, extrinsic=next(rest)) for view in views], origin


def _target(path: Path) -> str:
    try:
        return str(path.resolve())
    except (OSError, RuntimeError, ValueError):
        return "itself"
