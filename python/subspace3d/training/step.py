"""One step of training: its scenes, divided over processes and forward passes, and the loss of each part."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from subspace3d.backbones.find import backbone_of
from subspace3d.backbones.losses import LossCounts
from subspace3d.training.config import TrainConfig
from subspace3d.training.device import Processes
from subspace3d.training.interfaces import BatchSource
from subspace3d.training.normalization import normalize_scenes

Objective = Callable[[Any, dict, float, LossCounts], dict[str, torch.Tensor]]


@dataclasses.dataclass(frozen=True)
class StepData:
    """One step's scenes: this process's forward passes, and the counts over all scenes of all processes."""

    parts: list[dict]
    counts: LossCounts
    images: int


def set_modes(model: nn.Module) -> None:
    """Training mode for modules that hold something trainable, evaluation mode for all others."""
    for module in model.modules():
        module.training = any(parameter.requires_grad for parameter in module.parameters())


def draw_step(dataset: BatchSource, config: TrainConfig, step: int, processes: Processes) -> StepData:
    """This process's share of the scenes of a step, normalised, in parts of at most ``max_images`` images."""
    batch = dataset.batch(config.seed, step, config.frames, config.images_per_step)
    scenes, frames = batch["images"].shape[:2]
    share = processes.share(scenes)
    size = config.max_images // frames if config.max_images else len(share)
    parts = []
    for start in range(share.start, share.stop, size):
        chosen = slice(start, min(start + size, share.stop))
        part, scale = normalize_scenes({key: value[chosen] for key, value in batch.items()})
        part["scene_scale"] = scale
        del part["world_points"]  # no loss looks at them
        parts.append(part)
    return StepData(parts, LossCounts.of(batch), scenes * frames)


def loss_terms(
    model: nn.Module,
    part: Mapping[str, Any],
    counts: LossCounts,
    config: TrainConfig,
    device: torch.device,
    objective: Objective | None = None,
) -> dict[str, torch.Tensor]:
    """The terms of the loss of a part of a step, a scalar ``loss`` among them; forward in ``config.precision``."""
    backbone = backbone_of(model)
    batch = moved(part, device)
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        prediction = backbone.predict(model, batch["images"])
    if objective is not None:
        return objective(prediction.outputs, batch, config.camera_weight, counts)
    return backbone.loss(prediction, batch, config.camera_weight, counts)


def moved(part: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch with its tensors on ``device``."""
    return {key: value.to(device) if torch.is_tensor(value) else value for key, value in part.items()}
