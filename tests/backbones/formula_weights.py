"""Weights and images given by a formula, so that two implementations can be compared without sharing a file."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn


def noise(name: str, count: int) -> Tensor:
    """``count`` numbers in [-1, 1), float64: the fractional part of a large sine, with a phase that depends on name."""
    phase = zlib.crc32(name.encode()) % 1000
    return 2 * torch.frac((torch.arange(count, dtype=torch.float64) * 12.9898 + phase).sin() * 437.58).abs() - 1


@torch.no_grad()
def set_formula_weights(model: nn.Module) -> None:
    """Every weight far from its initial value; activations keep their order of magnitude from layer to layer."""
    for name, tensor in model.state_dict().items():
        fan_in = tensor[0].numel() if tensor.dim() in (2, 4) and "token" not in name else 4
        values = noise(name, tensor.numel()).view(tensor.shape) * (2 / fan_in) ** 0.5
        if "norm" in name and name.endswith("weight"):
            values = values + 1
        tensor.copy_(values)


def formula_images(batch: int, frames: int, height: int, width: int) -> Tensor:
    """[batch, frames, 3, height, width] float32 in 0..1."""
    values = noise("images", batch * frames * 3 * height * width)
    return (values / 2 + 0.5).view(batch, frames, 3, height, width).float()
