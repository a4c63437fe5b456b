"""mine_subspace against the dense float64 definition, and its bounds."""

import pytest
import torch
from core.dense_definition import dense_mining
from tolerances import relative_error

from subspace_ext import mine_subspace
from subspace_ext.ops import irls as irls_module
from subspace_ext.ops.irls_ref import irls_ref
from subspace_ext.ops.irls_result import nonzero_median

RELATIVE = 1e-9  # the agreement with the dense definition that the op promises


def planted(adapters, out_size, in_size, rank, shared=None, noise=0.1, outliers=0):
    """Adapters with a common rank-`shared` part, noise, and the first `outliers` replaced by large unrelated ones."""
    shared = rank if shared is None else shared
    b = torch.zeros(adapters, out_size, rank, dtype=torch.float64)
    a = torch.zeros(adapters, rank, in_size, dtype=torch.float64)
    b[..., :shared] = torch.randn(out_size, shared, dtype=torch.float64)
    a[:, :shared] = torch.randn(shared, in_size, dtype=torch.float64)
    b += noise * torch.randn(b.shape, dtype=torch.float64)
    a += noise * torch.randn(a.shape, dtype=torch.float64)
    b[:outliers] = 4 * torch.randn(b[:outliers].shape, dtype=torch.float64)
    a[:outliers] = torch.randn(a[:outliers].shape, dtype=torch.float64)
    return b, a


def orthogonal_outlier():
    """The outlier lives in rows and columns of its own, so its directions stay exact singular vectors all along."""
    b, a = planted(8, 80, 72, 8, noise=0.05)
    b[:, 60:] = 0
    a[:, :, 56:] = 0
    b[0] = 0
    a[0] = 0
    b[0, 60:] = 9 * torch.randn(20, 8, dtype=torch.float64)
    a[0, :, 56:] = torch.randn(8, 16, dtype=torch.float64)
    return b, a


def collinear(distance, adapters=6, out_size=70, in_size=60, rank=4):
    """Every adapter is the first one up to a part `distance` times as large: the stack has condition 1 / distance."""
    b = torch.randn(out_size, rank, dtype=torch.float64).expand(adapters, -1, -1).clone()
    a = torch.randn(rank, in_size, dtype=torch.float64).expand(adapters, -1, -1).clone()
    b[1:] += distance * torch.randn(b[1:].shape, dtype=torch.float64)
    a[1:] += distance * torch.randn(a[1:].shape, dtype=torch.float64)
    return b, a


def norms_apart():
    """Twelve orders of magnitude between the smallest and the largest update."""
    b, a = planted(7, 60, 50, 4)
    return b * torch.logspace(-6, 6, 7, dtype=torch.float64)[:, None, None], a


CASES = {
    "identical_adapters": (lambda: collinear(0.0), 3),
    "condition_1e4": (lambda: collinear(1e-4), 4),
    "condition_1e7": (lambda: collinear(1e-7), 4),
    "condition_1e12": (lambda: collinear(1e-12), 4),
    "norms_apart_by_1e12": (norms_apart, 4),
    "planted": (lambda: planted(8, 90, 70, 8), 8),
    "wide": (lambda: planted(8, 70, 90, 8), 8),
    "outliers": (lambda: planted(8, 80, 72, 8, outliers=2), 8),
    "orthogonal_outlier": (orthogonal_outlier, 8),
    "no_shared_part": (lambda: planted(6, 64, 64, 8, shared=0, noise=1.0), 8),
    "rank_deficient": (lambda: planted(6, 50, 40, 8, shared=3, noise=0.0), 6),
    "k_below_the_shared_rank": (lambda: planted(8, 90, 70, 8), 3),
    "k_below_the_shared_rank_with_outliers": (lambda: planted(10, 90, 100, 8, noise=0.4, outliers=1), 2),
    "k_is_N_r": (lambda: planted(3, 40, 30, 4), 12),
    "one_adapter": (lambda: planted(1, 40, 30, 6), 4),
    "rank_one": (lambda: planted(7, 33, 57, 1), 3),
    "odd_sizes": (lambda: planted(5, 37, 23, 3, outliers=1), 5),
    "core_as_large_as_the_layer": (lambda: planted(10, 19, 13, 4), 4),
    "tiny": (lambda: (torch.full((2, 1, 1), 2.0).double(), torch.full((2, 1, 1), 3.0).double()), 1),
}


