"""Tuning on 1 to 30 images: depth or other views teach, held-out views judge, generic scenes show what is forgotten."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from subspace3d.adapters.parameters import trainable_parameters
from subspace3d.backbones.find import backbone_of
from subspace3d.backbones.losses import LossCounts
from subspace3d.backbones.pose import decode_pose
from subspace3d.datasets.multiview import as_sample, collate
from subspace3d.formats.scene import Scene, SceneFile, find_scenes, load_images, load_scene
from subspace3d.training.config import TrainConfig
from subspace3d.training.consistency import consistency_loss
from subspace3d.training.device import choose_device
from subspace3d.training.fit_start import Start, start_cores_at
from subspace3d.training.normalization import normalize_scenes
from subspace3d.training.schedule import learning_rate
from subspace3d.training.step import loss_terms, set_modes

MOST_IMAGES = 30
LEAST_TO_HOLD_OUT = 3
UNJUDGED_STEPS = 20  # where nothing can be held out
_EVERY = 5  # steps between looks at the held-out views
_PATIENCE = 4  # looks without a better one
_PARTNERS = 4  # other views that a view is compared with in one step
_GENERIC_SCENES, _GENERIC_FRAMES = 4, 4


DepthError = Callable[[nn.Module, Scene, Sequence[int]], float]
"""Error of the depth of some views of a scene, all views in one forward pass, such as `evaluation.scene.abs_rel`."""


@dataclass(frozen=True)
class FewScene:
    """The images of one scene.

    Attributes:
        name: of the scene.
        images: [S, 3, H, W] in 0..1.
        scene: with depth and cameras, or None: the images alone are known.
        held_out: views that are not trained on; none of a scene of fewer than 3.
    """

    name: str
    images: torch.Tensor
    scene: Scene | None
    held_out: tuple[int, ...]

    @property
    def taught(self) -> tuple[int, ...]:
        return tuple(index for index in range(len(self.images)) if index not in self.held_out)


@dataclass(frozen=True)
class FewResult:
    """What a run did and found.

    Attributes:
        images: number of images, the held-out ones included.
        held_out: number of those held out.
        teacher: depth, views, or both where scenes differ.
        steps: optimiser steps taken.
        best_step: the step whose weights were kept; 0: those of the start.
        seconds: of the tuning, measurements included.
        start: see `start_cores_at`; None: no such start.
        before: measurement -> value of the untuned model; see `measure_few`.
        after: the same of the result.
        curve: (step, loss on the held-out views).
    """

    images: int
    held_out: int
    teacher: str
    steps: int
    best_step: int
    seconds: float
    start: Start | None
    before: dict[str, float]
    after: dict[str, float]
    curve: list[tuple[int, float]]


def load_few(root: Path, image_size: int) -> list[FewScene]:
    """All scenes at or below ``root``, of 1 to 30 images together; of every ten images of a scene one is held out.

    Held-out views lie evenly between the others; of 3 to 19 images it is the one in the middle. Where depth teaches
    they are some of those that have depth, of which one at least stays: a view without it could not judge.

    Raises:
        FileNotFoundError: ``root`` or a file does not exist.
        ValueError: too many images, or a scene of one image has no depth, so that nothing teaches.
    """
    files = [SceneFile(path) for path in find_scenes(root)]
    count = sum(len(file) for file in files)
    if count > MOST_IMAGES:
        raise ValueError(
            f"scenes must hold 1 to {MOST_IMAGES} images in all for --few, got {count} in {root}: leave images out "
            "(convert --frame-step), or without --few tune on all that have cameras"
        )
    scenes = []
    for file in files:
        judges = list(range(len(file)))
        if taught_by(file) == "depth":
            judges = [index for index in judges if file.depth_path(index) is not None]
        wanted = max(1, len(file) // 10) if len(file) >= LEAST_TO_HOLD_OUT else 0
        wanted = min(wanted, len(judges) - 1)
        held_out = tuple(judges[(2 * i + 1) * len(judges) // (2 * wanted)] for i in range(wanted))
        scenes.append(read_few(file, image_size, held_out=held_out))
    return scenes


def read_few(
    file: SceneFile, image_size: int, frames: Sequence[int] | None = None, held_out: tuple[int, ...] = ()
) -> FewScene:
    """Some frames of a scene (none: all), with depth and cameras where it has both; ``held_out`` counts among these.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file breaks the format, or the scene has one image and no depth, so that nothing teaches.
    """
    scene = None
    if taught_by(file) == "depth":
        scene = load_scene(file.folder, image_size=image_size, frames=frames)
        images = scene.images
    else:
        images = load_images(file.folder, image_size=image_size, frames=frames)
    return FewScene(file.name, _tensor(images), scene, held_out)


def taught_by(file: SceneFile) -> str:
    """What teaches in a scene: ``depth`` where it has depth and cameras, else ``views``, whose agreement does.

    Raises:
        ValueError: neither: it has one image and no depth.
    """
    if file.has_depth and file.has_cameras:
        return "depth"
    if len(file) < 2:
        raise ValueError(f"{file.file} must have depth and cameras, or at least 2 images that show the same, got 1")
    return "views"


def tune_few(
    model: nn.Module,
    scenes: Sequence[FewScene],
    config: TrainConfig,
    generic: Path | None = None,
    fit: bool = False,
    note: Callable[[int, float], object] = lambda step, loss: None,
    depth_error: DepthError | None = None,
) -> FewResult:
    """Minimise the loss of a few images over the trainable parameters of ``model``, in place.

    A step sees one scene after the other, at most ``images_per_step`` of its views in random order. Where a scene has
    depth the loss is the backbone's own, else `consistency_loss` between the views. Every 5 steps the same loss is
    measured on the held-out views (with depth: beside the first view, which sets the world); after 20 steps without a
    better one, or at a loss that is not finite, it ends, and the best weights are kept. Without held-out views 20 steps
    are taken.

    Args:
        model (nn.Module): what `apply_method` returned, untrained, on its device.
        scenes (Sequence): of `load_few`.
        config (TrainConfig): steps at most, rate, seed, images per step.
        generic (Path | None): scenes of another kind, whose loss is measured before and after.
        fit (bool): start the cores by one step down their gradient, see `start_cores_at`.
        note (Callable): is told the step and its loss.
        depth_error (Callable | None): what ``abs_rel`` of `measure_few` is; none: it is not measured.

    Raises:
        ValueError: nothing is trainable, or the backbone predicts no depth or no cameras for images without depth.
        FloatingPointError: a loss is not finite, and no weights were good before.
    """
    device = choose_device(config.device)
    parameters = trainable_parameters(model)
    if not parameters:
        raise ValueError("model must have trainable parameters, got none")
    started = time.monotonic()
    before = measure_few(model, scenes, config, generic, depth_error)
    start = start_cores_at(model, lambda: _start_loss(model, scenes, config, device)) if fit else None
    set_modes(model)
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=config.lr, weight_decay=config.weight_decay)
    judged = any(scene.held_out for scene in scenes)
    steps = config.steps if judged else min(config.steps, UNJUDGED_STEPS)
    best, best_step, kept = math.inf, 0, _copies(parameters)
    curve: list[tuple[int, float]] = []
    generator = torch.Generator().manual_seed(config.seed)
    step = 0
    for step in range(steps + 1):
        if judged and step % _EVERY == 0:
            losses = [held_out_loss(model, scene, config, device) for scene in scenes if scene.held_out]
            curve.append((step, _mean(losses)))
            if curve[-1][1] < best:
                best, best_step, kept = curve[-1][1], step, _copies(parameters)
            elif step - best_step >= _EVERY * _PATIENCE:
                break
        if step == steps:
            break
        scene = scenes[step % len(scenes)]
        frames = draw_views(scene.taught, config.images_per_step, generator)
        loss = few_loss(model, scene, frames, draw_pairs(len(frames), generator), config, device)
        if not torch.isfinite(loss):
            if math.isfinite(best):
                break
            raise FloatingPointError(f"the loss of step {step} must be finite, got {loss.item()} on {scene.name}")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(list(parameters.values()), config.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, config.lr, config.warmup)
        optimizer.step()
        note(step, loss.item())
    if judged:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(kept[name])
    else:
        best_step = step
    after = measure_few(model, scenes, config, generic, depth_error)
    teachers = {"depth" if scene.scene is not None else "views" for scene in scenes}
    return FewResult(
        images=sum(len(scene.images) for scene in scenes),
        held_out=sum(len(scene.held_out) for scene in scenes),
        teacher="both" if len(teachers) > 1 else teachers.pop(),
        steps=step,
        best_step=best_step,
        seconds=time.monotonic() - started,
        start=start,
        before=before,
        after=after,
        curve=curve,
    )


@torch.no_grad()
def measure_few(
    model: nn.Module,
    scenes: Sequence[FewScene],
    config: TrainConfig,
    generic: Path | None = None,
    depth_error: DepthError | None = None,
) -> dict[str, float]:
    """``loss`` and ``abs_rel``, each of ``_images``, ``_held_out`` and ``_generic``.

    Means over scenes; what cannot be measured is not there. Generic scenes are the first 4, 4 evenly spaced views of
    each.
    """
    device = choose_device(config.device)
    values = {"loss_images": _mean([float(_taught_loss(model, scene, config, device)) for scene in scenes])}
    held_out = [held_out_loss(model, scene, config, device) for scene in scenes if scene.held_out]
    if held_out:
        values["loss_held_out"] = _mean(held_out)
    places = {
        "images": [(scene.scene, scene.taught) for scene in scenes],
        "held_out": [(scene.scene, scene.held_out) for scene in scenes],
    }
    if generic is not None:
        others = _generic(generic, scenes[0].images.shape[-1])
        values["loss_generic"] = _mean(
            [float(few_loss(model, scene, scene.taught, [], config, device)) for scene in others]
        )
        places["generic"] = [(scene.scene, scene.taught) for scene in others]
    if depth_error is not None:
        for place, views in places.items():
            errors = [
                depth_error(model, scene, frames)
                for scene, frames in views
                if scene is not None and (scene.depths[list(frames)] > 0).any()
            ]
            if errors:
                values[f"abs_rel_{place}"] = _mean(errors)
        set_modes(model)
    return values


def format_few(result: FewResult) -> str:
    """A table of before and after, and how the run ended; no final newline."""
    names = {"images": "given images", "held_out": "held-out views", "generic": "generic scenes"}
    lines = [f"{'':28}{'before':>10}{'after':>10}"]
    for kind, unit in (("loss", "loss"), ("abs_rel", "AbsRel")):
        for where, words in names.items():
            if f"{kind}_{where}" in result.before:
                values = (result.before[f"{kind}_{where}"], result.after[f"{kind}_{where}"])
                lines.append(f"{f'{unit}, {words}':28}" + "".join(f"{value:10.4g}" for value in values))
    stopped = f"weights of step {result.best_step} of {result.steps}"
    if not result.held_out:
        stopped += ", no view to hold out"
    elif result.best_step == 0:
        stopped += ", none was better on the held-out views than the start"
    taught = {"depth": "depth and cameras", "views": "the views' agreement", "both": "depth or the views' agreement"}
    lines.append(f"{result.images} images, taught by {taught[result.teacher]}; {stopped}; {result.seconds:.0f} s")
    return "\n".join(lines)


@torch.no_grad()
def held_out_loss(model: nn.Module, scene: FewScene, config: TrainConfig, device: torch.device) -> float:
    """The loss of a scene's held-out views: beside its first one where there is depth, else against all others."""
    if scene.scene is not None:
        return float(few_loss(model, scene, (scene.taught[0], *scene.held_out), [], config, device))
    pairs = [pair for held in scene.held_out for other in scene.taught for pair in ((held, other), (other, held))]
    return float(few_loss(model, scene, range(len(scene.images)), pairs, config, device))


