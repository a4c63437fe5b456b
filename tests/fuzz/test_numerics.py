"""Mining of hostile numbers: native code and reference give the result that is documented, or the same named error."""

from __future__ import annotations

import pytest
import torch
from core.dense_definition import dense_mining
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerances import relative_error

from subspace_ext import combine_subspaces, disentanglement, mine_subspace
from subspace_ext.ops import irls as irls_module
from subspace_ext.ops.irls_result import Model

DOUBLE = torch.float64
RELATIVE = 1e-9  # as promised for mining
LARGEST = torch.finfo(torch.float32).max


@pytest.fixture(params=["native", "reference"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "reference":
        monkeypatch.setattr(irls_module._native, "available", lambda: False)
    return request.param


def pair(adapters: int = 4, out: int = 14, in_: int = 12, rank: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(adapters, out, rank, dtype=DOUBLE), torch.randn(adapters, rank, in_, dtype=DOUBLE)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["lora_b", "lora_a"])
def test_what_is_not_finite_is_named(route: str, name: str, value: float) -> None:
    factors = dict(zip(("lora_b", "lora_a"), pair()))
    factors[name][2, 1, 0] = value
    with pytest.raises(ValueError, match=f"{name} must be finite, got NaN or Inf in layer 0, adapter 2"):
        mine_subspace(**factors, k=2)


@pytest.mark.parametrize("scale", [1e-150, 1e-80, 1e-40, 1e40, 1e80, 1e145])
def test_scale_changes_the_scale_alone(route: str, scale: float) -> None:
    b, a = pair()
    plain, scaled = mine_subspace(b, a, 2), mine_subspace(b * scale, a * scale, 2)
    assert int(scaled.n_iter) == int(plain.n_iter)
    assert relative_error(scaled.u / scale, plain.u) < RELATIVE
    assert relative_error(scaled.v / scale, plain.v) < RELATIVE
    assert relative_error(scaled.weights / scaled.weights.sum(), plain.weights / plain.weights.sum()) < RELATIVE


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_beyond_float64_is_a_named_error_or_a_zero_update(route: str, scale: float) -> None:
    b, a = pair()
    if scale > 1:
        with pytest.raises(ValueError, match=r"product below about 1e\+300.*layer 0"):
            mine_subspace(b * scale, a * scale, 2)
    else:
        # the products themselves are zero in float64
        mined = mine_subspace(b * scale, a * scale, 2)
        assert not mined.u.any() and torch.equal(mined.weights, torch.ones(4, dtype=DOUBLE))


def test_denormal_float32_factors(route: str) -> None:
    b, a = pair()
    tiny = (b * 1e-39).float()
    assert tiny.abs().max() < torch.finfo(torch.float32).tiny
    expected = dense_mining(tiny.double() * 2.0**130, a.float().double(), 2, 1.0, 1e-3, 50, 1e-6)["fit"]
    mined = mine_subspace(tiny.double(), a.float().double(), 2)
    assert relative_error(mined.update() * 2.0**130, expected) < RELATIVE
    assert torch.isfinite(mine_subspace(tiny, a.float(), 2).u).all()


def test_largest_float32_factors(route: str) -> None:
    b, a = (factor.clamp(-1, 1).float() * LARGEST for factor in pair())
    mined = mine_subspace(b, a, 2)
    assert torch.isfinite(mined.weights).all() and mined.singular_values[0] > 1e76


@pytest.mark.parametrize("apart", [1e6, 1e12])
def test_norms_apart(route: str, apart: float) -> None:
    b, a = pair(5)
    b = b * torch.logspace(0, 1, 5, base=apart, dtype=DOUBLE)[:, None, None]
    mined, dense = mine_subspace(b, a, 2, max_iter=20), dense_mining(b, a, 2, 1.0, 1e-3, 20, 1e-6)
    assert relative_error(mined.update(), dense["fit"]) < RELATIVE
    assert relative_error(mined.weights, dense["weights"]) < RELATIVE


@pytest.mark.parametrize("model", ["mean", "shared"])
@pytest.mark.parametrize("larger", [1e140, 1e149, 1e152, 1e160])
def test_one_adapter_far_larger_than_the_rest(route: str, model: Model, larger: float) -> None:
    """Up to 1e150 times the median the result is that of the definition; beyond it there is an error that says so."""
    b, a = pair(5)
    b = b / torch.linalg.matrix_norm(b @ a)[:, None, None]
    b[2] *= larger
    if larger > 1e150:
        with pytest.raises(ValueError, match=r"no update of more than 1e\+150 times the median norm .*in layer 0"):
            mine_subspace(b, a, 2, model=model)
        return
    mined = mine_subspace(b, a, 2, model=model, max_iter=5)
    for name in ("u", "v", "weights", "residuals", "norms", "singular_values", "cores"):
        assert torch.isfinite(getattr(mined, name)).all(), name
    assert relative_error(mined.norms[2], torch.linalg.matrix_norm(b[2] / larger @ a[2]) * larger) < RELATIVE
    trace = mined.objective[~mined.objective.isnan()]
    # the rounding of the large update is all that is left of the objective
    assert torch.isfinite(trace).all() and (trace[1:] <= trace[:-1] + 1e-12 * trace[0]).all()


def test_zero_identical_and_single_adapters(route: str) -> None:
    b, a = pair()
    assert not mine_subspace(b * 0, a, 2).update().any()
    b[1] = 0
    with_zero = mine_subspace(b, a, 2)
    assert torch.isfinite(with_zero.weights).all() and with_zero.weights[1] > 0
    same = mine_subspace(b[:1].expand(4, -1, -1), a[:1].expand(4, -1, -1), 2)
    single = mine_subspace(b[:1], a[:1], 2)
    for mined in (same, single):
        assert relative_error(mined.update(), b[0] @ a[0]) < RELATIVE
        assert bool(mined.converged) and (mined.residuals < RELATIVE * single.singular_values[0]).all()


def test_rank_deficient_stack_and_k_of_the_full_size(route: str) -> None:
    b, a = pair(3, 5, 7, 4)
    b[..., 1:] = 0  # each update has rank 1, the mean at most 3
    mined = mine_subspace(b, a, 5)
    assert (mined.singular_values[3:] == 0).all() and not mined.u[:, 3:].any() and not mined.v[:, 3:].any()
    full = mine_subspace(*pair(3, 5, 7, 4), 5)  # k = min(out, in)
    mean = full.weights / full.weights.sum()
    assert full.u.shape == (5, 5) and torch.isfinite(mean).all()
    with pytest.raises(ValueError, match=r"1\.\.5 .*got 6"):
        mine_subspace(b, a, 6)


@pytest.mark.parametrize("route_name", ["native", "reference"])
def test_any_finite_numbers(route_name: str, fuzz_cases: int, count_case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finite results within their documented bounds, or the named error."""
    if route_name == "reference":
        monkeypatch.setattr(irls_module._native, "available", lambda: False)
    numbers = st.floats(allow_nan=True, allow_infinity=True) | st.sampled_from((0.0, 1.0, 1e-310, 1e150, -1e-150))

    @settings(max_examples=fuzz_cases, derandomize=True, database=None, deadline=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.lists(numbers, min_size=20, max_size=20), st.integers(1, 3), st.sampled_from((0.5, 1.0, 2.0)))
    def attack(values: list[float], k: int, p: float) -> None:
        b = torch.tensor(values[:12], dtype=DOUBLE).reshape(2, 3, 2)
        a = torch.tensor(values[12:] * 2, dtype=DOUBLE)[:16].reshape(2, 2, 4)
        try:
            mined = mine_subspace(b, a, k, p=p, max_iter=10)
        except ValueError as error:
            assert "finite" in str(error) or "float64" in str(error)
            count_case("refused by name")
            return
        count_case("read")
        for name in ("u", "v", "singular_values", "weights", "residuals"):
            assert torch.isfinite(getattr(mined, name)).all(), name
        assert (mined.singular_values >= 0).all() and (mined.singular_values.diff() <= 0).all()

    attack()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_hostile_bases(value: float) -> None:
    factor = torch.full((6, 2), value)
    with pytest.raises(ValueError, match=r"finite|at least one direction"):
        combine_subspaces([(factor, torch.ones(5, 2))])
    with pytest.raises(ValueError, match=r"finite|at least one direction"):
        disentanglement(factor, torch.ones(6, 2))
