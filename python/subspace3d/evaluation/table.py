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


# by the scale of the backbone
RAW: dict[str, str] = {
    "scene": "nothing is fitted: predicted unit = mean distance of the true points from the first camera; first "
    "cameras coincide",
    "metric": "nothing is fitted: predicted unit = a metre, of scenes in m or mm; first cameras coincide",
    "free": "not measured: the model predicts each scene in a unit of its own",
}
ALIGNMENTS: dict[str, str] = {
    "raw": RAW["scene"],
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
    "f_score": Metric("F-score", False, "", "sim3_icp"),
    "f_score_raw": Metric("F-score raw", False, "", "raw"),
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
    "pose_auc_3": Metric("AUC@3", False, "", "none"),
    "pose_auc_5": Metric("AUC@5", False, "", "none"),
    "pose_auc_15": Metric("AUC@15", False, "", "none"),
    "pose_auc_30": Metric("AUC@30", False, "", "none"),
    "camera_centre_error": Metric("Camera centre", True, "scene", "sim3_icp"),
    "camera_centre_error_raw": Metric("Camera centre raw", True, "scene", "raw"),
    "trajectory_error": Metric("ATE", True, "scene", "sim3_cameras"),
}


def _down(label: str, unit: str, main: bool = False) -> Metric:
    return Metric(label, True, unit, "protocol", main)


def _up(label: str, main: bool = False) -> Metric:
    return Metric(label, False, "", "protocol", main)


# what the published protocols measure; `protocols` says which and after what alignment
QUANTITIES: dict[str, Metric] = {
    "auc_3": _up("AUC@3", main=True),
    "auc_5": _up("AUC@5"),
    "auc_15": _up("AUC@15"),
    "auc_30": _up("AUC@30", main=True),
    "ate": _down("ATE", "scene", main=True),
    "rpe_translation": _down("RPE trans", "scene"),
    "rpe_rotation_deg": _down("RPE rot", "deg"),
    "accuracy": _down("Acc", "scene", main=True),
    "accuracy_median": _down("Acc median", "scene"),
    "completeness": _down("Comp", "scene", main=True),
    "completeness_median": _down("Comp median", "scene"),
    "overall": _down("Overall", "scene", main=True),
    "overall_posed": _down("Overall, true cameras", "scene"),
    "overall_dtu": _down("Overall, DTU", "scene"),
    "f_score": _up("F@0.05", main=True),
    "precision": _up("Precision@0.05"),
    "recall": _up("Recall@0.05"),
    "f_score_posed": _up("F@0.05, true cameras"),
    "normal_consistency": _up("NC", main=True),
    "normal_consistency_median": _up("NC median"),
    "abs_rel_scale": _down("AbsRel scale", "", main=True),
    "delta_scale": _up("d<1.25 scale"),
    "abs_rel_scale_shift": _down("AbsRel scale+shift", "", main=True),
    "delta_scale_shift": _up("d<1.25 scale+shift"),
    "abs_rel_metric": _down("AbsRel metric", "", main=True),
    "delta_metric": _up("d<1.25 metric"),
    "abs_rel_frame_affine": _down("AbsRel frame affine", "", main=True),
    "delta_frame_affine": _up("d<1.25 frame affine"),
}


def mean_over_scenes(
    per_scene: Mapping[str, Mapping[str, float | None]], names: Iterable[str] = METRICS
) -> dict[str, float | None]:
    """Mean of every metric over the scenes where it is defined; None where there is none."""
    means: dict[str, float | None] = {}
    for name in names:
        values = [value for metrics in per_scene.values() if (value := metrics.get(name)) is not None]
        means[name] = math.fsum(values) / len(values) if values else None
    return means


def scenes_in_mean(per_scene: Mapping[str, Mapping[str, float | None]]) -> dict[str, int]:
    """The number of scenes where each metric is defined, over which `mean_over_scenes` averages."""
    return {name: sum(metrics.get(name) is not None for metrics in per_scene.values()) for name in METRICS}


def scenes_of(record: Mapping[str, Any], metric: str) -> frozenset[str]:
    """The scenes where a method, or a method under a protocol, has a value of a metric."""
    per_scene = record.get("per_scene", {})
    return frozenset(scene for scene, values in per_scene.items() if values.get(metric) is not None)


def is_comparable(records: Iterable[Mapping[str, Any]], metric: str) -> bool:
    """Whether all methods that have a metric have it for the same scenes: only then is one mean better than another."""
    return len({found for record in records if (found := scenes_of(record, metric))}) <= 1


