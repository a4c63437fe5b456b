"""Reference of `rank_update`, and the rounding that it and the kernel share."""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; everything else is accumulated in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rank_update_ref(
    base: Tensor, left: Tensor, mid: Tensor, right: Tensor, scale: float, dtype: torch.dtype, seed: int | None = None
) -> Tensor:
    """cast(base + scale * (left mid) right^T), accumulated in float32 (float64 for a float64 base), rounded once.

    Args:
        base: [rows, columns].
        left: [rows, K].
        mid: [K, K].
        right: [columns, K].
        scale: factor of the update.
        dtype: dtype of the result.
        seed: round stochastically (`round_stochastic`); None rounds to nearest.

    Returns:
        [rows, columns], contiguous, of dtype `dtype`.
    """
    wide = accumulation_dtype(base.dtype)
    product = left.to(wide) @ mid.to(wide)
    exact = torch.addmm(base.to(wide), product, right.to(wide).t(), alpha=scale)
    if seed is None or dtype not in (torch.bfloat16, torch.float16):
        return exact.to(dtype)
    return round_stochastic(exact.float(), dtype, seed)


def _times(values: Tensor, factor: int) -> Tensor:
    """The low 32 bits of values * factor, for values and factor below 2^32, without leaving int64."""
    return ((values * (factor & 0xFFFF)) + ((values * (factor >> 16) & 0xFFFF) << 16)) & _WORD


def uniform(seed: int, counter: Tensor) -> Tensor:
    """24 random bits in [0, 1) for each counter below 2^32 (int64): Murmur3's finaliser of counter + seed.

    The seed enters multiplied by 2^64 over the golden ratio; float32.
    """
    offset = seed * 0x9E3779B97F4A7C15 & (1 << 64) - 1
    low = counter + (offset & _WORD)
    high = (offset >> 32) + (low >> 32) & _WORD
    h = (low & _WORD) ^ high
    h = h ^ (h >> 16)
    h = _times(h, 0x85EBCA6B)
    h = h ^ (h >> 13)
    h = _times(h, 0xC2B2AE35)
    h = h ^ (h >> 16)
    return (h >> 8).float() * 2.0**-24


def round_stochastic(exact: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    """One of the two neighbours of each value in `dtype`, the further one as often as the distance to the nearer asks.

    Element i of the flattened matrix uses `uniform(seed, i)`: the choice is the same in every call, so that a weight
    gains fixed bits below its own, and an update too small for the dtype survives on average over the matrix.

    Args:
        exact: [rows, columns] float32; values that are not finite are rounded as usual.
        dtype: torch.bfloat16 or torch.float16.
        seed: any integer.
    """
    nearest = exact.to(dtype)
    outside = nearest.float().abs() > exact.abs()
    # A half-precision value's bits, read as an integer, count its steps from zero.
    below = torch.where(outside, nearest.view(torch.int16) - 1, nearest.view(torch.int16))
    nearer, further = below.view(dtype), (below + 1).view(dtype)
    counter = torch.arange(exact.numel(), device=exact.device).view(exact.shape)
    step = further.float().abs() - nearer.float().abs()
    chosen = torch.where(exact.abs() - nearer.float().abs() > uniform(seed, counter) * step, further, nearer)
    return torch.where(exact.isfinite(), chosen, nearest)
