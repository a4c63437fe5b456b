"""Typed view of the native module. Addresses are integers; sizes and strides count elements."""

from typing import Any

cuda_built: bool

def build_info() -> dict[str, Any]: ...
def irls_workspace(adapters: int, rank: int, sb: int, sa: int, k: int) -> int: ...
def irls(
    rb: int,
    ra: int,
    layers: int,
    adapters: int,
    rank: int,
    sb: int,
    sa: int,
    k: int,
    p: float,
    eps: float,
    max_iter: int,
    tol: float,
    u: int,
    v: int,
    singular_values: int,
    weights: int,
    residuals: int,
    objective: int,
    n_iter: int,
    converged: int,
    workspace: int,
    threads: int,
) -> None: ...

# Present only where cuda_built is true.
def fold_weight(
    w: int,
    w_dtype: int,
    w_stride: int,
    left: int,
    left_stride: int,
    right: int,
    right_stride: int,
    w_eff: int,
    w_eff_dtype: int,
    w_eff_stride: int,
    out: int,
    in_: int,
    rank: int,
    scale: float,
    stream: int,
) -> None: ...
