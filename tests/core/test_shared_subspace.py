"""model="shared" against its dense float64 definition, and on adapters whose shared subspace is known."""

import pytest
import torch
from core.dense_definition import dense_shared
from core.planted_adapters import beside_unrelated, in_factors
from core.test_mining import CASES, RELATIVE
from tolerances import relative_error

from subspace_ext import mine_subspace
from subspace_ext.ops import irls as irls_module


def unit(matrix):
    lengths = matrix.norm(dim=-2, keepdim=True)
    return matrix / torch.where(lengths > 0, lengths, 1.0)


def projector(matrix):
    basis = unit(matrix)
    return basis @ basis.mT


@pytest.fixture(params=["native", "reference"])
def route(request, monkeypatch):
    if request.param == "reference":
        monkeypatch.setattr(irls_module._native, "available", lambda: False)
    return request.param


@pytest.mark.parametrize("p", [2.0, 1.0, 0.5])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_dense_definition(case, p, route):
    make, k = CASES[case]
    b, a = make()
    expected = dense_shared(b, a, k, p, 1e-3, 8, 1e-6)
    mined = mine_subspace(b, a, k, model="shared", p=p, max_iter=8)
    steps = expected["n_iter"]
    assert int(mined.n_iter) == steps
    assert relative_error(mined.objective[: steps + 1], expected["objective"]) < RELATIVE
    assert mined.objective[steps + 1 :].isnan().all()
    assert relative_error(mined.norms, expected["norms"]) < RELATIVE
    assert (mined.residuals - expected["residuals"]).abs().max() < RELATIVE * expected["norms"].max()
    assert relative_error(mined.weights, expected["weights"]) < RELATIVE
    assert relative_error(projector(mined.u), expected["u"] @ expected["u"].T) < RELATIVE
    assert relative_error(projector(mined.v), expected["v"] @ expected["v"].T) < RELATIVE
    fit = unit(mined.u) @ mined.cores @ unit(mined.v).mT
    residuals = (b @ a - fit).flatten(1).norm(dim=1)
    assert (residuals - expected["residuals"]).abs().max() < RELATIVE * expected["norms"].max()


@pytest.mark.parametrize("p", [2.0, 1.0, 0.5, 0.1])
@pytest.mark.parametrize("case", CASES)
def test_objective_never_increases(case, p):
    make, k = CASES[case]
    trace = mine_subspace(*make(), k, model="shared", p=p, max_iter=40, tol=0.0).objective
    trace = trace[~trace.isnan()]
    assert (trace[1:] <= trace[:-1] * (1 + 1e-12)).all()


# ---- planted --------------------------------------------------------------------------------------------------------


def overlap(found, truth):
    """Mean cos^2 of the principal angles."""
    return float((unit(found).T @ truth).square().sum() / truth.shape[1])


def at_the_median_norm(planted):
    delta = planted.b @ planted.a
    norms = delta.flatten(1).norm(dim=1)
    return delta * (norms.quantile(0.5) / norms)[:, None, None]


def held_out(planted, k, model, **settings):
    mined = mine_subspace(planted.b, planted.a, k, model=model, **settings)
    held = unit(mined.u).T @ planted.held_out @ unit(mined.v)
    return float(held.square().sum() / planted.held_out.square().sum())


