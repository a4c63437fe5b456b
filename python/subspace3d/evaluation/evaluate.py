"""Measure the base model and tuned runs of it on scenes, side by side: OUT/results.json and OUT/pictures."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subspace3d import outputs
from subspace3d.evaluation import pictures
from subspace3d.evaluation.depth import DELTA_THRESHOLD, FIT_GRID, POINT_THRESHOLD
from subspace3d.evaluation.point_cloud import (
    ICP_ITERATIONS,
    ICP_SOURCE_POINTS,
    ICP_TOLERANCE,
    MOST_QUERIES,
    NORMAL_NEIGHBOURS,
    import_open3d,
)
from subspace3d.evaluation.pose import AUC_THRESHOLDS_DEG
from subspace3d.evaluation.predict import choose_frames, predict
from subspace3d.evaluation.scene_metrics import RAW_QUERIES, SceneResult, Views, measure, valid_mask
from subspace3d.evaluation.table import ALIGNMENTS, METRICS, mean_over_scenes, scenes_in_mean
from subspace3d.files import read_record, sha256, write_json
from subspace3d.formats.results import KeptRecord
from subspace3d.formats.run import read_tuned_record
from subspace3d.log import logger
from subspace3d.progress import Progress

if TYPE_CHECKING:
    import torch

    from subspace3d.backbones.record import BackboneRecord
    from subspace3d.formats.scene import Scene

BASE = "base"
# true.safetensors stands beside <method>.safetensors
_RESERVED_NAMES = (BASE, "true")
_METRICS_VERSION = 1  # raise it when a number changes its meaning, so that kept results are measured anew


@dataclass(frozen=True)
class Protocol:
    """How every scene is measured, and what is kept of it.

    Attributes:
        frames: used per scene, evenly spaced.
        icp_threshold: largest correspondence distance of ICP, in scene units.
        images: scenes whose images and depth maps are kept for the report.
    """

    frames: int = 8
    icp_threshold: float = 0.1
    images: int = 4

    def __post_init__(self) -> None:
        if self.frames < 1 or self.images < 0 or not self.icp_threshold > 0:
            raise ValueError(
                "frames must be at least 1, images at least 0 and icp_threshold positive, "
                f"got {self.frames}, {self.images} and {self.icp_threshold}"
            )


@dataclass(frozen=True)
class _Evaluation:
    """What the measurements of one call share."""

    out: Path
    scenes: Mapping[str, Path]
    backbone: BackboneRecord
    protocol: Protocol
    device: str


def evaluate(
    scenes: Path,
    out: Path,
    tuned: Sequence[Path] = (),
    backbone: str = "vggt-nano",
    weights: Path | None = None,
    protocol: Protocol | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Measure the base model and every tuned run on every scene and write OUT/results.json.

    A method whose result is already in OUT/methods, measured on the same scenes with the same settings and weights,
    is not measured again.

    Args:
        scenes (Path): a folder with scenes anywhere below it.
        out (Path): folder of the results.
        tuned (Sequence[Path]): run folders of finetune.
        backbone (str): name of the backbone.
        weights (Path | None): its weights; none: those shipped with the package.
        protocol (Protocol | None): how scenes are measured.
        device (str): auto, cpu, cuda or one of several GPUs (cuda:1).

    Returns:
        dict: the content of results.json, as docs/evaluation.md describes it.

    Raises:
        FileNotFoundError: scenes, a run folder or weights are not there.
        ValueError: two run folders have one name, or no scene can be evaluated.
        ImportError: Open3D or SciPy cannot be imported; names the remedy.
    """
    from subspace3d.backbones.protocol import find_backbone
    from subspace3d.backbones.record import record_backbone
    from subspace3d.formats.scene import find_scenes

    protocol = protocol or Protocol()
    find_backbone(backbone).checked_size(0, (protocol.frames, protocol.frames))
    methods = method_folders(tuned)
    check_backbones(methods, backbone)
    record = record_backbone(backbone, weights)
    found = {scene_name(path, scenes): path for path in find_scenes(scenes)}
    import_open3d()  # fails before an hour of inference, not after

    out = outputs.claim(out, outputs.EVALUATION, "out")
    outputs.mark(out, outputs.EVALUATION)
    evaluation = _Evaluation(out, found, record, protocol, device)
    measured = {name: _measured(name, folder, evaluation) for name, folder in methods.items()}
    results = {**_assemble(measured, _in_words(evaluation)), "backbone": _about(record)}
    write_json(out / "results.json", results)
    return results


