"""How much memory a training step will take, found before the run by going through one step without data.

The step (forward pass, losses, backward pass) runs on fake tensors, which have shapes and no storage, and every
storage that would be alive is counted. So the estimate follows the model that will be trained: its method, precision,
activation checkpointing, attention kernel. Not counted: the allocator's fragmentation, workspaces inside kernels,
Python itself and, on a GPU, the CUDA context.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import subspace_ext as se
from subspace3d.backbones.find import backbone_of
from subspace3d.backbones.losses import gradient_loss
from subspace3d.log import logger
from subspace3d.training.config import TrainConfig
from subspace3d.training.device import available_memory, choose_device, device_name
from subspace3d.training.without_values import without_values

_VALUES_NEEDED = (DataDependentOutputException, DynamicOutputShapeException)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of tensors on the device at the peak of a training step.

    Attributes:
        weights: parameters and buffers, effective weights included.
        optimizer: AdamW's two moments.
        step: batch, activations, gradients and temporaries.
        images: in one forward pass.
    """

    weights: int
    optimizer: int
    step: int
    images: int

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.step

    def __str__(self) -> str:
        return (
            f"{_gib(self.total)} (weights {_gib(self.weights)}, optimiser {_gib(self.optimizer)}, "
            f"activations and gradients {_gib(self.step)} for {self.images} images at a time)"
        )


def check_memory(
    model: nn.Module, config: TrainConfig, image_size: int, processes: int = 1, sharing: int = 1, together: int = 1
) -> MemoryEstimate | None:
    """Print the estimate for the largest forward pass of a run; nothing, if ``config.check_memory`` is off.

    Args:
        model (nn.Module): frozen and trainable parameters as in the run, on the run's device.
        config (TrainConfig): batch, precision, device.
        image_size (int): side of the images in pixels.
        processes (int): that share the scenes of a step.
        sharing (int): processes like this one on the same device.
        together (int): adapters like that of ``model`` in this process, each with images of its own.

    Raises:
        ValueError: it exceeds what the device has left; says what would fit.
    """
    if not config.check_memory:
        return None
    share = replace(config, max_images=config.max_images // together)
    scenes, frames = _largest_pass(share, processes)
    try:
        estimate = _estimate_together(model, config, image_size, scenes, frames, together)
    except _VALUES_NEEDED as error:
        logger.warning(f"memory cannot be estimated: {backbone_of(model).name} reads values of tensors ({error})")
        return None
    device = choose_device(config.device)
    free = available_memory(device)
    free = free // sharing if free is not None else None
    each = f" for each of {sharing} processes" if sharing > 1 else ""
    logger.info(f"memory estimate: {estimate}" + (f"; {_gib(free)} free{each}" if free else ""))
    held = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if free is None or estimate.total - held <= free:
        return estimate
    raise ValueError(
        f"max_images: a step needs about {estimate}, {device_name(config.device)} has {_gib(free)} left{each}; "
        f"{_advice(model, config, image_size, estimate, free + held, together)}; "
        "--train.no-check-memory starts all the same"
    )


def estimate_memory(model: nn.Module, config: TrainConfig, image_size: int, scenes: int, frames: int) -> MemoryEstimate:
    """Bytes a training step takes with ``scenes`` scenes of ``frames`` frames in one forward pass."""
    device = next(model.parameters()).device
    # by the first name of each module: what is put in for a module that stands twice could not be taken out again
    tensors = {
        f"{name}.{key}" if name else key: tensor
        for name, module in model.named_modules()
        for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    }
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors.values()}
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    compute_bytes = 2 if config.precision == "bf16" else 4
    cores = [module for module in model.modules() if isinstance(module, se.SubspaceCore)]
    kept = sum(core.U.shape[0] * core.V.shape[0] * compute_bytes for core in cores)
    with without_values(model), FakeTensorMode() as fake:
        fakes = {id(tensor): fake.from_tensor(tensor) for tensor in tensors.values()}
        stand_ins: dict[str, torch.Tensor] = {f"model.{name}": fakes[id(tensor)] for name, tensor in tensors.items()}
        counter = _LiveBytes()
        with counter:
            images = torch.zeros(scenes, frames, 3, image_size, image_size, device=device)
            torch.func.functional_call(_Step(model, config.precision), stand_ins, (images,), tie_weights=False)
    return MemoryEstimate(sum(storages.values()) + kept, 2 * trained, counter.peak, scenes * frames)