@pytest.mark.parametrize("size", [64, 128])
def test_own_cores_beside_as_much_noise(size):
    planted = beside_unrelated(10, size, size // 16, own=True)
    mined = mine_subspace(planted.b, planted.a, size // 16, model="shared")
    assert overlap(mined.u, planted.u) > 0.95
    assert overlap(mined.v, planted.v) > 0.95
    mean = mine_subspace(planted.b, planted.a, size // 16)
    assert overlap(mean.u, planted.u) < 0.8  # what the model of one mean makes of them


def test_one_mean_loses_nothing():
    planted = beside_unrelated(10, 128, 8, own=False)
    best = held_out(planted, 8, "mean")
    assert held_out(planted, 8, "shared") > best - 0.01


@pytest.mark.parametrize("larger", [5.0, 20.0])
def test_unrelated_and_larger_adapters_are_left_aside(larger):
    clean = in_factors(9, 256, 16, own=True)
    best = max(held_out(clean, 16, model) for model in ("mean", "shared"))
    planted = in_factors(10, 256, 16, own=True, unrelated=3, larger=larger)
    shared = held_out(planted, 16, "shared")
    assert shared > best - 0.05
    assert shared > held_out(planted, 16, "mean")
    mined = mine_subspace(planted.b, planted.a, 16, model="shared")
    assert mined.weights[:3].max() < mined.weights[3:].min()


@pytest.mark.parametrize("unrelated", [0, 3])
def test_one_mean_among_unrelated_adapters(unrelated):
    planted = in_factors(10, 128, 8, own=False, unrelated=unrelated)
    assert held_out(planted, 8, "shared") > held_out(planted, 8, "mean") - 0.03


# ---- what is returned -----------------------------------------------------------------------------------------------


def test_columns_are_scaled_by_their_strength():
    planted = in_factors(6, 40, 4, own=True)
    mined = mine_subspace(planted.b, planted.a, 4, model="shared", tol=1e-10, max_iter=200)
    assert mined.converged
    strengths = torch.diag(mined.singular_values[:4])
    torch.testing.assert_close(mined.u.T @ mined.u, strengths, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(mined.v.T @ mined.v, torch.diag(mined.singular_values_v[:4]), rtol=1e-6, atol=1e-6)
    share = (mined.weights / mined.weights.sum())[:, None]
    delta = at_the_median_norm(planted)
    cores = unit(mined.u).T @ delta @ unit(mined.v)
    rows = (share * cores.square().sum(2)).sum(0).sqrt()
    columns = (share * cores.square().sum(1)).sum(0).sqrt()
    torch.testing.assert_close(rows, mined.singular_values[:4], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(columns, mined.singular_values_v[:4], rtol=1e-6, atol=1e-6)
    projected = (share[:, :, None].sqrt() * delta @ unit(mined.v)).permute(1, 0, 2).flatten(1)
    torch.testing.assert_close(mined.singular_values, torch.linalg.svdvals(projected)[:24], rtol=1e-9, atol=1e-9)
    for side in (mined.u, mined.v):
        assert (side.gather(0, side.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("model", ["mean", "shared"])
def test_cores_are_the_updates_in_the_subspace(model):
    planted = in_factors(5, 30, 3, own=True)
    mined = mine_subspace(planted.b, planted.a, 3, model=model)
    expected = unit(mined.u).T @ (planted.b @ planted.a) @ unit(mined.v)
    torch.testing.assert_close(mined.cores, expected, rtol=1e-9, atol=1e-9)
    mean = (mined.weights / mined.weights.sum())[:, None, None] * mined.cores
    torch.testing.assert_close(mined.update(), unit(mined.u) @ mean.sum(0) @ unit(mined.v).T)
    if model == "mean":
        torch.testing.assert_close(mined.update(), mined.u @ mined.v.T)


def test_p_two_is_tucker_without_weights():
    planted = in_factors(6, 30, 3, own=True, unrelated=1)
    mined = mine_subspace(planted.b, planted.a, 3, model="shared", p=2.0, tol=1e-12, max_iter=2000)
    assert mined.converged and torch.equal(mined.weights, torch.ones(6, dtype=torch.float64))
    u, v, delta = unit(mined.u), unit(mined.v), at_the_median_norm(planted)
    # at the optimum each side is the leading subspace for the other
    projected = torch.linalg.svd((delta @ v).permute(1, 0, 2).flatten(1)).U[:, :3]
    assert relative_error(projected @ projected.T, u @ u.T) < 1e-6
    projected = torch.linalg.svd((delta.mT @ u).permute(1, 0, 2).flatten(1)).U[:, :3]
    assert relative_error(projected @ projected.T, v @ v.T) < 1e-5


def test_zero_layers_and_adapters():
    planted = in_factors(4, 20, 2, own=True)
    b, a = torch.stack([planted.b, planted.b * 0]), torch.stack([planted.a, planted.a])
    b[0, 0] = 0
    mined = mine_subspace(b, a, 2, model="shared")
    assert not mined.u[1].any() and not mined.v[1].any() and not mined.cores[1].any()
    assert torch.equal(mined.weights[1], torch.ones(4, dtype=torch.float64)) and bool(mined.converged[1])
    alone = mine_subspace(planted.b[1:], planted.a[1:], 2, model="shared")
    assert relative_error(projector(mined.u[0]), projector(alone.u)) < RELATIVE
    assert mined.residuals[0, 0] == 0


@pytest.mark.parametrize("model", ["mean", "shared"])
def test_equal_singular_values(model, route):
    """All directions are as good; any of them may be taken, but they are orthonormal and the objective is that."""
    b = torch.eye(9, dtype=torch.float64).reshape(9, 3, 3).transpose(0, 1).contiguous()
    a = b.mT.contiguous()
    mined = mine_subspace(b, a, 7, model=model, p=2.0, max_iter=6, tol=0.0)
    basis = unit(mined.u)
    assert (basis.T @ basis - torch.eye(7, dtype=torch.float64)).abs().max() < 1e-14
    trace = mined.objective[~mined.objective.isnan()]
    expected = 2.0 if model == "shared" else 9 - 7 / 3
    assert (trace - 3 * (1e-3**2 * 3) - expected).abs().max() < 1e-12


def test_a_layer_that_is_not_certified_is_mined_by_the_reference(monkeypatch):
    planted = in_factors(4, 20, 2, own=True)
    b, a = planted.b.expand(3, -1, -1, -1), planted.a.expand(3, -1, -1, -1)
    expected = mine_subspace(b, a, 2, model="shared")
    native = irls_module._irls_native

    def doubtful(*arguments):
        result = native(*arguments)
        result.status[1] = irls_module.UNCERTAIN
        for field in result[:6]:
            field[1] = float("nan")
        return result

    monkeypatch.setattr(irls_module, "_irls_native", doubtful)
    mined = mine_subspace(b, a, 2, model="shared")
    assert relative_error(mined.u, expected.u) < RELATIVE
    assert relative_error(mined.weights, expected.weights) < RELATIVE
    assert torch.equal(mined.n_iter, expected.n_iter)


def test_unknown_model_is_named():
    with pytest.raises(ValueError, match="model must be one of mean, shared, got 'tucker'"):
        mine_subspace(torch.ones(3, 10, 2), torch.ones(3, 2, 8), 2, model="tucker")