@pytest.mark.parametrize("p", [2.0, 1.0, 0.5])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_dense_definition(case, p):
    make, k = CASES[case]
    b, a = make()
    expected = dense_mining(b, a, k, p, 1e-3, 30, 1e-6)
    mined = mine_subspace(b, a, k, p=p, max_iter=30)
    assert int(mined.n_iter) == expected["n_iter"]
    assert relative_error(mined.weights, expected["weights"]) < RELATIVE
    assert relative_error(mined.objective[: expected["n_iter"] + 1], expected["objective"]) < RELATIVE
    assert mined.objective[expected["n_iter"] + 1 :].isnan().all()
    size = expected["norms"].max()
    assert (mined.residuals - expected["residuals"]).abs().max() < RELATIVE * size
    assert relative_error(mined.update(), expected["fit"]) < RELATIVE
    values, count = expected["singular_values"], mined.singular_values.numel()
    assert count == min(b.shape[0] * b.shape[2], b.shape[1], a.shape[2])
    assert (mined.singular_values - values[:count]).abs().max() < RELATIVE * values[0]
    if values[k - 1] > 1e-6 * values[0] and (k == values.numel() or values[k] < 0.999 * values[k - 1]):
        basis = torch.linalg.qr(mined.u).Q
        projector = expected["left"] @ expected["left"].t()
        assert relative_error(basis @ basis.t(), projector) < RELATIVE


@pytest.mark.parametrize("case", CASES)
def test_native_equals_the_reference_op(case):
    make, k = CASES[case]
    b, a = make()
    columns = b.shape[0] * b.shape[2]
    rb = torch.linalg.qr(b.transpose(0, 1).reshape(b.shape[1], columns)).R[None]
    ra = torch.linalg.qr(a.reshape(columns, a.shape[2]).t()).R[None]
    settings = (b.shape[0], k, 1.0, 1e-3, 30, 1e-6)
    ours, reference = irls_module.irls(rb, ra, *settings), irls_ref(rb, ra, *settings)
    for name in ("weights", "objective", "norms"):
        result, expected = getattr(ours, name).nan_to_num(), getattr(reference, name).nan_to_num()
        assert relative_error(result, expected) < RELATIVE, name
    assert relative_error(ours.u @ ours.v.mT, reference.u @ reference.v.mT) < RELATIVE
    assert torch.equal(ours.n_iter, reference.n_iter)
    assert torch.equal(ours.converged, reference.converged)


@pytest.mark.parametrize("p", [2.0, 1.5, 1.0, 0.5, 0.1])
@pytest.mark.parametrize("case", CASES)
def test_objective_never_increases(case, p):
    make, k = CASES[case]
    trace = mine_subspace(*make(), k, p=p, max_iter=40, tol=0.0).objective
    trace = trace[~trace.isnan()]
    assert (trace[1:] <= trace[:-1] * (1 + 1e-12)).all()


def test_outliers_lose_their_weight_and_the_subspace_is_found():
    b, a = planted(10, 90, 70, 4, noise=1e-3, outliers=2)
    mined = mine_subspace(b, a, 4)
    assert mined.weights[:2].max() < 0.1 * mined.weights[2:].min()
    truth, basis = torch.linalg.qr(b[5]).Q, torch.linalg.qr(mined.u).Q
    assert torch.linalg.svdvals(truth.t() @ basis).min() > 0.999


