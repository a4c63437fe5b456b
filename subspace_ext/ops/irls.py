"""`irls`: batched iteratively reweighted least squares in the core space of the stacked adapters."""

from __future__ import annotations

import torch
from torch import Tensor

from subspace_ext import _native
from subspace_ext.ops.irls_ref import irls_ref
from subspace_ext.ops.irls_result import IrlsResult

# The native loop holds all N cores of a layer per thread; with many cores and large layers, fewer threads run.
WORKSPACE_BYTES = 2**31


def irls(
    rb: Tensor,
    ra: Tensor,
    adapters: int,
    k: int,
    p: float,
    eps: float,
    max_iter: int,
    tol: float,
    threads: int | None = None,
) -> IrlsResult:
    """min over u, v of sum_n (e_l^2 + |rb_n ra_n^T - u v^T|_F^2)^(p/2) for each layer l.

    rb_n is the n-th block of r columns of rb[l], e_l = eps * median of the positive |rb_n ra_n^T|_F. Runs the native
    loop where the compiled module is installed, otherwise the reference.

    Args:
        rb: [L, sb, N*r] float64 on the CPU.
        ra: [L, sa, N*r] float64 on the CPU.
        adapters: N.
        k: columns of u and v, at most min(sb, sa).
        p: exponent in (0, 2].
        eps: smoothing in units of the median norm.
        max_iter: re-weightings at most.
        tol: relative move of the normalised weights at which to stop.
        threads: layers worked on at a time; None takes torch.get_num_threads(). Has no influence on the result.

    Raises:
        ValueError: sizes or dtypes do not match.
    """
    if rb.dim() != 3 or ra.dim() != 3 or rb.shape[0] != ra.shape[0] or rb.shape[2] != ra.shape[2]:
        raise ValueError(
            f"rb and ra must be [L, sb, N r] and [L, sa, N r], got shapes {tuple(rb.shape)} and {tuple(ra.shape)}"
        )
    if adapters < 1 or rb.shape[2] == 0 or rb.shape[2] % adapters:
        raise ValueError(f"rb must have N r columns with N = {adapters}, got {rb.shape[2]} columns")
    if not _native.available():
        return irls_ref(rb, ra, adapters, k, p, eps, max_iter, tol)
    return _irls_native(rb.contiguous(), ra.contiguous(), adapters, k, p, eps, max_iter, tol, threads)


def _irls_native(
    rb: Tensor,
    ra: Tensor,
    adapters: int,
    k: int,
    p: float,
    eps: float,
    max_iter: int,
    tol: float,
    threads: int | None,
) -> IrlsResult:
    module = _native.module()
    layers, sb, columns = rb.shape
    sa = ra.shape[1]
    rank = columns // adapters
    doubles = module.irls_workspace(adapters, rank, sb, sa, k)
    wanted = torch.get_num_threads() if threads is None else threads
    threads = max(1, min(wanted, layers, WORKSPACE_BYTES // (8 * doubles)))
    sizes = ((sb, k), (sa, k), (min(sb, sa),), (adapters,), (adapters,), (max_iter + 1,))
    floats = [torch.empty(layers, *size, dtype=torch.float64) for size in sizes]
    n_iter = torch.empty(layers, dtype=torch.int64)
    converged = torch.empty(layers, dtype=torch.bool)
    workspace = torch.empty(threads, doubles, dtype=torch.float64)
    module.irls(
        _native.require_cpu_float64("rb", rb),
        _native.require_cpu_float64("ra", ra),
        layers,
        adapters,
        rank,
        sb,
        sa,
        k,
        p,
        eps,
        max_iter,
        tol,
        *(tensor.data_ptr() for tensor in floats),
        n_iter.data_ptr(),
        converged.data_ptr(),
        workspace.data_ptr(),
        threads,
    )
    u, v, singular_values, weights, residuals, objective = floats
    return IrlsResult(u, v, singular_values, weights, residuals, objective, n_iter, converged)