class _Step(nn.Module):
    """Forward and backward in one call: with checkpointing the backward pass, too, looks up the model's parameters."""

    def __init__(self, model: nn.Module, precision: str) -> None:
        super().__init__()
        self.model, self.precision, self.backbone = model, precision, backbone_of(model)

    def forward(self, images: torch.Tensor) -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            prediction = self.backbone.predict(self.model, images)
        cameras = prediction.stages or (prediction.extrinsics, prediction.intrinsics)
        terms = [each.abs().mean() for each in cameras if each is not None]
        if prediction.depth is not None:
            terms.append(_depth_terms(prediction.depth, prediction.confidence))
        if not terms:
            raise ValueError(f"backbone must predict depth or cameras to be trained, {self.backbone.name} does neither")
        # the gradients of a network are alive whatever its loss looks at
        sum(terms[1:], start=terms[0]).backward()


def _depth_terms(depth: torch.Tensor, confidence: torch.Tensor | None) -> torch.Tensor:
    """The depth loss where all pixels are valid, its selections by value replaced by copies of the same size."""
    predicted, target = depth.float(), torch.zeros_like(depth, dtype=torch.float32)
    mask = torch.ones_like(depth, dtype=torch.bool)
    error = (predicted.clone() - target).abs()
    terms = error.clamp(max=100).clone().mean()
    if confidence is not None:
        weighted = error * confidence.clone() - confidence.log()
        terms = terms + weighted.clamp(max=100).clone().mean()
    return terms + gradient_loss(predicted.flatten(0, 1), target.flatten(0, 1), mask.flatten(0, 1), (1, 1, 1, 1))


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages made while it is on, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _largest_pass(config: TrainConfig, processes: int) -> tuple[int, int]:
    """Scenes and frames of the forward pass with the most images."""

    def scenes(frames: int) -> int:
        share = -(-(config.images_per_step // frames) // processes)
        return min(share, config.max_images // frames) if config.max_images else share

    frames = max(range(config.frames[0], config.frames[1] + 1), key=lambda count: (scenes(count) * count, count))
    return scenes(frames), frames


def _estimate_together(
    model: nn.Module, config: TrainConfig, image_size: int, scenes: int, frames: int, together: int
) -> MemoryEstimate:
    """Of ``scenes`` scenes for each of so many adapters; beside their images they share everything but factors."""
    estimate = estimate_memory(model, config, image_size, together * scenes, frames)
    # trained factors, their gradients and moments are all of one size
    more = (together - 1) * estimate.optimizer // 2
    return replace(
        estimate,
        weights=estimate.weights + more,
        optimizer=estimate.optimizer + 2 * more,
        step=estimate.step + more,
    )


def _advice(
    model: nn.Module,
    config: TrainConfig,
    image_size: int,
    estimate: MemoryEstimate,
    free: int,
    together: int,
) -> str:
    """What to change so that a step fits into ``free`` bytes; between one scene and all of them memory is linear."""
    most = config.frames[1]
    least = _estimate_together(model, config, image_size, 1, most, together)
    if least.total > free:
        hints = ["a smaller --together"] if together > 1 else []
        hints += [] if config.checkpointing else ["--train.checkpointing"]
        hints += [] if config.precision == "bf16" else ["--train.precision bf16"]
        of_each = f" of each of {together} adapters" if together > 1 else ""
        return f"one scene of {most} frames{of_each} needs {_gib(least.total)}: try " + ", ".join(
            [*hints, "fewer --train.frames", "a smaller --train.image-size"]
        )
    slope = (estimate.total - least.total) / max(1, estimate.images - least.images)
    images = least.images + int((free - least.total) / slope) if slope > 0 else least.images
    return f"--train.max-images {max(together * most, images)} would fit, with the same gradients"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