def test_factors_are_the_balanced_svd_of_the_weighted_mean():
    b, a = planted(5, 40, 30, 4)
    mined = mine_subspace(b, a, 4)
    mean = torch.einsum("n,noi->oi", mined.weights / mined.weights.sum(), b @ a)
    torch.testing.assert_close(mined.singular_values, torch.linalg.svdvals(mean)[:20], rtol=1e-10, atol=1e-10)
    leading = torch.diag(mined.singular_values[:4])
    torch.testing.assert_close(mined.u.t() @ mined.u, leading, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(mined.v.t() @ mined.v, leading, rtol=1e-9, atol=1e-9)
    assert (mined.u.gather(0, mined.u.abs().argmax(0, keepdim=True)) > 0).all()


def test_layers_are_independent_and_float32_is_kept():
    pairs = [planted(4, 30, 20, 3) for _ in range(3)]
    b = torch.stack([pair[0] for pair in pairs]).float()
    a = torch.stack([pair[1] for pair in pairs]).float()
    batched = mine_subspace(b, a, 3)
    assert batched.u.dtype == batched.v.dtype == torch.float32
    assert batched.weights.dtype == batched.singular_values.dtype == torch.float64
    for index in range(3):
        single = mine_subspace(b[index], a[index], 3)
        torch.testing.assert_close(batched.weights[index], single.weights, rtol=1e-12, atol=0)
        torch.testing.assert_close(batched.u[index], single.u)


def test_non_contiguous_input():
    b, a = planted(4, 30, 20, 3)
    strided_b = b.transpose(1, 2).contiguous().transpose(1, 2)
    strided_a = torch.cat([a, a], dim=2)[:, :, ::2]
    expected = mine_subspace(b, strided_a.contiguous(), 3)
    torch.testing.assert_close(mine_subspace(strided_b, strided_a, 3).u, expected.u, rtol=1e-9, atol=1e-12)


def test_scale_of_the_adapters_only_scales_the_result():
    b, a = planted(5, 30, 20, 3, outliers=1)
    plain, small = mine_subspace(b, a, 3), mine_subspace(b * 1e-60, a * 1e-60, 3)
    torch.testing.assert_close(small.update() * 1e120, plain.update(), rtol=1e-9, atol=1e-12)
    assert torch.equal(small.n_iter, plain.n_iter)


def test_zero_adapters():
    zeros = mine_subspace(torch.zeros(3, 10, 2), torch.zeros(3, 2, 8), 2)
    assert not zeros.u.any() and not zeros.v.any() and not zeros.residuals.any()
    assert torch.equal(zeros.weights, torch.ones(3, dtype=torch.float64))
    assert bool(zeros.converged)
    b, a = planted(5, 30, 20, 3)
    b[0] = 0
    mined = mine_subspace(b, a, 3)
    assert torch.isfinite(mined.u).all() and torch.isfinite(mined.weights).all()


@pytest.mark.parametrize("model", ["mean", "shared"])
def test_no_layers(model):
    mined = mine_subspace(torch.zeros(0, 3, 10, 2), torch.zeros(0, 3, 2, 8), 2, model=model)
    assert mined.u.shape == (0, 10, 2) and mined.n_iter.shape == (0,)


@pytest.mark.parametrize("native", [True, False])
def test_outputs_are_all_written(monkeypatch, native):
    """Every output starts as NaN, or its integer counterpart, and comes back finite; so does the workspace."""
    real_empty = torch.empty

    def poisoned(*size, **options):
        tensor = real_empty(*size, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(1)

    monkeypatch.setattr(irls_module.torch, "empty", poisoned)
    if not native:
        monkeypatch.setattr(irls_module._native, "available", lambda: False)
    b, a = planted(8, 60, 50, 8)
    mined = mine_subspace(torch.stack([b, b * 0]), torch.stack([a, a]), 8, max_iter=20)
    for name in ("u", "v", "singular_values", "weights", "residuals"):
        assert torch.isfinite(getattr(mined, name)).all(), name
    for layer in range(2):
        assert torch.isfinite(mined.objective[layer, : int(mined.n_iter[layer]) + 1]).all()


def test_number_of_threads_changes_nothing():
    b = torch.stack([planted(8, 80, 72, 8, outliers=layer % 3)[0] for layer in range(6)])
    a = torch.stack([planted(8, 80, 72, 8)[1] for _ in range(6)])
    rb = torch.linalg.qr(b.transpose(1, 2).reshape(6, 80, 64)).R
    ra = torch.linalg.qr(a.permute(0, 3, 1, 2).reshape(6, 72, 64)).R
    results = [irls_module.irls(rb, ra, 8, 8, 1.0, 1e-3, 15, 1e-6, threads=threads) for threads in (1, 2, 5)]
    for other in results[1:]:
        for name, field in results[0]._asdict().items():
            assert torch.equal(field.nan_to_num(), getattr(other, name).nan_to_num()), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 7}, r"k must be in 1\.\.min\(N r, out, in\) = 1\.\.6"),
        ({"k": 0}, "got 0"),
        ({"k": 2.0}, "k must be an integer, got 2.0"),
        ({"max_iter": 2.5}, "max_iter must be an integer, got 2.5"),
        ({"p": 0.0}, r"p must be in \(0, 2\], got 0"),
        ({"p": 2.5}, r"p must be in \(0, 2\], got 2.5"),
        ({"p": float("nan")}, "p must be"),
        ({"eps": 0.0}, "eps must be positive"),
        ({"max_iter": -1}, "max_iter must be 0 or more, got -1"),
        ({"lora_a": torch.ones(3, 3, 8)}, "lora_a must be"),
        ({"lora_a": torch.ones(2, 8)}, "lora_b and lora_a must be"),
        ({"lora_b": torch.ones(3, 10, 2, dtype=torch.float16)}, "float32 or torch.float64, got torch.float16"),
        ({"lora_a": torch.ones(3, 2, 8, dtype=torch.float64)}, "dtype and device of lora_b"),
        (
            {"lora_b": torch.full((3, 10, 2), float("nan"))},
            "lora_b must be finite, got NaN or Inf in layer 0, adapter 0",
        ),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"lora_b": torch.ones(3, 10, 2), "lora_a": torch.ones(3, 2, 8), "k": 2} | change
    with pytest.raises(ValueError, match=message):
        mine_subspace(**arguments)


def test_the_bad_adapter_is_named():
    a = torch.ones(4, 3, 2, 8)
    a[2, 1, 0, 5] = float("inf")
    with pytest.raises(ValueError, match="lora_a must be finite, got NaN or Inf in layer 2, adapter 1"):
        mine_subspace(torch.ones(4, 3, 10, 2), a, 2)


def test_the_median_is_that_of_the_positive_norms():
    norms = torch.tensor([[0.0, 3.0, 1.0, 2.0], [4.0, 0.0, 1.0, 0.0], [0.0, 0.0, 7.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert nonzero_median(norms).tolist() == [2.0, 2.5, 7.0, 1.0]
    assert [nonzero_median(row).item() for row in norms] == [2.0, 2.5, 7.0, 1.0]
