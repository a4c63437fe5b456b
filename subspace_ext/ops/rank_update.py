"""`rank_update`: a low-rank update added to a matrix and rounded once, for one matrix or a whole model at a time."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from subspace_ext import _native
from subspace_ext.ops.rank_update_ref import rank_update_ref

# struct RankUpdate in csrc/rank_update.h: sixteen words of eight bytes.
_JOB = struct.Struct("=QqQqQqqQqQqqqqdq")
_OUT_WORD = 9

# Multiplications of one update up to which the CPU's kernel is used: it makes many matrices with one call, but a larger
# product takes longer than torch's.
HOST_PRODUCTS = 2**28
# Multiplications that keep a thread busy for longer than it takes to start one.
_PRODUCTS_PER_THREAD = 2**23


class Job(NamedTuple):
    """out = cast(base + scale * (left mid) right^T)."""

    out: Tensor  # [rows, columns]; may be base itself
    base: Tensor  # [rows, columns]
    left: Tensor  # [rows, K]
    mid: Tensor  # [K, K] float32, any strides
    right: Tensor  # [columns, K] float32
    scale: float


class HostUpdate(NamedTuple):
    """One of the updates that a `HostLaunch` makes; all float32, on the CPU."""

    base: Tensor  # [rows, columns]
    left: Tensor  # [rows, K]
    mid: Tensor  # [K, K], any strides
    right: Tensor  # [columns, K]
    scale: float


def rank_update(
    base: Tensor, left: Tensor, mid: Tensor, right: Tensor, scale: float, dtype: torch.dtype, seed: int | None = None
) -> Tensor:
    """cast(base + scale * (left mid) right^T); arguments and result as in `rank_update_ref`.

    One kernel where the tensors are on a GPU and the native module holds CUDA kernels, the reference elsewhere.
    """
    if not fits(base, left, mid, right, dtype):
        return rank_update_ref(base, left, mid, right, scale, dtype, seed)
    out = torch.empty(base.shape, dtype=dtype, device=base.device)
    if not base.dtype == left.dtype == dtype:
        left = left.float()
    queue([Job(out, _rows(base), _rows(left), mid.float(), _rows(right.float()), scale)], seed)
    return out


def rank_update_(matrix: Tensor, left: Tensor, mid: Tensor, right: Tensor, scale: float) -> Tensor:
    """matrix += scale * (left mid) right^T in place; matrix [rows, columns] and left [rows, K] of one dtype.

    The kernel rounds once; without it the factor (left mid), made in the dtype of mid, is rounded as well.
    """
    if fits(matrix, left, mid, right, matrix.dtype) and matrix.dtype == left.dtype and matrix.stride(1) == 1:
        queue([Job(matrix, matrix, _rows(left), mid.float(), _rows(right.float()), scale)])
        return matrix
    mixed = (left.to(mid.dtype) @ mid) * scale
    return matrix.addmm_(mixed.to(matrix.dtype), right.to(matrix.dtype).t())


def fits(base: Tensor, left: Tensor, mid: Tensor, right: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernel can take these and round to `dtype`: devices, dtypes, and a rank that shared memory holds."""
    if not _native.takes(base, left, mid, right) or dtype not in _native.DTYPE_CODES:
        return False
    return mid.shape[0] <= _native.kernel_image(base.device).max_rank


def fits_host(base: Tensor, left: Tensor, mid: Tensor, right: Tensor, dtype: torch.dtype) -> bool:
    """Whether the CPU's kernel can take these, and is the faster way: for large products torch's own is."""
    if not _native.cpu_rank_updates() or dtype not in (torch.float32, torch.bfloat16):
        return False
    if base.numel() * mid.shape[0] > HOST_PRODUCTS:
        return False
    return all(
        tensor.device.type == "cpu" and tensor.dtype == torch.float32 and type(tensor) is Tensor
        for tensor in (base, left, mid, right)
    ) and all(matrix.stride(1) == 1 for matrix in (base, left, right))