def few_loss(
    model: nn.Module,
    scene: FewScene,
    frames: Sequence[int],
    pairs: Sequence[tuple[int, int]],
    config: TrainConfig,
    device: torch.device,
) -> torch.Tensor:
    """The loss of some views of a scene: the backbone's own, or `consistency_loss` of ``pairs`` where none is known.

    Args:
        model (nn.Module): on ``device``.
        scene (FewScene): where the views are.
        frames (Sequence): which of them.
        pairs (Sequence): of different positions in ``frames``.
        config (TrainConfig): precision and weight of the cameras.
        device (torch.device): where the loss is taken.

    Raises:
        ValueError: no pairs, or a backbone that predicts no depth or no cameras, for images without depth.
    """
    chosen = list(frames)
    if scene.scene is not None:
        batch = _batch(scene.scene, chosen)
        part, scale = normalize_scenes(batch)
        part["scene_scale"] = scale
        return loss_terms(model, part, LossCounts.of(batch), config, device)["loss"]
    if not pairs:
        raise ValueError(
            f"images_per_step must be at least 2 where no depth is known, got {config.images_per_step}: the views of "
            f"{scene.name} are compared with each other"
        )
    backbone, images = backbone_of(model), scene.images[chosen].to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        prediction = backbone.predict(model, images[None])
    extrinsics, intrinsics = prediction.extrinsics, prediction.intrinsics
    if prediction.stages:
        extrinsics, intrinsics = decode_pose(prediction.stages[-1].float(), (images.shape[-2], images.shape[-1]))
    if prediction.depth is None or extrinsics is None or intrinsics is None:
        raise ValueError(f"images without depth need a backbone that predicts depth and cameras, not {backbone.name}")
    return consistency_loss(images, prediction.depth[0].float(), extrinsics[0], intrinsics[0], pairs)["loss"]


