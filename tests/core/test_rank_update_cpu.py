"""The CPU's kernel that makes effective weights: against its reference, many matrices in one call."""

import os

import pytest
import torch
from tolerances import assert_as_exact_as_torch

from subspace_ext import _native
from subspace_ext.ops.rank_update import HOST_PRODUCTS, HostLaunch, HostUpdate, fits_host
from subspace_ext.ops.rank_update_ref import rank_update_ref

SHAPES = [(1, 1, 1), (7, 5, 3), (96, 16, 16), (97, 33, 17), (200, 40, 48), (3, 250, 2), (5, 9, 0), (0, 4, 2), (4, 0, 2)]


@pytest.fixture(autouse=True)
def _built():
    if not _native.cpu_rank_updates():
        pytest.skip("subspace_ext._C is not built here")


def update(rows, columns, rank, scale=0.5) -> HostUpdate:
    """With a base and factors of larger strides, and a core that is transposed."""
    base, left, right = (
        torch.randn(size, width + 3)[:, :width] for size, width in ((rows, columns), (rows, rank), (columns, rank))
    )
    return HostUpdate(base, left, torch.randn(rank, rank).t(), right, scale)


def reference(of: HostUpdate, dtype, wide=torch.float32):
    base, left, mid, right = (tensor.to(wide) for tensor in of[:4])
    return rank_update_ref(base, left, mid, right, of.scale, dtype)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_matrices_in_one_call(dtype, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    updates = [update(*shape) for shape in SHAPES]
    launch = HostLaunch(updates, dtype)
    launch._threads = threads
    first = launch()
    kept = [result.clone() for result in first]
    for of, result in zip(updates, first):
        exact = reference(of, torch.float64, torch.float64)
        result = result.view(of.base.shape)
        assert_as_exact_as_torch(result, reference(of, dtype), exact, "w_eff", dtype)
        # each result is memory of its own, and every call gives the same bits
    for of in updates:
        of.mid.mul_(2.0)
    second = launch()
    assert all(torch.equal(result, before) for result, before in zip(first, kept))
    for of, result in zip(updates, second):
        exact = reference(of, torch.float64, torch.float64)
        assert_as_exact_as_torch(result.view(of.base.shape), reference(of, dtype), exact, "w_eff", dtype)


def test_bfloat16_is_rounded_to_nearest_even():
    values = torch.tensor([[1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-9, -(1 + 2**-8), 3.4e38, 0.0, -0.0, 1e-40]])
    values = torch.cat([values, torch.tensor([[float("nan"), float("inf"), -float("inf")]])], 1)
    values = torch.cat([values, torch.randn(1, 40)], 1)
    zero = HostUpdate(values, torch.zeros(1, 2), torch.zeros(2, 2), torch.zeros(values.shape[1], 2), 1.0)
    (result,) = HostLaunch([zero], torch.bfloat16)()
    assert torch.equal(result.isnan(), values[0].isnan())
    finite = ~values[0].isnan()
    assert torch.equal(result[finite].view(torch.int16) | 0, (values[0] + 0.0).bfloat16()[finite].view(torch.int16) | 0)


def test_what_fits():
    base, left, mid, right, _ = update(8, 8, 2)
    assert fits_host(base, left, mid, right, torch.bfloat16)
    assert not fits_host(base, left, mid, right, torch.float16)
    assert not fits_host(base.double(), left, mid, right, torch.float32)
    assert not fits_host(base, left, mid, right.t().contiguous().t(), torch.float32)
    large = torch.empty(1, device="meta").expand(2**15, HOST_PRODUCTS // 2**16 + 1)
    assert not fits_host(large, left, mid, right, torch.float32)


def test_what_is_refused():
    module = _native.module()
    with pytest.raises(ValueError, match="out must be float32 or bfloat16 on a CPU, got code 2"):
        module.rank_update_cpu(0, 0, 2, 1)
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        module.rank_update_cpu(0, 0, 0, 0)


@pytest.mark.skipif("ASAN_OPTIONS" in os.environ, reason="the sanitizer's operator new ends the process")
@pytest.mark.parametrize("threads", [1, 3])
def test_want_of_memory_in_any_thread_is_an_error(threads):
    launch = HostLaunch([update(300, 4, 2)], torch.float32)
    launch._threads = threads
    launch._table[:, 13] = 2**50  # the rank: more scratch than any machine has
    with pytest.raises(MemoryError):
        launch()
