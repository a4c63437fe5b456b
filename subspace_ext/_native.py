"""The compiled module `subspace_ext._C`: imported once, and asked here what it can do."""

from __future__ import annotations

from types import ModuleType

import torch

try:
    from subspace_ext import _C
except ImportError as error:
    _C = None  # type: ignore[assignment]
    _import_error: ImportError | None = error
else:
    _import_error = None

# The numbers of `enum class DType` in csrc/dtype.h.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class NativeUnavailableError(RuntimeError):
    """The compiled module, or the part of it that was asked for, is not in this installation."""


def available() -> bool:
    """True when the compiled module could be imported."""
    return _C is not None


def cuda_built() -> bool:
    """True when the compiled module holds CUDA kernels. Says nothing about a GPU being present."""
    return _C is not None and bool(getattr(_C, "cuda_built", False))


def module() -> ModuleType:
    """The compiled module.

    Raises:
        NativeUnavailableError: it could not be imported; the import error is the cause.
    """
    if _C is None:
        raise NativeUnavailableError(
            f"subspace_ext._C could not be imported ({_import_error}); reinstall with `pip install .`"
        ) from _import_error
    return _C


def require_cpu_float64(name: str, tensor: torch.Tensor) -> int:
    """The address of a contiguous float64 CPU tensor.

    Raises:
        ValueError: the tensor is of another device, dtype or layout.
    """
    if tensor.device.type != "cpu" or tensor.dtype != torch.float64 or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be a contiguous float64 CPU tensor, got {tensor.dtype} on {tensor.device}"
            f" with strides {tuple(tensor.stride())}"
        )
    return tensor.data_ptr()
