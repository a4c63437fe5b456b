"""model="shared" against its dense float64 definition, and on adapters whose shared subspace is known."""

import pytest
import torch
from core.dense_definition import dense_shared
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
