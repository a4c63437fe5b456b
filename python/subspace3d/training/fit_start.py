"""A start of the cores without training: one step down the projected gradient, its length by a line search."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from subspace3d.training.config import TrainConfig
from subspace3d.training.device import Processes, choose_device
from subspace3d.training.gradients import summed_gradients
from subspace3d.training.interfaces import BatchSource
from subspace3d.training.step import draw_step, loss_terms

_FIRST, _LARGEST, _FACTOR = 1e-4, 1.0, 2.0
_PATIENCE = 2


@dataclass(frozen=True)
class Start:
    """What `start_cores` found.

    Attributes:
        size: norm of the update over the norm of the weights it is added to; 0 where no step lowers the loss.
        before: mean loss over the batches with the cores at zero.
        after: the same after the step.
        tried: sizes that were tried.
    """

    size: float
    before: float
    after: float
    tried: int


def start_cores(
    model: nn.Module, dataset: BatchSource, config: TrainConfig, batches: int, label: str | None = None
) -> Start:
    """``c <- -t s U^T G V`` in place in every core, one t for all, G the gradient of the loss at the base weights.

    t is the best of sizes that double from an update of 1e-4 of the norm of the weights until the loss has risen
    twice. Gradient and losses are those of the first ``batches`` batches of the training, of which nothing else than
    the cores is changed; where no step lowers the loss they stay zero.

    Args:
        model (nn.Module): what `apply_method` returned for subspace or psv, untrained, on the device of ``config``.
        dataset (BatchSource): source of the batches.
        config (TrainConfig): of the training that follows.
        batches (int): at least 1.
        label (str | None): name in the progress display; none: no display.

    Raises:
        ValueError: ``model`` has no cores, or they are not zero.
        FloatingPointError: a gradient is not finite.
    """
    cores = _zero_cores(model)
    parameters = {name: core.c for name, (_, core) in cores.items()}
    sums = summed_gradients(model, parameters, dataset, config, (range(batches),), label)
    with contextlib.closing(sums):
        steps = {name: -gradient.to(parameters[name].device) for name, (gradient,) in sums}
    return _line_search(cores, steps, lambda: _loss(model, dataset, config, batches))


def start_cores_at(model: nn.Module, loss: Callable[[], torch.Tensor]) -> Start:
    """`start_cores` for any loss of the model: ``c <- -t dloss/dc`` in place in every core, one t for all.

    Args:
        model (nn.Module): what `apply_method` returned for subspace or psv, untrained.
        loss (Callable): the loss as a scalar with its graph, the same at every call.

    Raises:
        ValueError: ``model`` has no cores, or they are not zero.
        FloatingPointError: the loss or a gradient is not finite.
    """
    cores = _zero_cores(model)
    names = list(cores)
    # of a core that the loss does not look at: zero, as in `start_cores`
    gradients = torch.autograd.grad(loss(), [cores[name][1].c for name in names], materialize_grads=True)
    bad = [name for name, gradient in zip(names, gradients) if not torch.isfinite(gradient).all()]
    if bad:
        raise FloatingPointError(f"the gradient of {len(bad)} cores is not finite, e.g. {bad[0]}")

    @torch.no_grad()
    def value() -> float:
        return float(loss())

    return _line_search(cores, {name: -gradient for name, gradient in zip(names, gradients)}, value)


def _zero_cores(model: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Name -> (layer, core) of every core.

    Raises:
        ValueError: there is none, or one is not zero.
    """
    from subspace3d.adapters.peft.layers import SubspaceLayer

    cores = {
        f"{name}.{adapter}": (layer, core)
        for name, layer in model.named_modules()
        if isinstance(layer, SubspaceLayer)
        for adapter, core in layer.subspace_core.items()
    }
    if not cores or any(core.c.any() for _, core in cores.values()):
        raise ValueError("model must have cores that are zero, as apply_method gives them")
    return cores


def _line_search(
    cores: Mapping[str, tuple[Any, Any]], steps: Mapping[str, torch.Tensor], loss: Callable[[], float]
) -> Start:
    """Put every core at the best length of its step, one length for all; see `start_cores`."""
    weight_norm = torch.stack([layer.base_layer.weight.norm().square() for layer, _ in cores.values()]).sum().sqrt()
    updates = torch.stack([(cores[name][1].scale * step).norm() for name, step in steps.items()])
    update_norm = float(updates.double().square().sum().sqrt())
    if not update_norm:
        before = loss()
        return Start(0.0, before, before, 0)

    def set_size(size: float) -> None:
        with torch.no_grad():
            for name, step in steps.items():
                cores[name][1].c.copy_(size * float(weight_norm) / update_norm * step)

    before = best = loss()
    chosen, size, rises, tried = 0.0, _FIRST, 0, 0
    while rises < _PATIENCE and size <= _LARGEST:
        set_size(size)
        found = loss()
        tried += 1
        rises = 0 if found < best else rises + 1
        if found < best:
            best, chosen = found, size
        size *= _FACTOR
    set_size(chosen)
    return Start(chosen, before, best, tried)


@torch.no_grad()
def _loss(model: nn.Module, dataset: BatchSource, config: TrainConfig, batches: int) -> float:
    """Mean loss over the batches; NaN never counts as lower."""
    device = choose_device(config.device)
    total = 0.0
    for step in range(batches):
        # all of it in every process, so that all of them choose the same
        data = draw_step(dataset, config, step, Processes())
        total += sum(float(loss_terms(model, part, data.counts, config, device)["loss"]) for part in data.parts)
    return total / batches