def _about(record: BackboneRecord) -> dict[str, Any]:
    """What the numbers are of, and what of it the model does not say itself."""
    from subspace3d.backbones.protocol import find_backbone

    backbone = find_backbone(record.name)
    said = {"scale": backbone.scale, "frame": backbone.frame, "lacks": dict(backbone.lacks)}
    return {**record.to_dict(), **said}


def _measured(name: str, run_folder: Path | None, evaluation: _Evaluation) -> dict[str, Any]:
    """The record of one method, kept from an earlier evaluation or made now."""
    out, scenes, backbone = evaluation.out, evaluation.scenes, evaluation.backbone
    key = {
        "metrics_version": _METRICS_VERSION,
        "protocol": _in_words(evaluation),
        "scenes": {scene: sha256(path / "scene.json") for scene, path in scenes.items()},
        "pictures": [evaluation.protocol.images, pictures.VERSION],
        "backbone": backbone.name,
        "weights": backbone.sha256 or backbone.identity,
        "tuned": None if run_folder is None else sha256(run_folder / "tuned" / "tuned.json"),
    }
    file = out / "methods" / f"{name}.json"
    record = _kept(file, key, out)
    if record is not None and any(_can_be_read(scenes[entry["scene"]], evaluation) for entry in record["skipped"]):
        record = None  # what was damaged then is whole now
    if record is None:
        record = {"key": key, **_measure_method(name, run_folder, evaluation)}
        write_json(file, record)
    return record


def method_folders(tuned: Sequence[Path]) -> dict[str, Path | None]:
    """Method name -> run folder; the base model comes first and has none.

    A method is named after its run folder. Both RUN and RUN/tuned are taken.

    Raises:
        FileNotFoundError: a run has no tuned result.
        ValueError: two runs have one name, or a name is taken.
    """
    folders: dict[str, Path | None] = {BASE: None}
    for path in tuned:
        given = Path(path).resolve()
        run_folder = given.parent if (given / "tuned.json").is_file() else given
        if not (run_folder / "tuned" / "tuned.json").is_file():
            raise FileNotFoundError(f"no tuned result (tuned/tuned.json) in {path}")
        name = run_folder.name
        if name in folders or name in _RESERVED_NAMES:
            raise ValueError(
                f"run folders must have different names, none of {_RESERVED_NAMES}; got {name!r} at {path}"
            )
        folders[name] = run_folder
    return folders


def _measure_method(name: str, run_folder: Path | None, evaluation: _Evaluation) -> dict[str, Any]:
    from subspace3d.backbones.record import load_backbone
    from subspace3d.training.device import choose_device
    from subspace3d.training.tuned import load_tuned

    scenes, backbone = evaluation.scenes, evaluation.backbone
    device = choose_device(evaluation.device)
    started = time.monotonic()
    model = load_backbone(backbone).to(device) if run_folder is None else load_tuned(run_folder, device, backbone.name)
    record: dict[str, Any] = {
        "per_scene": {},
        "reasons": {},
        "details": {},
        "failed": {},
        "skipped": [],
        "pictures": [],
    }
    with Progress(f"evaluate {name}", len(scenes), "scene") as progress:
        for scene_name, path in scenes.items():
            _measure_scene(record, name, scene_name, path, model, evaluation, device)
            progress.advance()
    del model
    gc.collect()

    return {
        "mean": mean_over_scenes(record["per_scene"]),
        "scenes_in_mean": scenes_in_mean(record["per_scene"]),
        "evaluated": len(record["per_scene"]),
        **record,
        "seconds": time.monotonic() - started,
        **_training_record(run_folder, backbone),
    }


