"""The compiled module `subspace_ext._C`: imported once, and asked here what it can do."""

from __future__ import annotations

import functools
import warnings
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import NamedTuple

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


class KernelImage(NamedTuple):
    """What a GPU runs of the module's CUDA kernels."""

    refusal: str | None  # why it runs none; None where it runs them
    binary: int = 0  # 10 x compute capability of the machine code: 90 for sm_90
    ptx: int = 0  # of the PTX behind it
    max_rank: int = 0  # largest K of `rank_update`, whose blocks share what shared memory the card has


@functools.cache
def kernel_image(device: torch.device) -> KernelImage:
    """The image of the kernels that `device` runs, loaded on the first call; of the kind of `KERNEL_DEVICE`."""
    if not cuda_built():
        return KernelImage("the native module was built without CUDA kernels")
    if torch.version.hip is not None:
        return KernelImage("this torch is built for ROCm, and the kernels are CUDA's")
    with guard(device):
        found = module().kernel_image()
    if found["status"]:
        return KernelImage(f"{found['message']} (CUDA error {found['status']})")
    return KernelImage(None, found["binary"], found["ptx"], found["max_rank"])


@functools.cache
def _warn_once(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=2)


def _named(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"


def runs_on(device: torch.device) -> bool:
    """True when tensors on `device` can be handed to the kernels of this installation.

    A GPU that has no image among them, or too old a driver, is named in one warning; the references work there.
    """
    if device.type != KERNEL_DEVICE or not cuda_built():
        return False
    refusal = kernel_image(device).refusal
    if refusal is not None:
        _warn_once(
            f"the CUDA kernels of subspace_ext do not run on {_named(device)}: {refusal}; plain PyTorch operations"
            " take their place, slower and with the same results"
        )
    return refusal is None


def takes(*tensors: torch.Tensor) -> bool:
    """True when the kernels may work on these tensors: on one GPU that runs them, of a known dtype, nothing to record.

    Tensors that stand for others, as while a graph is traced, are not taken: the trace then holds plain operations.
    """
    recording, device = torch.is_grad_enabled(), tensors[0].device
    return (
        device.type == KERNEL_DEVICE
        and all(
            tensor.device == device
            and tensor.dtype in DTYPE_CODES
            and type(tensor) in (torch.Tensor, torch.nn.Parameter)
            and not (recording and tensor.requires_grad)
            for tensor in tensors
        )
        and runs_on(device)
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
