"""A LoRA that starts where the loss pulls: ``lora_A`` at the leading input directions of the loss's gradient.

``lora_A`` of a stock LoRA is random and moves little, so the row space of its update is mostly that of its start, and
the adapters of different data sets have hardly an input direction in common. On the gradient they can have what their
data have in common. The idea is that of LoRA-GA (Wang et al. 2024), without its change of the base weights.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import nn

from subspace3d.adapters.spectral import leading_directions
from subspace3d.training.config import TrainConfig
from subspace3d.training.gradients import summed_gradients
from subspace3d.training.interfaces import BatchSource

# what the rows of PEFT's random lora_A have on average: uniform in +-in^(-1/2)
_ROW_NORM = 1 / math.sqrt(3)


def start_at_gradient(
    model: nn.Module,
    dataset: BatchSource,
    config: TrainConfig,
    steps: int,
    label: str = "train",
    quiet: bool = False,
) -> None:
    """``lora_A <- V_r^T / sqrt(3)`` in place, for ``G = U S V^T`` the gradient of the loss by the layer's weight.

    G is summed over the first ``steps`` batches of the training; a convolution is unrolled. ``lora_B`` stays zero, so
    the model computes what it did before. Directions beyond min(out, in), and layers whose gradient is zero, keep their
    random start. Memory and passes are those of `gradients.summed_gradients`.

    Args:
        model (nn.Module): a PeftModel with a LoRA fresh from PEFT, called ``default``, on the device of ``config``.
        dataset (BatchSource): source of the batches.
        config (TrainConfig): of the training that follows.
        steps (int): batches, at least 1.
        label (str): name in the progress display.
        quiet (bool): no progress display.

    Raises:
        FloatingPointError: a gradient is not finite.
    """
    from peft.tuners.lora import LoraLayer

    layers: dict[str, Any] = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    weights = {name: layer.get_base_layer().weight for name, layer in layers.items()}
    shown = None if quiet else f"{label}, gradient"
    sums = summed_gradients(model, weights, dataset, config, (range(steps),), shown)
    with contextlib.closing(sums), torch.no_grad():
        for name, (gradient,) in sums:
            if not gradient.any():
                continue
            a = layers[name].lora_A["default"].weight
            k = min(len(a), len(gradient), gradient[0].numel())
            _, _, v = leading_directions(gradient.to(a.device), k)
            a[:k] = (_ROW_NORM * v.T).reshape(a[:k].shape)
