"""Measure the base model and tuned runs of it on scenes, side by side: OUT/results.json and OUT/pictures."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from subspace3d import outputs
from subspace3d.evaluation import pictures
from subspace3d.evaluation.depth import DELTA_THRESHOLD, FIT_GRID, POINT_THRESHOLD
from subspace3d.evaluation.fusion import import_open3d
from subspace3d.evaluation.point_cloud import (
    F_THRESHOLD,
    ICP_ITERATIONS,
    ICP_SOURCE_POINTS,
    ICP_TOLERANCE,
    MOST_QUERIES,
    NORMAL_NEIGHBOURS,
    NORMAL_QUERIES,
)
from subspace3d.evaluation.pose import AUC_THRESHOLDS_DEG, relative_poses, rotation_angles
from subspace3d.evaluation.predict import choose_frames, predict
from subspace3d.evaluation.protocol_metrics import Measured
from subspace3d.evaluation.protocols import PROTOCOLS, load_views
from subspace3d.evaluation.results import BASE, KeptResults, add, assemble, empty_record
from subspace3d.evaluation.scene_metrics import RAW_QUERIES, SceneResult, Views, check_measurable, measure
from subspace3d.evaluation.table import ALIGNMENTS, RAW, mean_over_scenes, scenes_in_mean
from subspace3d.files import sha256, write_json
from subspace3d.formats.run import read_tuned_record
from subspace3d.jobs.cluster import Cluster
from subspace3d.jobs.pool import run_jobs
from subspace3d.log import logger
from subspace3d.machine import usable_cores
from subspace3d.progress import Progress

if TYPE_CHECKING:
    import torch

    from subspace3d.backbones.record import BackboneRecord
    from subspace3d.formats.scene import Scene

FRAMES = 8
# true.safetensors stands beside <method>.safetensors
_RESERVED_NAMES = (BASE, "true")
_CLEARLY_WRONG = 5.0  # degrees
_METRICS_VERSION = 2  # raise it when a number changes its meaning, so that kept results are measured anew


@dataclass(frozen=True)
class Options:
    """How every scene is measured, and what is kept of it.

    Attributes:
        frames: used per scene, evenly spaced; None: 8, or as the one protocol in ``protocols`` chooses them.
        icp_threshold: largest correspondence distance of ICP, in scene units.
        images: scenes whose images and depth maps are kept for the report.
        f_threshold: largest distance that counts for the F-score, in scene units.
        protocols: published protocols that are measured besides, keys of `PROTOCOLS`. One alone also chooses the frames
            and the size of the images; several are measured on the same predictions, of evenly spaced square frames.
        workers: methods measured at a time, each in a process of its own.
    """

    frames: int | None = None
    icp_threshold: float = 0.1
    images: int = 4
    f_threshold: float = F_THRESHOLD
    protocols: tuple[str, ...] = ()
    workers: int = 1

    def __post_init__(self) -> None:
        positive = self.icp_threshold > 0 and self.f_threshold > 0
        if (self.frames is not None and self.frames < 1) or self.images < 0 or self.workers < 1 or not positive:
            raise ValueError(
                "frames and workers must be at least 1, images at least 0, icp_threshold and f_threshold positive, "
                f"got {self.frames}, {self.workers}, {self.images}, {self.icp_threshold} and {self.f_threshold}"
            )
        unknown = [name for name in self.protocols if name not in PROTOCOLS]
        if unknown:
            raise ValueError(f"protocols must be some of {', '.join(PROTOCOLS)}, got {unknown[0]!r}")

    @property
    def alone(self) -> str | None:
        """The protocol that chooses frames and size."""
        return self.protocols[0] if len(self.protocols) == 1 else None

    def choose(self, available: int) -> list[int]:
        """Frames of a scene that has so many."""
        if self.frames is None and self.alone:
            return PROTOCOLS[self.alone].frames(available)
        return choose_frames(available, self.frames or FRAMES)


@dataclass(frozen=True)
class _Evaluation:
    """What the measurements of one call share."""

    out: Path
    scenes: Mapping[str, Path]
    backbone: BackboneRecord
    options: Options
    device: str
    files: Mapping[str, str]  # scene -> digest


def evaluate(
    scenes: Path,
    out: Path,
    tuned: Sequence[Path] = (),
    backbone: str = "vggt-nano",
    weights: Path | None = None,
    options: Options | None = None,
    device: str = "auto",
    cluster: Cluster | None = None,
    licence: str = "",
) -> dict[str, Any]:
    """Measure the base model and every tuned run on every scene and write OUT/results.json.

    A method whose result is already in OUT/methods, measured on the same scenes with the same settings and weights,
    is not measured again; of one that was cut off, the scenes that were measured are not.

    Args:
        scenes (Path): a folder with scenes anywhere below it.
        out (Path): folder of the results.
        tuned (Sequence[Path]): run folders of finetune.
        backbone (str): name of the backbone.
        weights (Path | None): its weights; none: those shipped with the package.
        options (Options | None): how scenes are measured.
        device (str): auto, cpu, cuda or one of several GPUs (cuda:1).
        cluster (Cluster | None): measures the methods, each as a job; none: this machine does.
        licence (str): of the weights; none: as a tuned run on them, their file or the backbone says.

    Returns:
        dict: the content of results.json, as docs/evaluation.md describes it.

    Raises:
        FileNotFoundError: scenes, a run folder or weights are not there.
        ValueError: two run folders have one name, or no scene can be evaluated.
        ImportError: SciPy, or for the protocol da3 Open3D, cannot be imported; names the remedy.
    """
    from subspace3d.backbones.find import find_backbone
    from subspace3d.backbones.record import record_backbone
    from subspace3d.formats.scene import find_scenes

    options = options or Options()
    frames = options.frames or FRAMES
    find_backbone(backbone).checked_size(0, (frames, frames))
    methods = method_folders(tuned)
    check_backbones(methods, backbone)
    record = record_backbone(backbone, weights, licence=licence, licences=_licences(methods))
    found = {scene_name(path, scenes): path for path in find_scenes(scenes)}
    # these fail before an hour of inference, not after
    import scipy.spatial  # noqa: F401

    if "da3" in options.protocols:
        import_open3d()

    out = outputs.claim(out, outputs.EVALUATION, "out")
    outputs.mark(out, outputs.EVALUATION)
    files, units = _digests(found, options)
    evaluation = _Evaluation(out, found, record, options, device, files)
    if options.workers > 1 or cluster is not None:
        _measure_side_by_side(methods, evaluation, cluster)
    measured = {name: _measured(name, folder, evaluation) for name, folder in methods.items()}
    results = {**assemble(measured, _in_words(evaluation), units), "backbone": _about(record, measured[BASE])}
    write_json(out / "results.json", results)
    return results


def _digests(scenes: Mapping[str, Path], options: Options) -> tuple[dict[str, str], dict[str, str]]:
    """Scene -> sha256 over the images, depth maps and masks that are measured, and scene -> unit.

    Scenes that cannot be read are in neither: they are skipped, with the reason, when their turn comes.
    """
    from subspace3d.formats.scene import SceneFile

    digests: dict[str, str] = {}
    units: dict[str, str] = {}
    for name, path in scenes.items():
        try:
            scene = SceneFile(path)
            digest = hashlib.sha256()
            for index in options.choose(len(scene)):
                for file in scene.paths(index):
                    digest.update(sha256(file).encode())
        except (OSError, ValueError):
            continue
        digests[name], units[name] = digest.hexdigest(), scene.unit
    return digests, units


def _measure_side_by_side(methods: Mapping[str, Path | None], evaluation: _Evaluation, cluster: Cluster | None) -> None:
    """Measure several methods at a time and leave their records in OUT/methods; what fails is met again later."""
    workers = min(evaluation.options.workers, len(methods))
    threads = max(1, usable_cores() // workers) if cluster is None else cluster.cpus
    if cluster is not None and evaluation.device == "auto":
        evaluation = dataclasses.replace(evaluation, device=cluster.device)
    argument = (dict(methods), evaluation, threads)
    with Progress("evaluate", len(methods), "method") as progress:

        def ended(name: str) -> None:
            progress.advance(note=name)

        failures = run_jobs(list(methods), _set_up, argument, workers, ended, cluster=cluster)
    for name, reason in failures.items():
        logger.warning(f"{name} is measured again: {reason}")


def _set_up(argument: tuple[dict[str, Path | None], _Evaluation, int], worker: int) -> Callable[[str], object]:
    import torch

    methods, evaluation, threads = argument
    torch.set_num_threads(threads)
    if evaluation.device in ("auto", "cuda") and torch.cuda.is_available():
        evaluation = dataclasses.replace(evaluation, device=f"cuda:{worker % torch.cuda.device_count()}")

    def work(name: str) -> None:
        _measured(name, methods[name], evaluation)

    return work


def _about(record: BackboneRecord, measured: Mapping[str, Any]) -> dict[str, Any]:
    """What the numbers are of, and what of it the model does not say itself, whether its backbone names that or not."""
    from subspace3d.backbones.find import find_backbone

    backbone = find_backbone(record.name)
    absent = {name: "missing" for scene in measured["details"].values() for name in scene.get("not_predicted", ())}
    said = {"scale": backbone.scale, "frame": backbone.frame, "lacks": {**backbone.lacks, **absent}}
    return {**record.to_dict(), **said}


def _measured(name: str, run_folder: Path | None, evaluation: _Evaluation) -> dict[str, Any]:
    """The record of one method, kept from an earlier evaluation or made now."""
    scenes, backbone = evaluation.scenes, evaluation.backbone
    key = {
        "metrics_version": _METRICS_VERSION,
        "protocol": _in_words(evaluation),
        "scenes": {scene: sha256(path / "scene.json") for scene, path in scenes.items()},
        "pictures": [evaluation.options.images, pictures.VERSION],
        "backbone": backbone.name,
        "weights": backbone.sha256 or backbone.identity,
        "tuned": None if run_folder is None else sha256(run_folder / "tuned" / "tuned.json"),
    }
    kept = KeptResults(evaluation.out, name, key, evaluation.files)
    record = kept.method()
    if record is not None and any(_can_be_read(scenes[entry["scene"]], evaluation) for entry in record["skipped"]):
        record = None  # what was damaged then is whole now
    if record is None:
        record = _measure_method(name, run_folder, evaluation, kept)
        kept.keep_method(record)
    kept.drop_scenes()
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


def _measure_method(name: str, run_folder: Path | None, evaluation: _Evaluation, kept: KeptResults) -> dict[str, Any]:
    """Measure all scenes; the record of each is kept too, so that an evaluation that was cut off goes on from it."""
    from subspace3d.backbones.record import load_backbone
    from subspace3d.training.device import choose_device
    from subspace3d.training.tuned import load_tuned

    scenes, backbone = evaluation.scenes, evaluation.backbone
    device = choose_device(evaluation.device)
    started = time.monotonic()
    model = load_backbone(backbone).to(device) if run_folder is None else load_tuned(run_folder, device, backbone.name)
    record = {**empty_record(evaluation.options.protocols), "seconds": time.monotonic() - started}
    with Progress(f"evaluate {name}", len(scenes), "scene") as progress:
        for index, (scene_name, path) in enumerate(scenes.items()):
            part = kept.scene(index)
            if part is None or part["skipped"]:
                begun = time.monotonic()
                with_pictures = len(record["pictures"]) < evaluation.options.images
                part = _measure_scene(name, scene_name, path, model, evaluation, device, with_pictures)
                part["seconds"] = time.monotonic() - begun
                kept.keep_scene(index, part)
            add(record, part)
            progress.advance()
    del model
    gc.collect()
    for protocol, measured in record["protocols"].items():
        measured["mean"] = mean_over_scenes(measured["per_scene"], PROTOCOLS[protocol].metrics)

    return {
        "mean": mean_over_scenes(record["per_scene"]),
        "scenes_in_mean": scenes_in_mean(record["per_scene"]),
        "evaluated": len(record["per_scene"]),
        **record,
        **_training_record(run_folder, backbone),
    }


def _measure_scene(
    method: str,
    scene_name: str,
    path: Path,
    model: torch.nn.Module,
    evaluation: _Evaluation,
    device: torch.device,
    with_pictures: bool,
) -> dict[str, Any]:
    """The record of one scene, measured or failed (this method's fault) or skipped (the scene's)."""
    record = empty_record(evaluation.options.protocols)
    if scene_name in evaluation.files:
        record["files"][scene_name] = evaluation.files[scene_name]
    try:
        scene, frames = _load(path, evaluation)
        true = Views.of(scene)
        with_depth = check_measurable(true)
    except (OSError, ValueError) as error:
        record["skipped"].append({"scene": scene_name, "reason": str(error)})
        return record
    started = time.monotonic()
    pred = predict(model, scene.images, device)
    seconds = time.monotonic() - started
    if method == BASE and ":" in evaluation.backbone.name:
        _warn_of_inverted_poses(evaluation.backbone.name, scene_name, pred, true)
    try:
        result = measure(pred, true, evaluation.options.icp_threshold, evaluation.options.f_threshold)
    except ValueError as error:
        record["failed"][scene_name] = str(error)
        return record
    record["per_scene"][scene_name] = result.metrics
    seen = {"frame_indices": frames, "inference_seconds": seconds, "not_predicted": list(pred.not_predicted())}
    record["details"][scene_name] = {**result.details, **seen}
    if result.reasons:
        record["reasons"][scene_name] = result.reasons
    measured = Measured(pred, true)
    for protocol, values in record["protocols"].items():
        found = PROTOCOLS[protocol].measure(measured)
        values["per_scene"][scene_name] = found.metrics
        if found.reasons:
            values["reasons"][scene_name] = found.reasons
    if with_depth and with_pictures:
        folder = evaluation.out / "pictures" / scene_name
        record["pictures"].append(_save_pictures(folder, evaluation.out, method, scene_name, scene, true, pred, result))
    return record


def _warn_of_inverted_poses(backbone: str, scene: str, pred: Views, true: Views) -> None:
    """Where rotations fit the truth only once they are inverted: a model that is any good then says camera-to-world."""
    if pred.extrinsics is None or len(pred.extrinsics) < 2:
        return
    turned = np.concatenate([pred.extrinsics[..., :3].swapaxes(1, 2), pred.extrinsics[..., 3:]], axis=-1)
    wanted, _ = relative_poses(true.poses)
    given, inverted = (
        float(rotation_angles(relative_poses(poses)[0], wanted).mean()) for poses in (pred.extrinsics, turned)
    )
    if given > _CLEARLY_WRONG and inverted < given / 4:
        logger.warning(
            f"rotations of {backbone} are {given:.0f} degrees off in {scene}, inverted ones {inverted:.0f}: extrinsics "
            "must be camera-from-world, and these look like camera-to-world"
        )


def _can_be_read(path: Path, evaluation: _Evaluation) -> bool:
    try:
        scene, _ = _load(path, evaluation)
        check_measurable(Views.of(scene))
    except (OSError, ValueError):
        return False
    return True


def _load(path: Path, evaluation: _Evaluation) -> tuple[Scene, list[int]]:
    from subspace3d.backbones.find import find_backbone
    from subspace3d.formats.scene import SceneFile, load_scene

    frames = evaluation.options.choose(len(SceneFile(path)))
    sizes = find_backbone(evaluation.backbone.name)
    sizes.checked_size(0, (len(frames), len(frames)))
    if evaluation.options.alone:
        crop = PROTOCOLS[evaluation.options.alone].crop
        return load_views(path, frames, crop, sizes.image_size, sizes.patch_size), frames
    return load_scene(path, image_size=sizes.image_size, frames=frames), frames


def _save_pictures(
    folder: Path, out: Path, method: str, scene_name: str, scene: Scene, true: Views, pred: Views, result: SceneResult
) -> dict[str, Any]:
    truth, prediction = folder / "true.safetensors", folder / f"{method}.safetensors"
    pictures.save(truth, pictures.shown_truth(scene.images, true))
    shown = pictures.shown_prediction(pred, result.depth_scale, pictures.fitted_alignment(result))
    pictures.save(prediction, shown)
    paths = {"true": truth, "prediction": prediction}
    return {"scene": scene_name, **{kind: path.relative_to(out).as_posix() for kind, path in paths.items()}}


def _in_words(evaluation: _Evaluation) -> dict[str, Any]:
    """What the numbers depend on besides model and scenes, in words and numbers."""
    from subspace3d.backbones.find import find_backbone

    options, backbone = evaluation.options, find_backbone(evaluation.backbone.name)
    frames = f"floor(i * available / {options.frames or FRAMES}); all when fewer"
    if options.frames is None and options.alone:
        frames = PROTOCOLS[options.alone].frames_in_words
    return {
        "image_size": backbone.image_size,
        "protocols": {name: PROTOCOLS[name].in_words() for name in options.protocols},
        "frames": options.frames,
        "frame_choice": frames,
        "size": PROTOCOLS[options.alone].size_in_words if options.alone else "centred square of image_size",
        "mask": "true depth > 0; no confidence filter, no outlier cut",
        "alignments": {**ALIGNMENTS, "raw": RAW[backbone.scale]},
        "icp": {
            "threshold": options.icp_threshold,
            "most_source_points": ICP_SOURCE_POINTS,
            "relative_fitness": ICP_TOLERANCE,
            "relative_rmse": ICP_TOLERANCE,
            "most_iterations": ICP_ITERATIONS,
        },
        "f_threshold": options.f_threshold,
        "delta_threshold": DELTA_THRESHOLD,
        "point_delta_threshold": POINT_THRESHOLD,
        "scale_translation_grid": FIT_GRID,
        "auc_thresholds_deg": list(AUC_THRESHOLDS_DEG),
        "normal_neighbours": NORMAL_NEIGHBOURS,
        "most_queries_each_way": MOST_QUERIES,
        "most_queries_raw": RAW_QUERIES,
        "most_normals": NORMAL_QUERIES,
        "camera_pairs": "all i < j; translation error is the angle between directions, 0 to 180 degrees; AUC over the "
        "pairs with a true baseline, steps of one degree",
        "mean": "over the scenes where a metric is defined",
    }


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


def _licences(methods: Mapping[str, Path | None]) -> dict[str, str]:
    """sha256 of weights -> the licence that a tuned run names for them."""
    from subspace3d.backbones.record import UNKNOWN

    records = [read_tuned_record(folder / "tuned")["backbone"] for folder in methods.values() if folder is not None]
    known = [each for each in records if each.get("licence") not in (None, "", UNKNOWN)]
    return {each["sha256"]: each["licence"] for each in known}


def _training_record(run_folder: Path | None, backbone: BackboneRecord) -> dict[str, Any]:
    """Size and cost of a tuned run, from its tuned.json; the base model trains nothing."""
    if run_folder is None:
        return {"trainable_parameters": 0, "trainable": {"total": 0}, "training": None, "backbone": backbone.to_dict()}
    tuned = read_tuned_record(run_folder / "tuned")
    copied = {key: tuned.get(key) for key in ("method", "backbone", "rank", "K", "trainable", "training")}
    return {"trainable_parameters": (tuned.get("trainable") or {}).get("total"), **copied}