def _start_loss(
    model: nn.Module, scenes: Sequence[FewScene], config: TrainConfig, device: torch.device
) -> torch.Tensor:
    """The mean loss of all that is trained on, the same at every call."""
    return torch.stack([_taught_loss(model, scene, config, device) for scene in scenes]).mean()


def _taught_loss(model: nn.Module, scene: FewScene, config: TrainConfig, device: torch.device) -> torch.Tensor:
    frames = scene.taught[: config.images_per_step]
    return few_loss(model, scene, frames, _all_pairs(len(frames)), config, device)


def _batch(scene: Scene, frames: list[int]) -> dict[str, Any]:
    """Views as a batch of one scene."""
    images, depths = scene.images[frames], scene.depths[frames]
    return collate([as_sample(images, depths, scene.intrinsics[frames], scene.extrinsics[frames], scene)])


def _tensor(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255


def _generic(root: Path, image_size: int) -> list[FewScene]:
    scenes = []
    for path in find_scenes(root):
        file = SceneFile(path)
        if not (file.has_depth and file.has_cameras):
            continue
        count = min(_GENERIC_FRAMES, len(file))
        frames = [index * len(file) // count for index in range(count)]
        scenes.append(read_few(file, image_size, frames))
        if len(scenes) == _GENERIC_SCENES:
            break
    if not scenes:
        raise ValueError(f"generic must hold a scene with depth and cameras, found none in {root}")
    return scenes


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _copies(parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def draw_views(frames: Sequence[int], most: int, generator: torch.Generator) -> list[int]:
    order = torch.randperm(len(frames), generator=generator)[:most].tolist()
    return [frames[index] for index in order]


def _all_pairs(count: int) -> list[tuple[int, int]]:
    """Every view with its next 4."""
    return [(i, (i + away) % count) for i in range(count) for away in range(1, min(_PARTNERS, count - 1) + 1)]


def draw_pairs(count: int, generator: torch.Generator) -> list[tuple[int, int]]:
    """Every view with at most 4 others, drawn anew."""
    pairs = []
    for i in range(count):
        others = [j for j in range(count) if j != i]
        pairs += [(i, j) for j in draw_views(others, _PARTNERS, generator)]
    return pairs
