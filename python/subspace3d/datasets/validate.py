"""``validate DIR``: check every scene at or below a folder, say what is wrong and what to do about it."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from subspace3d.datasets import reprojection
from subspace3d.datasets.reprojection import LEAST_POINTS, STORED, SURE_SHARE, Agreement, View
from subspace3d.formats.images import EXR_INVALID, read_raw_depth
from subspace3d.formats.scene import PNG_MAX, SceneFile, find_scenes
from subspace3d.machine import usable_cores
from subspace3d.progress import track

Severity = Literal["error", "warning"]
WITHOUT_CAMERAS = "frames without cameras"
_LEAST_COVERAGE = 0.01  # of a frame's pixels with valid depth
_GOOD_SHARE, _BAD_SHARE = reprojection.GOOD_SHARE, 0.3  # of agreeing points
_LONELY = 0.05  # of the usual rate of agreeing points
_METRES = (0.02, 200.0)  # median depth that is plausible where the unit says metres
_SHOWN = 3  # scenes named per finding


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a scene."""

    severity: Severity
    message: str  # what is wrong and what to do, in words that are the same for every scene it befalls
    detail: str  # where, and the numbers behind it


@dataclass
class SceneReport:
    """What was found in one scene."""

    scene: str
    frames: int = 0
    findings: list[Finding] = field(default_factory=list)
    coverage: float | None = None  # mean share of pixels with valid depth
    agreement: float | None = None  # of the reprojected points, see `Agreement.share`
    unchecked: str | None = None  # why the cameras could not be checked

    def add(self, severity: Severity, message: str, detail: str) -> None:
        self.findings.append(Finding(severity, message, detail))


def check_scenes(root: Path) -> tuple[list[SceneReport], int]:
    """Check all scenes at or below ``root``; returns what was found, and how many scenes have errors.

    Raises:
        FileNotFoundError: ``root`` does not exist.
        ValueError: no scene lies below ``root``.
    """
    folders = find_scenes(root)
    with ThreadPoolExecutor(min(8, usable_cores())) as pool:
        reports = [
            check_scene(folder, folder.relative_to(root).as_posix(), pool)
            for folder in track(folders, f"validate {root}", len(folders), "scene")
        ]
    with_errors = sum(any(finding.severity == "error" for finding in report.findings) for report in reports)
    return reports, with_errors


def check_scene(folder: Path, name: str, pool: ThreadPoolExecutor) -> SceneReport:
    """Check one scene: its record, every file, coverage, then cameras and depth against each other."""
    report = SceneReport(name)
    try:
        scene = SceneFile(folder)
    except (OSError, ValueError) as error:
        report.add("error", "scene.json breaks the format", str(error))
        return report
    report.frames = len(scene)
    frames = list(pool.map(lambda index: _read_frame(scene, index), range(len(scene))))
    for findings, _, _ in frames:
        report.findings += findings
    shares = [share for _, _, share in frames if share is not None]
    if shares:
        report.coverage = float(np.mean(shares))
        if max(shares) == 0:
            report.add("error", "no pixel has valid depth", "0 in every depth map, or outside every mask")
    without = [index for index, (found, _, share) in enumerate(frames) if share is None and not found]
    if scene.has_depth and without:
        message = "frames without depth among others with depth: they train and measure cameras alone"
        shown = ", ".join(map(str, without[:8])) + (", ..." if len(without) > 8 else "")
        report.add("warning", message, f"{len(without)} of {len(scene)} frames: {shown}")
    whole = [(index, view) for index, (_, view, _) in enumerate(frames) if view is not None]
    if whole:
        _check_units(report, scene, whole)
    if whole or not scene.has_cameras:
        _check_cameras(report, scene, whole)
    return report