def _measure_scene(
    record: dict[str, Any],
    method: str,
    scene_name: str,
    path: Path,
    model: torch.nn.Module,
    evaluation: _Evaluation,
    device: torch.device,
) -> None:
    """Measure one scene into ``record``: under per_scene, failed (this method's fault) or skipped (the scene's)."""
    try:
        scene, frames = _load(path, evaluation)
        true = Views(scene.depths, scene.intrinsics, scene.extrinsics, scene.translation_known)
        valid_mask(true)
    except (OSError, ValueError) as error:
        record["skipped"].append({"scene": scene_name, "reason": str(error)})
        return
    started = time.monotonic()
    pred = predict(model, scene.images, device)
    seconds = time.monotonic() - started
    try:
        result = measure(pred, true, evaluation.protocol.icp_threshold)
    except ValueError as error:
        record["failed"][scene_name] = str(error)
        return
    record["per_scene"][scene_name] = result.metrics
    record["details"][scene_name] = {**result.details, "frame_indices": frames, "inference_seconds": seconds}
    if result.reasons:
        record["reasons"][scene_name] = result.reasons
    if len(record["pictures"]) < evaluation.protocol.images:
        folder = evaluation.out / "pictures" / scene_name
        record["pictures"].append(_save_pictures(folder, evaluation.out, method, scene_name, scene, true, pred, result))


def _can_be_read(path: Path, evaluation: _Evaluation) -> bool:
    try:
        scene, _ = _load(path, evaluation)
        valid_mask(Views(scene.depths, scene.intrinsics, scene.extrinsics, scene.translation_known))
    except (OSError, ValueError):
        return False
    return True


def _load(path: Path, evaluation: _Evaluation) -> tuple[Scene, list[int]]:
    from subspace3d.backbones.protocol import find_backbone
    from subspace3d.formats.scene import SceneFile, load_scene

    frames = choose_frames(len(SceneFile(path)), evaluation.protocol.frames)
    return load_scene(path, image_size=find_backbone(evaluation.backbone.name).image_size, frames=frames), frames


def _save_pictures(
    folder: Path, out: Path, method: str, scene_name: str, scene: Scene, true: Views, pred: Views, result: SceneResult
) -> dict[str, Any]:
    truth, prediction = folder / "true.safetensors", folder / f"{method}.safetensors"
    pictures.save(truth, pictures.shown_truth(scene.images, true))
    shown = pictures.shown_prediction(pred, result.depth_scale, pictures.fitted_alignment(result))
    pictures.save(prediction, shown)
    paths = {"true": truth, "prediction": prediction}
    return {"scene": scene_name, **{kind: path.relative_to(out).as_posix() for kind, path in paths.items()}}


def _assemble(measured: Mapping[str, Mapping[str, Any]], protocol: Mapping[str, Any]) -> dict[str, Any]:
    """results.json from the records of all methods.

    Raises:
        ValueError: no method has measured a scene; gives the reasons.
    """
    base = measured[BASE]
    evaluated = list(dict.fromkeys(scene for record in measured.values() for scene in record["per_scene"]))
    if not evaluated:
        reasons = [f"{entry['scene']}: {entry['reason']}" for entry in base["skipped"]]
        reasons += [
            f"{name} on {scene}: {why}" for name, rec in measured.items() for scene, why in rec["failed"].items()
        ]
        raise ValueError("no scene could be evaluated; " + "; ".join(reasons[:4]))
    shown: dict[str, dict[str, Any]] = {}
    for name, record in measured.items():
        for entry in record["pictures"]:
            scene = shown.setdefault(entry["scene"], {"scene": entry["scene"], "true": entry["true"], "methods": {}})
            scene["methods"][name] = entry["prediction"]
    return {
        "format": "subspace3d-results",
        "version": 1,
        "scenes": evaluated,
        "skipped": base["skipped"],
        "protocol": dict(protocol),
        "metrics": {
            name: {
                "label": metric.label,
                "lower_is_better": metric.lower_is_better,
                "unit": metric.unit,
                "alignment": metric.alignment,
                "main": metric.main,
            }
            for name, metric in METRICS.items()
        },
        "methods": {
            name: {key: value for key, value in record.items() if key not in ("key", "skipped", "pictures")}
            for name, record in measured.items()
        },
        "pictures": list(shown.values()),
    }


