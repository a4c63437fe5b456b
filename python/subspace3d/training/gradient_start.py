"""A LoRA that starts where the loss pulls: ``lora_A`` at the leading input directions of the loss's gradient.

``lora_A`` of a stock LoRA is random and moves little, so the row space of its update is mostly that of its start, and
the adapters of different data sets have hardly an input direction in common. On the gradient they can have what their
data have in common. The idea is that of LoRA-GA (Wang et al. 2024), without its change of the base weights.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from subspace3d.adapters.parameters import trainable_parameters
from subspace3d.adapters.spectral import leading_directions
from subspace3d.progress import Progress
from subspace3d.training.config import TrainConfig
from subspace3d.training.device import choose_device, joined_processes
from subspace3d.training.interfaces import BatchSource
from subspace3d.training.loop import draw_step, loss_terms

# what the rows of PEFT's random lora_A have on average: uniform in +-in^(-1/2)
_ROW_NORM = 1 / math.sqrt(3)


def start_at_gradient(
    model: nn.Module,
    dataset: BatchSource,
    config: TrainConfig,
    steps: int,
    label: str = "train",
    quiet: bool = False,
    adapter: str = "default",
) -> None:
    """``lora_A <- V_r^T / sqrt(3)`` in place, for ``G = U S V^T`` the gradient of the loss by the layer's weight.

    G is summed over the first ``steps`` batches of the training; a convolution is unrolled. ``lora_B`` stays zero, so
    the model computes what it did before. Directions beyond min(out, in), and layers whose gradient is zero, keep their
    random start. The gradients of all layers are kept in host memory, in float32; on a GPU only one layer's is there at
    a time.

    Args:
        model (nn.Module): a PeftModel with a LoRA fresh from PEFT, on the device of ``config``.
        dataset (BatchSource): source of the batches.
        config (TrainConfig): of the training that follows.
        steps (int): batches, at least 1.
        label (str): name in the progress display.
        quiet (bool): no progress display.
        adapter (str): name of the LoRA.

    Raises:
        FloatingPointError: a gradient is not finite.
    """
    from peft.tuners.lora import LoraLayer

    layers: dict[str, Any] = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    weights = {name: layer.get_base_layer().weight for name, layer in layers.items()}
    gradients = _summed_gradients(model, weights, dataset, config, steps, None if quiet else f"{label}, gradient")
    with torch.no_grad():
        for name, gradient in gradients.items():
            if not torch.isfinite(gradient).all():
                raise FloatingPointError(f"the gradient of {name} must be finite in the first {steps} steps")
            if not gradient.any():
                continue
            a = layers[name].lora_A[adapter].weight
            k = min(len(a), len(gradient), gradient[0].numel())
            _, _, v = leading_directions(gradient.to(a.device), k)
            a[:k] = (_ROW_NORM * v.T).reshape(a[:k].shape)


def _summed_gradients(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    dataset: BatchSource,
    config: TrainConfig,
    steps: int,
    label: str | None,
) -> dict[str, torch.Tensor]:
    """Name -> gradient of the loss summed over the first ``steps`` batches, in the shape of the weight, on the CPU."""
    device = choose_device(config.device)
    trained = trainable_parameters(model).values()
    sums = {name: torch.zeros(weight.shape) for name, weight in weights.items()}

    def take(name: str, weight: torch.Tensor) -> None:
        assert weight.grad is not None
        sums[name] += weight.grad.cpu()
        weight.grad = None

    hooks = []
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        for name, weight in weights.items():
            weight.requires_grad_(True)
            hooks.append(weight.register_post_accumulate_grad_hook(functools.partial(take, name)))
        with (
            joined_processes(device) as processes,
            Progress(label, steps) if label else contextlib.nullcontext() as progress,
        ):
            for step in range(steps):
                data = draw_step(dataset, config, step, processes)
                for part in data.parts:
                    loss_terms(model, part, data.counts, config, device)["loss"].backward()
                if progress is not None:
                    progress.advance()
    finally:
        for hook in hooks:
            hook.remove()
        for weight in weights.values():
            weight.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
    return sums