def _read_frame(scene: SceneFile, index: int) -> tuple[list[Finding], View | None, float | None]:
    """Findings in one frame's files; the reduced view when they are whole; the share of pixels with valid depth."""
    findings: list[Finding] = []
    parts: dict[str, Any] = {}
    readers: dict[str, Callable[[int], Any]] = {
        "intrinsics": scene.intrinsic,
        "extrinsics_w2c": scene.extrinsic,
        "image": scene.image,
        "mask": scene.mask,
        "depth": functools.partial(_raw_depth, scene),
    }
    for part, read in readers.items():
        try:
            parts[part] = read(index)
        except (OSError, ValueError) as error:
            findings.append(Finding("error", f"{part}: missing, truncated or against the format", str(error)))
    if findings:
        return findings, None, None
    where = f"frame {index}"
    intrinsic, extrinsic = parts["intrinsics"], parts["extrinsics_w2c"]
    if intrinsic is not None:
        findings += _intrinsic_findings(intrinsic, scene.size, where)
    share = None
    depth = np.zeros(scene.size, np.float32)
    if parts["depth"] is not None:
        depth, more = _clean_depth(parts["depth"], scene, where)
        findings += more
        if parts["mask"] is not None:
            depth = np.where(parts["mask"], depth, np.float32(0))
            if not parts["mask"].any():
                findings.append(Finding("error", "a mask is empty: no depth of its frame counts", where))
        share = float((depth > 0).mean())
        if share < _LEAST_COVERAGE:
            message = f"less than {_LEAST_COVERAGE:.0%} of a frame has valid depth"
            findings.append(Finding("warning", message, f"{where}: {share:.2%}"))
    if intrinsic is None or extrinsic is None:
        return findings, None, share
    return findings, reprojection.reduce_view(parts["image"], depth, intrinsic, extrinsic), share


def _raw_depth(scene: SceneFile, index: int) -> np.ndarray | None:
    path = scene.depth_path(index)
    return None if path is None else read_raw_depth(path, scene.depth_scale, scene.size)


def _clean_depth(depth: np.ndarray, scene: SceneFile, where: str) -> tuple[np.ndarray, list[Finding]]:
    findings = []
    bad = ~np.isfinite(depth)
    if bad.any():
        message = "depth holds NaN or infinity; such pixels are taken as invalid, 0 says so plainly"
        findings.append(Finding("warning", message, f"{where}: {bad.mean():.1%} of the pixels"))
    depth = np.where(bad | (depth > EXR_INVALID), np.float32(0), depth)
    if depth.min() < 0:
        findings.append(Finding("error", "depth is negative", f"{where}: down to {depth.min():g}"))
        depth = np.maximum(depth, 0)
    full = float((np.abs(depth - PNG_MAX * scene.depth_scale) < scene.depth_scale / 2).mean())
    if full > _LEAST_COVERAGE:
        message = "depth stops at the largest value of a 16-bit png: depth_scale is too small, or 65535 means invalid"
        findings.append(Finding("warning", message, f"{where}: {full:.1%} of the pixels"))
    return depth, findings


def _intrinsic_findings(intrinsic: np.ndarray, size: tuple[int, int], where: str) -> list[Finding]:
    (height, width), cx, cy = size, intrinsic[0, 2], intrinsic[1, 2]
    if not (0.25 * width <= cx <= 0.75 * width and 0.25 * height <= cy <= 0.75 * height):
        message = "the principal point is far from the middle: are the intrinsics for images of another size?"
        severity: Severity = "warning" if 0 < cx < width and 0 < cy < height else "error"
        return [Finding(severity, message, f"{where}: ({cx:g}, {cy:g}) in {width} x {height} pixels")]
    return []


def _check_units(report: SceneReport, scene: SceneFile, views: Sequence[tuple[int, View]]) -> None:
    medians = {index: float(np.median(view.depth[view.depth > 0])) for index, view in views if (view.depth > 0).any()}
    if not medians:
        return
    median = float(np.median(list(medians.values())))
    for index, value in medians.items():
        if not 1 / 20 <= value / median <= 20:
            message = "the depth of single frames is in another unit than that of the others"
            report.add("error", message, f"frame {index}: median depth {value:.4g}, the scene's {median:.4g}")
    if scene.unit == "m" and not _METRES[0] <= median <= _METRES[1]:
        message = "the median depth is not plausible in metres: depth_scale must give metres per step of the png"
        report.add("warning", message, f"median depth {median:.4g} m, depth_scale {scene.depth_scale:g}")