def _rows(matrix: Tensor) -> Tensor:
    """The matrix with columns of stride 1."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _check(jobs: Sequence[Job]) -> None:
    first = jobs[0]
    for number, (out, base, left, mid, right, _) in enumerate(jobs):
        rows, columns, rank = *base.shape, mid.shape[0]
        expected = {"out": (rows, columns), "left": (rows, rank), "mid": (rank, rank), "right": (columns, rank)}
        for name, tensor in zip(("out", "base", "left", "mid", "right"), (out, base, left, mid, right)):
            where = f"rank_update job {number}: {name}"
            if tuple(tensor.shape) != expected.get(name, (rows, columns)):
                raise ValueError(f"{where} must be {list(expected[name])}, got shape {tuple(tensor.shape)}")
            if tensor.device != first.out.device or not _native.runs_on(tensor.device):
                raise ValueError(
                    f"{where} must be on the GPU of the first job, {first.out.device}, got {tensor.device}"
                )
            if name != "mid" and tensor.stride(1) != 1 and tensor.shape[1] > 1:
                raise ValueError(f"{where} must have columns of stride 1, got strides {tuple(tensor.stride())}")
        for name, tensor in (("mid", mid), ("right", right)):
            if tensor.dtype != torch.float32:
                raise ValueError(f"rank_update job {number}: {name} must be torch.float32, got {tensor.dtype}")
        types, wanted = (out.dtype, base.dtype, left.dtype), (first.out.dtype, first.base.dtype, first.left.dtype)
        if types != wanted or any(dtype not in _native.DTYPE_CODES for dtype in types):
            raise ValueError(
                f"rank_update job {number}: out, base and left must have the half or single precision dtypes of the"
                f" first job, {wanted}, got {types}"
            )


def pack(jobs: Sequence[Job], table: memoryview | bytearray) -> None:
    """Writes the jobs, addresses included, as `struct RankUpdate`s; table holds 128 bytes a job."""
    for number, (out, base, left, mid, right, scale) in enumerate(jobs):
        _JOB.pack_into(
            table,
            number * _JOB.size,
            base.data_ptr(),
            base.stride(0),
            left.data_ptr(),
            left.stride(0),
            mid.data_ptr(),
            mid.stride(0),
            mid.stride(1),
            right.data_ptr(),
            right.stride(0),
            out.data_ptr(),
            out.stride(0),
            base.shape[0],
            base.shape[1],
            mid.shape[0],
            scale,
            0,
        )


class Launch:
    """Jobs that are queued as one kernel, again and again while every tensor in them stays where it is.

    The table of addresses is made once. The caller keeps the tensors alive.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        """Raises ValueError, naming job and tensor, for shapes, dtypes, strides or devices the kernel cannot take."""
        _check(jobs)
        first = jobs[0]
        self.device = first.out.device
        codes = _native.DTYPE_CODES
        self._types = codes[first.base.dtype], codes[first.left.dtype], codes[first.out.dtype]
        self._count = len(jobs)
        pinned = self.device.type == "cuda" and self._count > 1
        self._host = torch.empty(self._count, _JOB.size // 8, dtype=torch.int64, pin_memory=pinned)
        pack(jobs, self._host.numpy().data.cast("B"))
        self._plan = _native.module().plan_rank_updates(self._host.data_ptr(), self._count)
        self._table = self._host.to(self.device, non_blocking=True) if self._count > 1 else self._host

    def __call__(self, seed: int | None = None) -> None:
        """Queues the kernel on the current stream; seed as in `rank_update_ref`."""
        with _native.guard(self.device):
            _native.module().rank_update(
                self._host.data_ptr(),
                self._table.data_ptr(),
                self._count,
                *self._plan,
                *self._types,
                seed is not None,
                seed or 0,
                _native.stream(self.device),
            )


def queue(jobs: Sequence[Job], seed: int | None = None) -> None:
    """Queues the jobs as one kernel, once."""
    Launch(jobs)(seed)


class HostLaunch:
    """cast(base + scale * (left mid) right^T) for many small matrices on the CPU by one native call, again and again.

    The table of addresses is made once; each call hands out new memory. The updates' tensors, for which `fits_host`
    holds, have to stay alive and where they are.
    """

    def __init__(self, updates: Sequence[HostUpdate], dtype: torch.dtype) -> None:
        self._updates, self._dtype = list(updates), dtype
        self._sizes = [base.numel() for base, *_ in self._updates]
        self._table = np.empty((len(self._updates), _JOB.size // 8), dtype=np.int64)
        placeholders = [Job(base, base, left, mid, right, scale) for base, left, mid, right, scale in self._updates]
        pack(placeholders, self._table.data.cast("B"))
        itemsize = torch.empty(0, dtype=dtype).element_size()
        self._offsets = np.concatenate([[0], np.cumsum(self._sizes)[:-1]]) * itemsize
        for row, (base, *_) in zip(self._table, self._updates):
            row[_OUT_WORD + 1] = base.shape[1]
        products = sum(base.numel() * mid.shape[0] for base, _, mid, *_ in self._updates)
        self._threads = max(1, products // _PRODUCTS_PER_THREAD)
        self._total, self._address, self._code = sum(self._sizes), self._table.ctypes.data, _native.DTYPE_CODES[dtype]

    def __call__(self) -> list[Tensor]:
        """The results, each contiguous and flat, in the order of the updates. One call at a time."""
        out = torch.empty(self._total, dtype=self._dtype)
        self._table[:, _OUT_WORD] = self._offsets + out.data_ptr()
        threads = 1 if self._threads == 1 else min(self._threads, torch.get_num_threads())
        _native.module().rank_update_cpu(self._address, len(self._updates), self._code, threads)
        return [out] if len(self._updates) == 1 else list(torch.split_with_sizes(out, self._sizes))
