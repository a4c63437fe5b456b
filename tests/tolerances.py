"""Tolerances that follow from PyTorch's own error, so that no test picks a number."""

import torch
from torch import Tensor


def largest_error(result: Tensor, exact: Tensor) -> float:
    """max |result - exact|, both taken to float64; 0 for empty tensors."""
    if result.numel() == 0:
        return 0.0
    return (result.double() - exact.double()).abs().max().item()


def assert_as_exact_as_torch(
    ours: Tensor, torchs: Tensor, exact: Tensor, name: str = "result", dtype: torch.dtype | None = None
) -> None:
    """max |ours - exact| <= 2 max |torchs - exact| + epsilon max |exact|.

    Args:
        ours: the result under test, in the dtype it was computed in.
        torchs: plain PyTorch's result for the same inputs in the same dtype.
        exact: the float64 result for the same inputs.
        name: what the result is, for the message.
        dtype: what the computation ran in, where that is not the dtype of `ours`; its epsilon is the one meant.
    """
    assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)} instead of {tuple(exact.shape)}"
    floor = torch.finfo(dtype or ours.dtype).eps * (exact.abs().max().item() if exact.numel() else 0.0)
    allowed = 2 * largest_error(torchs, exact) + floor
    error = largest_error(ours, exact)
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e} (twice PyTorch's own, and one rounding)"


def relative_error(result: Tensor, expected: Tensor) -> float:
    """|result - expected|_F / |expected|_F, or the plain norm of the difference where expected is zero."""
    difference = (result.double() - expected.double()).norm().item()
    size = expected.double().norm().item()
    return difference / size if size > 0 else difference
