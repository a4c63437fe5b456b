"""`irls`: batched iteratively reweighted least squares in the core space of the stacked adapters."""

from __future__ import annotations

import torch
from torch import Tensor

from subspace_ext import _native
from subspace_ext.ops.irls_ref import irls_ref
from subspace_ext.ops.irls_result import IrlsResult

# The native loops hold all N cores of a layer per thread or block; with many and large cores, fewer of them run.
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
    loop of the device where the compiled module has one, otherwise the reference.

    Args:
        rb: [L, sb, N*r] float64.
        ra: [L, sa, N*r] float64, on the device of rb.
        adapters: N.
        k: columns of u and v, at most min(sb, sa).
        p: exponent in (0, 2].
        eps: smoothing in units of the median norm.
        max_iter: re-weightings at most.
        tol: relative move of the normalised weights at which to stop.
        threads: layers worked on at a time on the CPU; None takes torch.get_num_threads(). Has no influence on the
            result.

    Raises:
        ValueError: sizes, dtypes or devices do not match.
    """
    if rb.device != ra.device:
        raise ValueError(f"ra must be on the device of rb, {rb.device}, got {ra.device}")
    if rb.dim() != 3 or ra.dim() != 3 or rb.shape[0] != ra.shape[0] or rb.shape[2] != ra.shape[2]:
        raise ValueError(
            f"rb and ra must be [L, sb, N r] and [L, sa, N r], got shapes {tuple(rb.shape)} and {tuple(ra.shape)}"
        )
    if adapters < 1 or rb.shape[2] == 0 or rb.shape[2] % adapters:
        raise ValueError(f"rb must have N r columns with N = {adapters}, got {rb.shape[2]} columns")
    rb, ra = rb.contiguous(), ra.contiguous()
    if _native.runs_on(rb.device):
        return _irls_cuda(rb, ra, adapters, k, p, eps, max_iter, tol)
    if _native.available() and rb.device.type == "cpu":
        return _irls_cpu(rb, ra, adapters, k, p, eps, max_iter, tol, threads)
    return irls_ref(rb, ra, adapters, k, p, eps, max_iter, tol)


def _empty_result(rb: Tensor, ra: Tensor, adapters: int, k: int, max_iter: int) -> IrlsResult:
    layers, sb, sa = rb.shape[0], rb.shape[1], ra.shape[1]
    sizes = ((sb, k), (sa, k), (min(sb, sa),), (adapters,), (adapters,), (max_iter + 1,))
    floats = [torch.empty(layers, *size, dtype=torch.float64, device=rb.device) for size in sizes]
    n_iter = torch.empty(layers, dtype=torch.int64, device=rb.device)
    u, v, singular_values, weights, residuals, objective = floats
    converged = torch.empty(layers, dtype=torch.bool, device=rb.device)
    return IrlsResult(u, v, singular_values, weights, residuals, objective, n_iter, converged)


def _irls_cpu(
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
    sizes = (adapters, columns // adapters, sb, ra.shape[1], k)
    doubles = module.irls_workspace(*sizes)
    wanted = torch.get_num_threads() if threads is None else threads
    threads = max(1, min(wanted, layers, WORKSPACE_BYTES // (8 * doubles)))
    result = _empty_result(rb, ra, adapters, k, max_iter)
    workspace = torch.empty(threads, doubles, dtype=torch.float64)
    addresses = _native.require_float64("rb", rb), _native.require_float64("ra", ra)
    outputs = (tensor.data_ptr() for tensor in result)
    module.irls(*addresses, layers, *sizes, p, eps, max_iter, tol, *outputs, workspace.data_ptr(), threads)
    return result


def _irls_cuda(
    rb: Tensor, ra: Tensor, adapters: int, k: int, p: float, eps: float, max_iter: int, tol: float
) -> IrlsResult:
    module = _native.module()
    layers, sb, columns = rb.shape
    sizes = (adapters, columns // adapters, sb, ra.shape[1], k)
    doubles = module.irls_cuda_workspace(*sizes)
    blocks = max(1, min(layers, WORKSPACE_BYTES // (8 * doubles)))
    result = _empty_result(rb, ra, adapters, k, max_iter)
    workspace = torch.empty(blocks, doubles, dtype=torch.float64, device=rb.device)
    addresses = _native.require_float64("rb", rb), _native.require_float64("ra", ra)
    outputs = (tensor.data_ptr() for tensor in result)
    with _native.guard(rb.device):
        queue = (blocks, _native.stream(rb.device))
        module.irls_cuda(*addresses, layers, *sizes, p, eps, max_iter, tol, *outputs, workspace.data_ptr(), *queue)
    return result