def _check_cameras(report: SceneReport, scene: SceneFile, indexed: Sequence[tuple[int, View]]) -> None:
    views = [view for _, view in indexed]
    if not scene.has_cameras:
        report.unchecked = WITHOUT_CAMERAS
    elif not scene.has_depth:
        report.unchecked = "no depth"
    elif not scene.translation_known:
        report.unchecked = "only rotations are known"
    elif len(views) < 2:
        report.unchecked = "fewer than two whole views"
    if report.unchecked:
        return
    pairs = reprojection.telling_pairs(len(views))
    stored = reprojection.measure(views, pairs, STORED)
    report.agreement = None if math.isnan(stored.share) else stored.share
    fault = _mix_up(stored, views, pairs)
    if fault is not None:
        report.add("error", *fault)
        return
    stored = reprojection.measure(views, reprojection.choose_pairs(len(views)), STORED)
    decided = stored.agreeing + stored.contradicting
    if decided < LEAST_POINTS:
        report.unchecked = "the views have too little in common"
    elif stored.share < _GOOD_SHARE:
        severity: Severity = "error" if stored.share < _BAD_SHARE else "warning"
        message = "cameras and depth contradict each other, and no known mix-up explains it"
        report.add(severity, message, f"{stored.share:.0%} of {decided} reprojected points agree")
    else:
        # of a frame without depth nothing else can be told
        bare = {index for index, view in indexed if not (view.depth > 0).any()}
        _check_single_frames(report, [index for index, _ in indexed], stored, bare)


def _check_single_frames(report: SceneReport, indices: Sequence[int], stored: Agreement, bare: set[int]) -> None:
    agreeing, contradicting, sampled = stored.by_view.T
    usual = float(np.median(agreeing / np.maximum(sampled, 1)))
    sound = float(np.median(agreeing / np.maximum(agreeing + contradicting, 1))) >= SURE_SHARE
    for index, good, bad, all_ in zip(indices, agreeing.tolist(), contradicting.tolist(), sampled.tolist()):
        if sound and good + bad >= LEAST_POINTS and good < _GOOD_SHARE * (good + bad):
            severity: Severity = "error" if good < _BAD_SHARE * (good + bad) else "warning"
            message = "camera or depth of single frames contradicts the other frames"
            report.add(severity, message, f"frame {index}: {good} points agree, {bad} contradict")
        elif index not in bare and good < _LONELY * usual * all_:
            message = "single frames show hardly a point of the other frames: is their camera right?"
            report.add(
                "warning", message, f"frame {index}: {good / all_:.1%} of the points agree, usual are {usual:.0%}"
            )


def _mix_up(stored: Agreement, views: Sequence[View], pairs: Sequence[tuple[int, int]]) -> tuple[str, str] | None:
    """The fault that explains the scene clearly better than reading it as stored, and the numbers; none: no such."""
    better = reprojection.better_reading(views, pairs, stored)
    if better is None:
        return None
    reading, found = better
    share = "nothing" if math.isnan(stored.share) else f"{stored.share:.0%}"
    detail = f"as stored {share} of the reprojected points agree, {reading.name} {found.share:.0%}"
    if found.color_error < stored.color_error:
        detail += f" (colours differ by {stored.color_error:.0f} and {found.color_error:.0f} of 255)"
    return reading.fault, detail


def describe(root: Path, reports: Sequence[SceneReport], with_errors: int) -> Iterator[str]:
    """What was found, in lines for the terminal."""
    frames = sum(report.frames for report in reports)
    sound = sum(not report.findings for report in reports)
    yield (
        f"{root}: {len(reports)} scenes, {frames} frames: {sound} without fault, {with_errors} with errors, "
        f"{len(reports) - sound - with_errors} with warnings"
    )
    groups: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for report in reports:
        for finding in report.findings:
            groups.setdefault((finding.severity, finding.message), []).append((report.scene, finding.detail))
    for (severity, message), places in sorted(groups.items(), key=lambda group: (group[0][0], -len(group[1]))):
        scenes = list(dict.fromkeys(scene for scene, _ in places))
        yield f"{severity} in {len(scenes)} of {len(reports)} scenes: {message}"
        yield from (f"  {scene}: {detail}" for scene, detail in places[:_SHOWN])
        if len(places) > _SHOWN:
            yield f"  and {len(places) - _SHOWN} more"
    for reason, count in Counter(report.unchecked for report in reports if report.unchecked).items():
        yield f"cameras of {count} scenes not checked: {reason}"
    agreements = [report.agreement for report in reports if report.agreement is not None]
    if agreements:
        yield f"reprojected points that agree: {np.mean(agreements):.1%} on average, {min(agreements):.1%} at least"
    coverages = [report.coverage for report in reports if report.coverage is not None]
    if coverages:
        yield f"pixels with valid depth: {np.mean(coverages):.1%} on average, {min(coverages):.1%} at least"