def _in_words(evaluation: _Evaluation) -> dict[str, Any]:
    """What the numbers depend on besides model and scenes, in words and numbers."""
    from subspace3d.backbones.protocol import find_backbone

    return {
        "image_size": find_backbone(evaluation.backbone.name).image_size,
        "frames": evaluation.protocol.frames,
        "frame_choice": "floor(i * available / frames); all when fewer",
        "mask": "true depth > 0; no confidence filter, no outlier cut",
        "alignments": ALIGNMENTS,
        "icp": {
            "threshold": evaluation.protocol.icp_threshold,
            "most_source_points": ICP_SOURCE_POINTS,
            "relative_fitness": ICP_TOLERANCE,
            "relative_rmse": ICP_TOLERANCE,
            "most_iterations": ICP_ITERATIONS,
        },
        "delta_threshold": DELTA_THRESHOLD,
        "point_delta_threshold": POINT_THRESHOLD,
        "scale_translation_grid": FIT_GRID,
        "auc_thresholds_deg": list(AUC_THRESHOLDS_DEG),
        "normal_neighbours": NORMAL_NEIGHBOURS,
        "most_queries_each_way": MOST_QUERIES,
        "most_queries_raw": RAW_QUERIES,
        "camera_pairs": "all i < j; translation error is the angle between directions, 0 to 180 degrees; AUC over the "
        "pairs with a true baseline, steps of one degree",
        "mean": "over the scenes where a metric is defined",
    }


def _kept(file: Path, key: Mapping[str, Any], out: Path) -> dict[str, Any] | None:
    """The record of an earlier evaluation, if it was made from the same inputs and its pictures still stand."""
    if not file.is_file():
        return None
    try:
        record = read_record(file, KeptRecord)
    except ValueError as error:
        logger.info(f"measuring anew: {error}")
        return None
    if record.get("key") != key:
        return None
    named = [out / entry[kind] for entry in record["pictures"] for kind in ("true", "prediction")]
    return dict(record) if all(path.is_file() for path in named) else None


def scene_name(path: Path, root: Path) -> str:
    """Path below the root, so that scenes of several data sets keep different names."""
    name = path.relative_to(root).as_posix()
    return path.resolve().name if name == "." else name


def check_backbones(methods: Mapping[str, Path | None], backbone: str) -> None:
    """Raises ValueError if a run has tuned another backbone."""
    for name, folder in methods.items():
        if folder is not None:
            tuned = read_tuned_record(folder / "tuned")["backbone"]["name"]
            if tuned != backbone:
                raise ValueError(
                    f"backbone must be that of the tuned runs, got {backbone!r} and {tuned!r} for {name!r}"
                )


def _training_record(run_folder: Path | None, backbone: BackboneRecord) -> dict[str, Any]:
    """Size and cost of a tuned run, from its tuned.json; the base model trains nothing."""
    if run_folder is None:
        return {"trainable_parameters": 0, "trainable": {"total": 0}, "training": None, "backbone": backbone.to_dict()}
    tuned = read_tuned_record(run_folder / "tuned")
    copied = {key: tuned.get(key) for key in ("method", "backbone", "rank", "K", "trainable", "training")}
    return {"trainable_parameters": (tuned.get("trainable") or {}).get("total"), **copied}
