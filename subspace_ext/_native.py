"""The compiled module `subspace_ext._C`: imported once, and asked here what it can do."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
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

# The kind of device whose memory the kernels read. Tests that run them in an emulator set it to "cpu".
KERNEL_DEVICE = "cuda"


class NativeUnavailableError(RuntimeError):
    """The compiled module, or the part of it that was asked for, is not in this installation."""


def available() -> bool:
    """True when the compiled module could be imported."""
    return _C is not None


def cuda_built() -> bool:
    """True when the compiled module holds CUDA kernels. Says nothing about a GPU being present."""
    return _C is not None and bool(getattr(_C, "cuda_built", False))


def cpu_rank_updates() -> bool:
    """True when the compiled module adds low-rank updates on a CPU, and tests have not put kernels in its place."""
    return _C is not None and hasattr(_C, "rank_update_cpu") and KERNEL_DEVICE != "cpu"


def runs_on(device: torch.device) -> bool:
    """True when tensors on `device` can be handed to the kernels of this installation."""
    return device.type == KERNEL_DEVICE and cuda_built()


def takes(*tensors: torch.Tensor) -> bool:
    """True when the kernels may work on these tensors: memory they can read, a dtype they know, no gradient to record.

    Tensors that stand for others, as while a graph is traced, are not taken: the trace then holds plain operations.
    """
    recording = torch.is_grad_enabled()
    return cuda_built() and all(
        tensor.device.type == KERNEL_DEVICE
        and tensor.dtype in DTYPE_CODES
        and type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and not (recording and tensor.requires_grad)
        for tensor in tensors
    )


def guard(device: torch.device) -> AbstractContextManager:
    """A context in which `device` is the current one, so that launches go there."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def stream(device: torch.device) -> int:
    """The address of the current stream of `device`."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


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


def require_float64(name: str, tensor: torch.Tensor) -> int:
    """The address of a contiguous float64 tensor.

    Raises:
        ValueError: the tensor is of another dtype or layout.
    """
    if tensor.dtype != torch.float64 or not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous float64, got {tensor.dtype} with strides {tuple(tensor.stride())}")
    return tensor.data_ptr()
