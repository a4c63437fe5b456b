"""What this installation was built with and what it can use here."""

from __future__ import annotations

from typing import Any

import torch

from subspace_ext import _native


def build_info() -> dict[str, Any]:
    """Version, compiler and CUDA architectures of the compiled module, and whether a GPU can be used.

    Returns:
        version (str | None), native (bool), compiler (str | None), cpp_standard (int | None), threads (bool: layers
        are mined in parallel), cuda_built (bool), cuda_version (str | None: of nvcc), cuda_archs (list of str),
        cuda_available (bool: torch sees a GPU; the only field that may query the driver), torch (str).
    """
    native = _native.module().build_info() if _native.available() else {}
    return {
        "version": native.get("version"),
        "native": _native.available(),
        "compiler": native.get("compiler"),
        "cpp_standard": native.get("cpp_standard"),
        "threads": native.get("threads", False),
        "cuda_built": native.get("cuda_built", False),
        "cuda_version": native.get("cuda_version"),
        "cuda_archs": native.get("cuda_archs", []),
        "cuda_available": torch.cuda.is_available(),
        "torch": torch.__version__,
    }


def kernel_images() -> list[str]:
    """For each GPU that torch sees: which of the module's CUDA images it runs, or "none: " and the reason.

    Loads one kernel on each of them.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [_described(_native.kernel_image(torch.device("cuda", index))) for index in range(count)]


def _described(image: _native.KernelImage) -> str:
    if image.refusal is not None:
        return f"none: {image.refusal}"
    if image.binary == image.ptx:
        return f"the machine code of sm_{image.binary}"
    return f"PTX of compute_{image.ptx}, compiled by the driver for sm_{image.binary}"
