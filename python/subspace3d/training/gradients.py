"""The gradient of the loss by chosen weights, summed over batches of the training, in bounded memory."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence

import torch
from torch import nn

from subspace3d.adapters.parameters import trainable_parameters
from subspace3d.progress import Progress
from subspace3d.training.config import TrainConfig
from subspace3d.training.device import Processes, choose_device
from subspace3d.training.interfaces import BatchSource
from subspace3d.training.step import draw_step, loss_terms

BATCHES = 4
"""Batches whose gradient is summed where no number is given."""
GIGABYTES = 4.0
"""Host memory for sums where nothing else is asked for: one pass over the batches on VGGT-1B (3.4 GB)."""


StepLosses = Callable[[int], Iterator[torch.Tensor]]
"""The losses of a step one after the other, each a scalar with its graph; the same for the same step."""


def summed_gradients(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    dataset: BatchSource | StepLosses,
    config: TrainConfig,
    parts: Sequence[Sequence[int]],
    label: str | None = None,
    gigabytes: float = GIGABYTES,
) -> Generator[tuple[str, torch.Tensor], None, None]:
    """``G_p = sum over the steps of part p of d loss / d w``, module by module, in the order of ``weights``.

    The sums of as many modules as fit in ``gigabytes`` are taken in one pass over the batches; the rest take further
    passes over the same batches, with the same result. On a GPU one layer's gradient is there at a time: it goes to
    the host as soon as it is complete. Under torchrun every process takes all batches. Nothing is trainable while
    gradients are taken, and what was is so again when the iterator ends or is closed.

    Args:
        model (nn.Module): on the device of ``config``.
        weights (Mapping): name -> weight, a parameter of ``model``: ``[out, in]``, or a convolution's.
        dataset (BatchSource | StepLosses): source of the batches, whose loss is the backbone's; or the losses.
        config (TrainConfig): how batches are drawn, the loss, the precision, the device and the CPU threads.
        parts (Sequence): steps of the training by part; a step may be in several.
        label (str | None): name in the progress display; none: no display.
        gigabytes (float): most host memory for sums, in 1e9 bytes; one module's are kept whatever their size.

    Yields:
        tuple: name and sums ``[parts, *weight.shape]``, float32, on the CPU.

    Raises:
        ValueError: no weights, one that several modules hold, or a part without steps.
        FloatingPointError: a gradient is not finite.
    """
    if not weights:
        raise ValueError("weights must name at least one module, got none")
    _refuse_tied(model, weights)
    if not parts or not all(parts):
        raise ValueError(f"parts must each have at least one step, got {[list(part) for part in parts]}")
    if config.threads:
        torch.set_num_threads(config.threads)
    trained = list(trainable_parameters(model).values())
    steps = sorted({step for part in parts for step in part})
    groups = _groups(weights, len(parts), gigabytes)
    losses = dataset if callable(dataset) else _batch_losses(model, dataset, config)
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with Progress(label, len(groups) * len(steps)) if label else contextlib.nullcontext() as progress:
            for names in groups:
                wanted = {name: weights[name] for name in names}
                sums = _sum_group(wanted, losses, parts, steps, progress)
                while sums:
                    # a module's sums go as soon as they were looked at
                    name = next(iter(sums))
                    yield name, _finite(name, sums.pop(name), len(steps))
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _refuse_tied(model: nn.Module, weights: Mapping[str, nn.Parameter]) -> None:
    holders: dict[nn.Parameter, list[str]] = {}
    for module_name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(parameter, []).append(module_name)
    for name, weight in weights.items():
        if len(holders.get(weight, ())) > 1:
            raise ValueError(
                f"targets must leave out {name}: its weight has several holders ({', '.join(holders[weight])}), and "
                "its gradient is the sum over all of them"
            )


def count_passes(weights: Mapping[str, torch.Tensor], parts: int, gigabytes: float = GIGABYTES) -> int:
    """Passes over the batches that `summed_gradients` takes; the weights may lie on the meta device."""
    return len(_groups(weights, parts, gigabytes))


def _groups(weights: Mapping[str, torch.Tensor], parts: int, gigabytes: float) -> list[list[str]]:
    groups: list[list[str]] = []
    held = 0.0
    for name, weight in weights.items():
        size = 4.0 * parts * weight.numel()
        if not groups or held + size > gigabytes * 1e9:
            groups.append([])
            held = 0.0
        groups[-1].append(name)
        held += size
    return groups


def _batch_losses(model: nn.Module, dataset: BatchSource, config: TrainConfig) -> StepLosses:
    device = choose_device(config.device)

    def losses(step: int) -> Iterator[torch.Tensor]:
        data = draw_step(dataset, config, step, Processes())
        for scenes in data.parts:
            yield loss_terms(model, scenes, data.counts, config, device)["loss"]

    return losses


def _sum_group(
    weights: Mapping[str, nn.Parameter],
    losses: StepLosses,
    parts: Sequence[Sequence[int]],
    steps: Sequence[int],
    progress: Progress | None,
) -> dict[str, torch.Tensor]:
    sums = {name: torch.zeros(len(parts), *weight.shape) for name, weight in weights.items()}
    members: list[int] = []

    def take(name: str, weight: torch.Tensor) -> None:
        assert weight.grad is not None
        gradient = weight.grad.float().cpu()
        for part in members:
            sums[name][part] += gradient
        weight.grad = None

    hooks = []
    try:
        for name, weight in weights.items():
            weight.requires_grad_(True)
            hooks.append(weight.register_post_accumulate_grad_hook(functools.partial(take, name)))
        with torch.enable_grad():
            for step in steps:
                members[:] = [index for index, part in enumerate(parts) if step in part]
                for loss in losses(step):
                    loss.backward()
                if progress is not None:
                    progress.advance()
    finally:
        for hook in hooks:
            hook.remove()
        for weight in weights.values():
            weight.requires_grad_(False)
            weight.grad = None
    return sums


def _finite(name: str, sums: torch.Tensor, steps: int) -> torch.Tensor:
    if not torch.isfinite(sums).all():
        raise FloatingPointError(f"the gradient of {name} must be finite in the first {steps} steps")
    return sums
