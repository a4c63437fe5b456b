"""Do cameras and depth of a scene agree? Points of one view are looked for in another, under several readings.

A point that should be seen by another view either lies on the surface that view shows (it agrees), behind it (it is
hidden, which says nothing), or in front of it (it contradicts: the view would show it instead). With the cameras and
depth read rightly hardly any point contradicts, however far apart the views are; read wrongly most do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from subspace3d.cropping import crop_resize
from subspace3d.geometry import FLIP, camera_rays, invert_pose, pixel_centres, project

TOLERANCE = 0.02  # of the depth, on either side of the range in the 3 x 3 pixels around the point
SURE_SHARE, GOOD_SHARE = 0.8, 0.6  # of agreeing points: nothing is wrong, and something else need not be looked for
_EXACT_SHARE = 0.97  # of agreeing points under a usual unit, with which no other factor is looked for
LEAST_POINTS = 100  # that agree or contradict; with fewer nothing is concluded
_SIDE = 160  # longer side of the views that are reprojected, pixels
_COARSE_TOLERANCE = 0.08
_POINTS = 1000  # per pair of views
_SPREAD = 12  # views that are compared with each other, in scenes with more than that


@dataclass
class View:
    """A view reduced to a size at which thousands of pairs cost little."""

    intrinsic: np.ndarray  # float64 [3, 3], pixels
    extrinsic: np.ndarray  # float64 [3, 4], as stored
    depth: np.ndarray  # float32 [H, W], 0 = invalid
    luma: np.ndarray  # float32 [H, W], 0..255


@dataclass(frozen=True)
class Reading:
    """One way to read the stored matrices and depths."""

    name: str
    fault: str  # what to tell somebody whose data this reading fits better than the stored one
    extrinsic: Callable[[np.ndarray], np.ndarray] = lambda stored: stored
    scale: float = 1.0  # of the depth
    along_ray: bool = False  # the depth is the distance along the ray
    order: Callable[[int], np.ndarray] | None = None  # which view has the camera of view i, of so many


@dataclass(frozen=True)
class Agreement:
    """Counts over pairs of views."""

    agreeing: int
    contradicting: int
    color_error: float  # median difference of luma between a point and where it agrees, 0..255; nan without any
    by_view: np.ndarray  # int [S, 3]: agreeing, contradicting and all points of the pairs with a view
    depth_error: float  # median relative difference of depth between a point and where it agrees; nan without any

    @property
    def share(self) -> float:
        """Agreeing points among those that say something; nan without any."""
        decided = self.agreeing + self.contradicting
        return self.agreeing / decided if decided else float("nan")


def scaled(factor: float) -> Reading:
    """The depth is in another unit than the translations: true depth is the stored one times ``factor``."""
    known = [words for value, words in _UNITS.items() if abs(factor / value - 1) < 0.05]
    advice = f"multiply depth_scale by {known[0]}" if known else "multiply depth_scale by the factor given here"
    fault = f"depth is in another unit than the translations: {advice}"
    return Reading(f"depth times {factor:.4g}", fault, scale=factor)


_UNITS = {
    1e-3: "0.001 (depth in millimetres, translations in metres)",
    1e3: "1000 (depth in metres, translations in millimetres)",
    1e-2: "0.01 (depth in centimetres, translations in metres)",
    1e2: "100 (depth in metres, translations in centimetres)",
    0.2: "0.2 (5000 steps to the metre, as TUM's pngs, read as 1000)",
    5.0: "5 (1000 steps to the metre read as 5000, as TUM's pngs)",
    0.3048: "0.3048 (depth in feet, translations in metres)",
}
_SORTED = "the cameras are in another order than the images, 1, 10, 11, 2 in place of 1, 2, 10, 11"


def _as_text(count: int) -> np.ndarray:
    """The numbers 0 to ``count`` - 1 as a sort by their text has them."""
    return np.array(sorted(range(count), key=str), np.int64)


STORED = Reading("as stored", "")
READINGS = (
    Reading(
        "inverted",
        "extrinsics_w2c holds camera-to-world matrices (c2w): store their inverse, camera-from-world (w2c); of an rgbd "
        "folder: convert it with the other --poses",
        invert_pose,
    ),
    Reading(
        "y and z negated",
        "extrinsics_w2c is camera-from-world in OpenGL axes (y up, z backward): negate its second and third row",
        lambda stored: FLIP @ stored,
    ),
    Reading(
        "inverted, y and z negated",
        "extrinsics_w2c holds camera-to-world matrices (c2w) in OpenGL axes (y up, z backward), as Blender and "
        "nerfstudio write them: invert them, then negate the second and third row",
        lambda stored: FLIP @ invert_pose(stored),
    ),
    Reading(
        "depth as distance along the ray",
        "depth is the distance along the ray: store z, the distance times the cosine",
        along_ray=True,
    ),
    *map(scaled, _UNITS),
    Reading(
        "cameras in reverse order",
        "the cameras are in the reverse order of the images: turn one of the lists round",
        order=lambda count: np.arange(count)[::-1],
    ),
    *(
        Reading(
            f"every camera with the {'next' if shift < 0 else 'previous'} image",
            "the cameras are one image off: a list has an entry too many or too few at its beginning",
            order=lambda count, shift=shift: np.roll(np.arange(count), shift),  # type: ignore[misc]
        )
        for shift in (-1, 1)
    ),
    Reading(
        "cameras sorted as text",
        f"{_SORTED}: the cameras are sorted by name, the images by number",
        order=lambda count: np.argsort(_as_text(count)),
    ),
    Reading(
        "images sorted as text",
        f"{_SORTED}: the images are sorted by name, the cameras by number",
        order=_as_text,
    ),
)


def reduce_view(image: np.ndarray, depth: np.ndarray, intrinsic: np.ndarray, extrinsic: np.ndarray) -> View:
    """A view of at most 160 pixels across, its colours as luma."""
    height, width = depth.shape
    factor = min(1.0, _SIDE / max(height, width))
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    image, depth, intrinsic = crop_resize(image, depth, intrinsic, (0, 0, width, height), size)
    luma = image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    return View(intrinsic, extrinsic, depth, luma)


def better_reading(
    views: Sequence[View], pairs: Sequence[tuple[int, int]], stored: Agreement
) -> tuple[Reading, Agreement] | None:
    """The reading that explains the views clearly better than the stored one; none: there is no such."""
    measured = [(reading, measure(views, pairs, reading)) for reading in READINGS]
    explaining = [(reading, found) for reading, found in measured if _is_better(found, stored)]
    best = max(explaining, key=_merit, default=None)
    # a usual unit may lie near the true one: 0.3048 explains much of what 0.37 does
    near = best is not None and best[0].scale != 1 and not best[1].share >= _EXACT_SHARE
    if near or (best is None and not stored.share >= SURE_SHARE):
        reading = find_scale(views, pairs)
        found = measure(views, pairs, reading)
        if _is_better(found, stored) and (best is None or _merit((reading, found)) > _merit(best)):
            best = reading, found
    return best


def _merit(pair: tuple[Reading, Agreement]) -> float:
    return pair[1].share - pair[1].color_error / 100


def _is_better(other: Agreement, stored: Agreement) -> bool:
    """Far more points agree, or as many agree and the contradictions vanish or the colours fit far better.

    The last is what tells readings apart where the views hardly differ.
    """
    if other.agreeing < LEAST_POINTS or not other.share >= GOOD_SHARE:
        return False
    stored_share = 0.0 if np.isnan(stored.share) else stored.share
    if other.agreeing >= 1.25 * stored.agreeing and other.share >= stored_share + 0.1:
        return True
    if other.agreeing < 0.8 * stored.agreeing:
        return False
    if stored.contradicting >= LEAST_POINTS and other.contradicting <= 0.2 * stored.contradicting:
        return True
    return other.share >= stored_share - 0.02 and other.color_error < 0.6 * stored.color_error - 1


def choose_pairs(count: int) -> list[tuple[int, int]]:
    """The pairs of `telling_pairs`, and every view with the next in recorded order."""
    return sorted({*telling_pairs(count), *((i, i + 1) for i in range(count - 1))})


def telling_pairs(count: int) -> list[tuple[int, int]]:
    """All ordered pairs of some views, at most 12 and evenly spread, and each of these with the next view.

    In a video nearly all views lie as close to the next one as to agree however they are read; these pairs are enough
    of them, and most have parallax.
    """
    some = np.unique(np.linspace(0, count - 1, min(count, _SPREAD)).round().astype(int)).tolist()
    pairs = {(i, j) for i in some for j in some if i != j}
    return sorted(pairs | {(i, i + 1) for i in some if i + 1 < count})


def measure(
    views: Sequence[View], pairs: Sequence[tuple[int, int]], reading: Reading, tolerance: float = TOLERANCE
) -> Agreement:
    """Look for points of view i in view j, for every pair (i, j)."""
    extrinsics = [reading.extrinsic(view.extrinsic) for view in views]
    if reading.order is not None:
        extrinsics = [extrinsics[index] for index in reading.order(len(views))]
    bounds = [_depth_range(view, reading) for view in views]
    points = [_world_points(view, extrinsic, reading) for view, extrinsic in zip(views, extrinsics)]
    by_view = np.zeros((len(views), 3), np.int64)
    errors, apart = [], []
    for i, j in pairs:
        world, luma = points[i]
        nearest, farthest = bounds[j]
        row, column, inside, z = _pixels(world, extrinsics[j], views[j])
        near, far = nearest[row, column], farthest[row, column]
        shown = far > 0
        front = shown & (z < near * (1 - tolerance))
        agrees = shown & ~front & (z <= far * (1 + tolerance))
        counts = [int(agrees.sum()), int(front.sum()), len(world)]
        by_view[i] += counts
        by_view[j] += counts
        errors.append(np.abs(luma[inside] - views[j].luma[row, column])[agrees])
        apart.append(np.abs((near + far)[agrees] / (2 * z[agrees]) - 1))
    agreeing, contradicting, _ = (by_view.sum(axis=0) // 2).tolist()
    return Agreement(agreeing, contradicting, _median(errors), by_view, _median(apart))


def _median(parts: Sequence[np.ndarray]) -> float:
    values = np.concatenate(parts) if parts else np.zeros(0)
    return float(np.median(values)) if len(values) else float("nan")


def find_scale(views: Sequence[View], pairs: Sequence[tuple[int, int]]) -> Reading:
    """Depth times the factor between 1e-6 and 1e6 with which most points agree and lie nearest to the surface met.

    Factors with which hardly any point says something do not count: less than a quarter of the most agreeing points.
    """

    def best(factors: np.ndarray, tolerance: float) -> float:
        found = [measure(views, pairs, scaled(float(factor)), tolerance) for factor in factors]
        agreeing = np.array([one.agreeing for one in found])
        shares = np.where(agreeing >= max(1, agreeing.max() // 4), [one.share for one in found], 0.0)
        # shares hardly tell those apart that are as good as the best up to a few points
        errors = np.array([one.depth_error for one in found])
        errors[(shares < shares.max() - 0.01) | np.isnan(errors)] = np.inf
        return float(factors[errors.argmin()])

    coarse = best(1e-6 * 1.15 ** np.arange(198), _COARSE_TOLERANCE)
    fine = best(coarse * np.linspace(0.8, 1.25, 46), TOLERANCE)
    return scaled(best(fine * np.linspace(0.985, 1.015, 13), TOLERANCE))


def _world_points(view: View, extrinsic: np.ndarray, reading: Reading) -> tuple[np.ndarray, np.ndarray]:
    """World points [n, 3] of an even choice of valid pixels, and their luma [n]."""
    row, column = np.nonzero(view.depth > 0)
    # a step that shares no factor with the rows, so that the choice does not line up in columns
    step = max(1, len(row) // _POINTS) | 1
    row, column = row[::step], column[::step]
    rays = camera_rays(view.intrinsic, np.stack([column, row], axis=1) + 0.5)
    depth = view.depth[row, column].astype(np.float64) * reading.scale
    if reading.along_ray:
        depth /= np.linalg.norm(rays, axis=1)
    return (rays * depth[:, None] - extrinsic[:, 3]) @ extrinsic[:, :3], view.luma[row, column]


def _pixels(world: np.ndarray, extrinsic: np.ndarray, view: View) -> tuple[np.ndarray, ...]:
    """Rows and columns of the points that fall into the view, which points these are, and their depths."""
    height, width = view.depth.shape
    pixels, z = project(world, extrinsic, view.intrinsic)
    inside = np.flatnonzero((z > 1e-9) & ((pixels >= 0) & (pixels < (width, height))).all(axis=1))
    column, row = pixels[inside].T.astype(np.int64)
    return row, column, inside, z[inside]


def _depth_range(view: View, reading: Reading) -> tuple[np.ndarray, np.ndarray]:
    """Least (inf without any) and greatest (0) valid depth of the 3 x 3 pixels around each, [H, W]."""
    depth = view.depth.astype(np.float64) * reading.scale
    height, width = depth.shape
    if reading.along_ray:
        depth /= np.linalg.norm(camera_rays(view.intrinsic, pixel_centres(height, width)), axis=-1)
    padded = np.pad(depth, 1)
    around = np.stack([padded[i : i + height, j : j + width] for i in range(3) for j in range(3)])
    return np.where(around > 0, around, np.inf).min(axis=0), around.max(axis=0)
