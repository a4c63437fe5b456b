"""Typed view of the native module. Addresses are integers; sizes and strides count elements."""

from typing import Any

cuda_built: bool

def build_info() -> dict[str, Any]: ...
def irls_workspace(job: bytes) -> int: ...  # a `struct IrlsJob` (csrc/irls.h), as for all four
def irls(job: bytes) -> None: ...
def rank_update_cpu(jobs: int, count: int, out_dtype: int, threads: int) -> None: ...
def same_bytes(left: int, right: int, count: int) -> bool: ...

# Present only where cuda_built is true. Jobs are arrays of `struct RankUpdate` (csrc/rank_update.h).
def kernel_image() -> dict[str, Any]: ...
def plan_rank_updates(jobs: int, count: int) -> tuple[int, int]: ...
def rank_update(
    jobs: int,
    device_jobs: int,
    count: int,
    blocks: int,
    tiles_per_block: int,
    base_dtype: int,
    left_dtype: int,
    out_dtype: int,
    stochastic: bool,
    seed: int,
    stream: int,
) -> None: ...
def core_grad_splits(tokens: int, rank: int) -> int: ...
def core_grad(
    g: int,
    g_stride: int,
    p: int,
    p_stride: int,
    dtype: int,
    partial: int,
    dc: int,
    tokens: int,
    rank: int,
    splits: int,
    scale: float,
    stream: int,
) -> None: ...
def irls_cuda_workspace(job: bytes) -> int: ...
def irls_cuda(job: bytes, stream: int) -> None: ...
