"""The metrics by name, their mean over scenes, and the plain-text table of methods."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    """How a metric is shown.

    Args:
        label (str): column head.
        lower_is_better (bool): which end is best.
        unit (str): "scene" (unit of the scene's depth), "deg", or "" for a ratio.
        alignment (str): what is fitted to the truth first, a key of `ALIGNMENTS`.
        main (bool): shown in the table of methods.
    """

    label: str
    lower_is_better: bool
    unit: str
    alignment: str
    main: bool = False


ALIGNMENTS: dict[str, str] = {
    "raw": "nothing is fitted: predicted unit = mean distance of the true points from the first camera; first cameras "
    "coincide",
    "none": "needs none: relative poses of frame pairs",
    "sim3_icp": "Umeyama Sim(3) on all corresponding valid pixels of the scene, unweighted, then point-to-point ICP",
    "sim3_cameras": "Umeyama Sim(3) on the camera centres, unweighted",
    "scale": "one scale per scene, least sum of |s pred - true| / true (weighted median of true / pred)",
    "frame_affine": "per frame, the truth to the prediction: scale and shift of least sum of |s true + t - pred|; the "
    "prediction is compared with the fitted truth",
    "scale_translation": "one scale and 3D translation per scene, points in camera coordinates, least sum of "
    "|s p + t - q|_1 / |q|",
}


METRICS: dict[str, Metric] = {
    "accuracy": Metric("Acc", True, "scene", "sim3_icp", main=True),
    "accuracy_median": Metric("Acc median", True, "scene", "sim3_icp"),
    "accuracy_raw": Metric("Acc raw", True, "scene", "raw"),
    "accuracy_median_raw": Metric("Acc median raw", True, "scene", "raw"),
    "completeness": Metric("Comp", True, "scene", "sim3_icp", main=True),
    "completeness_median": Metric("Comp median", True, "scene", "sim3_icp"),
    "completeness_raw": Metric("Comp raw", True, "scene", "raw"),
    "completeness_median_raw": Metric("Comp median raw", True, "scene", "raw"),
    "chamfer": Metric("Chamfer", True, "scene", "sim3_icp"),
    "chamfer_raw": Metric("Chamfer raw", True, "scene", "raw"),
    "normal_consistency": Metric("NC", False, "", "sim3_icp", main=True),
    "normal_consistency_accuracy": Metric("NC pred to true", False, "", "sim3_icp"),
    "normal_consistency_completeness": Metric("NC true to pred", False, "", "sim3_icp"),
    "normal_consistency_raw": Metric("NC raw", False, "", "raw"),
    "normal_consistency_accuracy_raw": Metric("NC pred to true raw", False, "", "raw"),
    "normal_consistency_completeness_raw": Metric("NC true to pred raw", False, "", "raw"),
    "abs_rel": Metric("AbsRel", True, "", "scale", main=True),
    "abs_rel_raw": Metric("AbsRel raw", True, "", "raw", main=True),
    "abs_rel_frame_affine": Metric("AbsRel frame affine", True, "", "frame_affine"),
    "abs_rel_scale_translation": Metric("AbsRel scale+3D shift", True, "", "scale_translation"),
    "delta_1_25": Metric("d<1.25", False, "", "scale", main=True),
    "delta_1_25_raw": Metric("d<1.25 raw", False, "", "raw"),
    "delta_1_25_frame_affine": Metric("d<1.25 frame affine", False, "", "frame_affine"),
    "delta_1_25_scale_translation": Metric("d<1.25 scale+3D shift", False, "", "scale_translation"),
    "point_rel": Metric("PointRel", True, "", "scale_translation"),
    "point_rel_raw": Metric("PointRel raw", True, "", "raw"),
    "point_delta_0_25": Metric("Point d<0.25", False, "", "scale_translation"),
    "point_delta_0_25_raw": Metric("Point d<0.25 raw", False, "", "raw"),
    "rotation_error_deg": Metric("Rot deg", True, "deg", "none", main=True),
    "rotation_error_deg_median": Metric("Rot deg median", True, "deg", "none"),
    "translation_error_deg": Metric("Trans deg", True, "deg", "none", main=True),
    "translation_error_deg_median": Metric("Trans deg median", True, "deg", "none"),
    "pose_auc_5": Metric("AUC@5", False, "", "none"),
    "pose_auc_15": Metric("AUC@15", False, "", "none"),
    "pose_auc_30": Metric("AUC@30", False, "", "none"),
    "camera_centre_error": Metric("Camera centre", True, "scene", "sim3_icp"),
    "camera_centre_error_raw": Metric("Camera centre raw", True, "scene", "raw"),
    "trajectory_error": Metric("ATE", True, "scene", "sim3_cameras"),
}


def mean_over_scenes(per_scene: Mapping[str, Mapping[str, float | None]]) -> dict[str, float | None]:
    """Mean of every metric over the scenes where it is defined; None where there is none."""
    means: dict[str, float | None] = {}
    for name in METRICS:
        values = [value for metrics in per_scene.values() if (value := metrics.get(name)) is not None]
        means[name] = math.fsum(values) / len(values) if values else None
    return means


def scenes_in_mean(per_scene: Mapping[str, Mapping[str, float | None]]) -> dict[str, int]:
    """The number of scenes where each metric is defined, over which `mean_over_scenes` averages."""
    return {name: sum(metrics.get(name) is not None for metrics in per_scene.values()) for name in METRICS}


def format_table(results: Mapping[str, Any]) -> str:
    """One row per method, one column per main metric, the best mean of a column marked with ``*``.

    Args:
        results (Mapping): the content of results.json.

    Returns:
        str: aligned plain text with a head, followed by notes on scenes that were left out; no final newline.
    """
    methods = results["methods"]
    columns = [name for name, metric in METRICS.items() if metric.main]
    head = ["method", "trained", *(_head(METRICS[name]) for name in columns)]
    best = {name: _best(name, (method["mean"].get(name) for method in methods.values())) for name in columns}
    rows = [head]
    for label, method in methods.items():
        trained = method.get("trainable_parameters")
        cells = [label, "-" if trained is None else f"{trained:,}"]
        for name in columns:
            text = _format(method["mean"].get(name))
            # what is equal in print is equally good
            cells.append(f"{text}*" if text != "-" and text == best[name] else f"{text} ")
        rows.append(cells)
    widths = [max(len(row[index]) for row in rows) for index in range(len(head))]
    lines = [_line(row, widths) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*lines, *_notes(results)])


def _head(metric: Metric) -> str:
    return f"{metric.label} {'v' if metric.lower_is_better else '^'} "


def _line(cells: list[str], widths: list[int]) -> str:
    first = cells[0].ljust(widths[0])
    return "  ".join([first, *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:]))]).rstrip()


def _format(value: float | None) -> str:
    return "-" if value is None else f"{value:#.4g}".rstrip(".")


def _best(name: str, values: Iterable[float | None]) -> str | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return _format(min(known) if METRICS[name].lower_is_better else max(known))


def _notes(results: Mapping[str, Any]) -> list[str]:
    scenes = len(results["scenes"])
    notes = [f"mean over {scenes} scene{'s' if scenes != 1 else ''}; v lower is better, ^ higher is better, * best"]
    for entry in results.get("skipped", []):
        notes.append(f"skipped {entry['scene']}: {entry['reason']}")
    base = _weights(results["methods"].get("base", {}))
    for label, method in results["methods"].items():
        if _weights(method) != base:
            notes.append(f"{label} started from other weights than base")
        for scene, reason in method.get("failed", {}).items():
            notes.append(f"{label} failed on {scene}: {reason}")
    return notes


def _weights(method: Mapping[str, Any]) -> tuple[Any, ...]:
    backbone = method.get("backbone") or {}
    return tuple(backbone.get(key) for key in ("name", "sha256", "seed"))
