"""`irls`: batched iteratively reweighted least squares in the core space of the stacked adapters."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from subspace_ext import _native
from subspace_ext.ops.irls_ref import irls_ref
from subspace_ext.ops.irls_result import UNCERTAIN, IrlsResult, Model

# The native loops hold all N cores of a layer per thread or block; with many and large cores, fewer of them run.
WORKSPACE_BYTES = 2**31

MODELS: tuple[Model, ...] = ("mean", "shared")
# struct IrlsJob in csrc/irls.h: twenty-five words of eight bytes.
_JOB = struct.Struct("=13Q9q3d")


def irls(
    rb: Tensor,
    ra: Tensor,
    adapters: int,
    k: int,
    p: float,
    eps: float,
    max_iter: int,
    tol: float,
    model: Model = "mean",
    threads: int | None = None,
) -> IrlsResult:
    """min over the fits of sum_n (e_l^2 + |rb_n ra_n^T - fit_n|_F^2)^(p/2) for each layer l.

    rb_n is the n-th block of r columns of rb[l], e_l = eps * median of the positive |rb_n ra_n^T|_F. Model "mean" has
    one fit u v^T for all n, "shared" has u c_n v^T with any c_n and brings every update to the median norm first. Runs
    the native loop of the device where the compiled module has one, otherwise the reference, and the reference for a
    layer whose decompositions the native loop could not certify.

    Args:
        rb: [L, sb, N*r] float64.
        ra: [L, sa, N*r] float64, on the device of rb.
        adapters: N.
        k: columns of u and v, at most min(sb, sa).
        p: exponent in (0, 2].
        eps: smoothing in units of the median norm.
        max_iter: re-weightings at most.
        tol: relative move at which to stop: of a normalised weight ("mean"), of an e_l^2 + residual^2 ("shared").
        model: "mean" or "shared".
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
    if model not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {model!r}")
    rb, ra = rb.contiguous(), ra.contiguous()
    settings = (adapters, k, p, eps, max_iter, tol, model)
    on_gpu = _native.runs_on(rb.device)
    if not rb.shape[0]:
        empty = _empty(rb, ra, adapters, k, max_iter)
        return empty._replace(converged=empty.converged.bool())
    if not on_gpu and not (_native.available() and rb.device.type == "cpu"):
        return irls_ref(rb, ra, *settings)
    result = _irls_native(rb, ra, *settings, on_gpu, threads)
    doubtful = result.status == UNCERTAIN
    if doubtful.any():
        again = irls_ref(rb[doubtful], ra[doubtful], *settings)
        for field, replacement in zip(result, again):
            field[doubtful] = replacement.to(field.dtype)
    return result


def _empty(rb: Tensor, ra: Tensor, adapters: int, k: int, max_iter: int) -> IrlsResult:
    layers, sb, sa = rb.shape[0], rb.shape[1], ra.shape[1]
    sizes = ((sb, k), (sa, k), (adapters,), (adapters,), (adapters,), (max_iter + 1,))
    floats = [torch.empty(layers, *size, dtype=torch.float64, device=rb.device) for size in sizes]
    integers = [torch.empty(layers, dtype=torch.int64, device=rb.device) for _ in range(3)]
    return IrlsResult(*floats, *integers)


def equal_norm_start(rb: Tensor, ra: Tensor, adapters: int, k: int) -> Tensor:
    """The leading k right singular vectors of the updates rb_n ra_n^T stacked below each other at equal norm.

    Columns where the rank ends are zero. rb_n = Q_n R_n gives the stack of R_n ra_n^T the same ones.

    Args:
        rb: [L, sb, N*r].
        ra: [L, sa, N*r].
        adapters: N.
        k: at most sa.

    Returns:
        [L, sa, k].
    """
    layers, columns = rb.shape[0], rb.shape[2]
    blocks_b = rb.reshape(layers, -1, adapters, columns // adapters).transpose(1, 2)
    blocks_a = ra.reshape(layers, -1, adapters, columns // adapters).transpose(1, 2)
    sides = []
    for blocks in (blocks_b, blocks_a):
        # shares of the largest entry: their products stay within the range of float64
        peaks = blocks.abs().amax(dim=(2, 3), keepdim=True)
        sides.append(blocks / torch.where(peaks > 0, peaks, 1.0))
    rows = torch.linalg.qr(sides[0], mode="r").R @ sides[1].mT
    norms = torch.linalg.matrix_norm(rows, keepdim=True)
    stacked = (rows / torch.where(norms > 0, norms, 1.0)).flatten(1, 2)
    _, values, right = torch.linalg.svd(stacked, full_matrices=False)
    negligible = max(stacked.shape[1:]) * torch.finfo(rb.dtype).eps * values[:, :1]
    start = (right * (values > negligible).unsqueeze(2)).mT[:, :, :k]
    return torch.nn.functional.pad(start, (0, k - start.shape[2])).contiguous()


def _irls_native(
    rb: Tensor,
    ra: Tensor,
    adapters: int,
    k: int,
    p: float,
    eps: float,
    max_iter: int,
    tol: float,
    model: Model,
    on_gpu: bool,
    threads: int | None,
) -> IrlsResult:
    module = _native.module()
    inputs = [_native.require_float64("rb", rb), _native.require_float64("ra", ra)]
    layers, sb, columns = rb.shape
    sizes = (layers, adapters, columns // adapters, sb, ra.shape[1], k, max_iter, MODELS.index(model))
    settings = (float(p), float(eps), float(tol))
    unplaced = _JOB.pack(*[0] * 13, 0, *sizes, *settings)
    doubles = module.irls_cuda_workspace(unplaced) if on_gpu else module.irls_workspace(unplaced)
    wanted = layers if on_gpu else torch.get_num_threads() if threads is None else threads
    workers = max(1, min(wanted, layers, WORKSPACE_BYTES // (8 * doubles)))
    start = equal_norm_start(rb, ra, adapters, k) if model == "shared" else rb
    result = _empty(rb, ra, adapters, k, max_iter)
    workspace = torch.empty(workers, doubles, dtype=torch.float64, device=rb.device)
    addresses = [*inputs, start.data_ptr(), *(tensor.data_ptr() for tensor in result), workspace.data_ptr()]
    job = _JOB.pack(*addresses, workers, *sizes, *settings)
    if on_gpu:
        with _native.guard(rb.device):
            module.irls_cuda(job, _native.stream(rb.device))
    else:
        module.irls(job)
    return result._replace(converged=result.converged.bool())