def partial_means(methods: Mapping[str, Mapping[str, Any]], labels: Mapping[str, str]) -> list[str]:
    """A line per method whose means leave out scenes that another method has, in words.

    Args:
        methods (Mapping): name -> its record, or its record under a protocol.
        labels (Mapping): metric -> label.
    """
    left_out: dict[tuple[str, int, int], list[str]] = {}
    for metric, label in labels.items():
        found = {name: scenes_of(record, metric) for name, record in methods.items()}
        every = frozenset[str]().union(*found.values())
        for name, scenes in found.items():
            if 0 < len(scenes) < len(every):
                left_out.setdefault((name, len(scenes), len(every)), []).append(label)
    return [
        f"means of {name} are over {some} of {every} scenes in "
        f"{'all metrics' if len(found) == len(labels) else ', '.join(found)}: not to be compared"
        for (name, some, every), found in left_out.items()
    ]


def format_table(results: Mapping[str, Any]) -> str:
    """One row per method, one column per main metric, the best mean of a column marked with ``*``.

    Args:
        results (Mapping): the content of results.json.

    Returns:
        str: aligned plain text with a head, followed by notes on scenes that were left out; no final newline.
    """
    methods = results["methods"]
    columns = [name for name, metric in METRICS.items() if metric.main]
    head = ["method", "trained", *(head_of(METRICS[name]) for name in columns)]
    values = {name: [method["mean"].get(name) for method in methods.values()] for name in columns}
    cells = {
        name: marked(METRICS[name], column, is_comparable(methods.values(), name)) for name, column in values.items()
    }
    rows = [head]
    for index, (label, method) in enumerate(methods.items()):
        trained = method.get("trainable_parameters")
        rows.append([label, "-" if trained is None else f"{trained:,}", *(cells[name][index] for name in columns)])
    return "\n".join([*aligned(rows), *_notes(results)])


def format_protocols(results: Mapping[str, Any]) -> str:
    """One row per metric and method, one column per protocol; "-" where a protocol does not have the metric.

    Args:
        results (Mapping): the content of results.json.

    Returns:
        str: aligned plain text with a head, and the alignment of each protocol below; no final newline.
    """
    protocols = results["protocols"]
    shown: dict[str, Mapping[str, Any]] = {}
    for protocol in protocols.values():
        shown.update(protocol["metrics"])
    order = [name for name in QUANTITIES if name in shown]
    rows = [["metric", "method", *protocols]]
    methods = results["methods"]
    under = {
        protocol: {label: method["protocols"].get(protocol, {}) for label, method in methods.items()}
        for protocol in protocols
    }
    for name in order:
        metric, columns = QUANTITIES[name], []
        for records in under.values():
            means = [record.get("mean", {}).get(name) for record in records.values()]
            comparable = is_comparable(records.values(), name)
            columns.append(marked(metric, means, comparable) if len(methods) > 1 else [format_value(means[0])])
        for index, label in enumerate(methods):
            rows.append([head_of(metric) if index == 0 else "", label, *(column[index] for column in columns)])
    notes = [f"{name}: {protocol['alignment']}" for name, protocol in protocols.items()]
    for name, records in under.items():
        labels = {metric: QUANTITIES[metric].label for metric in protocols[name]["metrics"]}
        notes += [f"{name}: {line}" for line in partial_means(records, labels)]
    return "\n".join([*aligned(rows, left=2), *notes])


def head_of(metric: Metric) -> str:
    """A metric's label and which end is best."""
    return f"{metric.label} {'v' if metric.lower_is_better else '^'} "


def marked(metric: Metric, values: Iterable[float | None], comparable: bool = True) -> list[str]:
    """The values as text, the best of them marked if they are comparable; what is equal in print is equally good."""
    values = list(values)
    known = [value for value in values if value is not None]
    best = format_value((min if metric.lower_is_better else max)(known)) if known and comparable else None
    texts = [format_value(value) for value in values]
    return [f"{text}*" if text != "-" and text == best else f"{text} " for text in texts]


def aligned(rows: list[list[str]], left: int = 1) -> list[str]:
    """Lines of a table whose first row is its head; the first ``left`` columns start at the left."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return lines


def format_value(value: float | None) -> str:
    return "-" if value is None else f"{value:#.4g}".rstrip(".")


def mixed_units(results: Mapping[str, Any]) -> list[str]:
    """In words, that lengths have no mean where the scenes' units differ."""
    units = sorted(set(results.get("units", {}).values()))
    return [f"distances have no mean: the scenes are in {' and '.join(units)}"] if len(units) > 1 else []


def _notes(results: Mapping[str, Any]) -> list[str]:
    scenes = len(results["scenes"])
    notes = [f"mean over {scenes} scene{'s' if scenes != 1 else ''}; v lower is better, ^ higher is better, * best"]
    for entry in results.get("skipped", []):
        notes.append(f"skipped {entry['scene']}: {entry['reason']}")
    notes += mixed_units(results)
    notes += partial_means(results["methods"], {name: METRICS[name].label for name in METRICS if METRICS[name].main})
    absent = [name for name, source in (results.get("backbone") or {}).get("lacks", {}).items() if source == "missing"]
    if absent:
        notes.append(f"not predicted: {', '.join(absent)}; - where a metric needs them")
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
