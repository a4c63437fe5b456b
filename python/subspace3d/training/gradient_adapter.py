"""The gradient of a data set's loss as a LoRA: what one step down the loss would change, before any is taken."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from subspace3d.adapters.spectral import leading_directions
from subspace3d.formats.adapter import Factors
from subspace3d.training.config import TrainConfig
from subspace3d.training.gradients import GIGABYTES, summed_gradients
from subspace3d.training.interfaces import BatchSource


@dataclass(frozen=True)
class GradientAdapter:
    """``delta[module] = lora_b lora_a``, the rank-r part of ``-G[module] / ||G||``.

    Attributes:
        factors: module -> (``lora_b [out, r]``, ``lora_a [r, in]``), float32, the root of each singular value on
            either side; r is less where a side of the module is. A module whose gradient is zero has zeros.
        norm: ``||G||_F`` over all modules.
        energy_kept: ``||delta||_F^2``, the share of the gradient that rank r holds; None where the gradient is zero.
    """

    factors: Factors
    norm: float
    energy_kept: float | None


def gradient_adapter(
    model: nn.Module,
    names: Sequence[str],
    dataset: BatchSource,
    config: TrainConfig,
    batches: int,
    rank: int,
    label: str | None = None,
    gigabytes: float = GIGABYTES,
) -> GradientAdapter:
    """``lora_B lora_A = `` the best rank-r approximation of ``-G / ||G||_F``, G the gradient of the loss at ``model``.

    G is summed over the first ``batches`` batches of a training with ``config``; a convolution is unrolled to
    ``[out, Cin kh kw]``. The norm is taken over all modules together, so that data sets of any difficulty have one
    size and the proportions between modules stay what they are. Memory and passes: `gradients.summed_gradients`.

    Args:
        model (nn.Module): the base model, on the device of ``config``.
        names (Sequence[str]): modules, each a Linear or a Conv2d.
        dataset (BatchSource): source of the batches.
        config (TrainConfig): how batches are drawn, the loss, the precision and the device.
        batches (int): at least 1.
        rank (int): r, at least 1.
        label (str | None): name in the progress display; none: no display.
        gigabytes (float): see `gradients.summed_gradients`.

    Raises:
        ValueError: no names, or ``batches`` or ``rank`` below 1.
        FloatingPointError: a gradient is not finite.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    weights = {name: model.get_parameter(f"{name}.weight") for name in names}
    factors: Factors = {}
    energy = kept = 0.0
    sums = summed_gradients(model, weights, dataset, config, (range(batches),), label, gigabytes)
    with contextlib.closing(sums):
        for name, (gradient,) in sums:
            matrix = gradient.flatten(1).to(weights[name].device)
            u, s, v = leading_directions(matrix, min(rank, *matrix.shape))
            root = s.sqrt()
            factors[name] = ((-root * u).cpu(), (root[:, None] * v.T).cpu())
            energy += float(matrix.double().square().sum())
            kept += float(s.double().square().sum())
    norm = math.sqrt(energy)
    return GradientAdapter(_scaled(factors, norm), norm, kept / energy if energy else None)


def _scaled(factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]], norm: float) -> Factors:
    size = 1 / math.sqrt(norm) if norm else 1.0
    return {name: (size * b, size * a) for name, (b, a) in factors.items()}
