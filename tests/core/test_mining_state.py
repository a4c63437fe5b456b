"""MiningState: what is added later counts as what was there, and one adapter can be held out."""

import pytest
import torch
from core.planted_adapters import in_factors
from tolerances import relative_error

from subspace_ext import MiningState, mine_subspace

RELATIVE = 1e-9
MODELS = ("mean", "shared")


def random_adapters(layers, adapters, out_size, in_size, rank, dtype=torch.float64):
    shared_b, shared_a = torch.randn(layers, 1, out_size, rank), torch.randn(layers, 1, rank, in_size)
    b = shared_b + 0.5 * torch.randn(layers, adapters, out_size, rank)
    a = shared_a + 0.5 * torch.randn(layers, adapters, rank, in_size)
    return b.to(dtype), a.to(dtype)


def assert_same(mined, expected):
    assert torch.equal(mined.n_iter, expected.n_iter)
    for name in ("u", "v", "singular_values", "singular_values_v", "cores", "weights", "residuals", "norms"):
        assert relative_error(getattr(mined, name), getattr(expected, name)) < RELATIVE, name
    assert relative_error(mined.objective.nan_to_num(), expected.objective.nan_to_num()) < RELATIVE


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("out_size", "in_size"), [(50, 40), (40, 14), (13, 11)], ids=["tall", "one_side_fills_up", "both_full"]
)
def test_adding_adapters_equals_mining_all(model, out_size, in_size):
    b, a = random_adapters(3, 8, out_size, in_size, 3)
    state = MiningState.of(b[:, :3], a[:, :3]).extend(b[:, 3:7], a[:, 3:7]).extend(b[:, 7:], a[:, 7:])
    assert_same(state.mine(4, model=model, max_iter=8), mine_subspace(b, a, 4, model=model, max_iter=8))


@pytest.mark.parametrize("first", [2, 4])
@pytest.mark.parametrize("model", MODELS)
def test_adapters_of_another_rank(model, first):
    """Padded with zeros, on whichever side the smaller rank is."""
    b, a = random_adapters(2, 3, 40, 35, first)
    other_b, other_a = random_adapters(2, 4, 40, 35, 6 - first)
    pad = torch.nn.functional.pad
    whole_b = torch.cat([pad(b, (0, 4 - first)), pad(other_b, (0, first - 2))], 1)
    whole_a = torch.cat([pad(a, (0, 0, 0, 4 - first)), pad(other_a, (0, 0, 0, first - 2))], 1)
    state = MiningState.of(b, a).extend(other_b, other_a)
    assert torch.equal(state.lora_b, whole_b) and torch.equal(state.lora_a, whole_a)
    assert_same(state.mine(3, model=model, max_iter=6), mine_subspace(whole_b, whole_a, 3, model=model, max_iter=6))


def test_extending_leaves_the_state_as_it_was():
    b, a = random_adapters(1, 5, 30, 20, 2)
    state = MiningState.of(b[:, :3], a[:, :3])
    before = state.mine(2)
    state.extend(b[:, 3:], a[:, 3:])
    assert torch.equal(state.mine(2).u, before.u)


def test_one_layer_without_its_axis():
    b, a = random_adapters(1, 4, 20, 30, 2)
    state = MiningState.of(b[0, :2], a[0, :2]).extend(b[0, 2:], a[0, 2:])
    assert_same(state.mine(2), mine_subspace(b, a, 2))


def test_float32_is_kept():
    b, a = random_adapters(2, 4, 20, 30, 2, torch.float32)
    state = MiningState.of(b[:, :2], a[:, :2]).extend(b[:, 2:], a[:, 2:])
    assert state.lora_b.dtype == state.mine(2).u.dtype == torch.float32
    assert state.gram_b.dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_b": torch.ones(1, 2, 11, 2)}, r"the layers, out and in of the state, \(1, 10, 8\), got \(1, 11, 8\)"),
        ({"lora_b": torch.ones(2, 2, 10, 2), "lora_a": torch.ones(2, 2, 2, 8)}, r"got \(2, 10, 8\)"),
        (
            {"lora_b": torch.ones(1, 2, 10, 2).double(), "lora_a": torch.ones(1, 2, 2, 8).double()},
            r"dtype and device of the state, torch\.float32 on cpu, got torch\.float64 on cpu",
        ),
        ({"lora_a": torch.ones(1, 2, 3, 8)}, "lora_a must be"),
    ],
)
def test_what_does_not_belong_is_named(change, message):
    state = MiningState.of(torch.ones(1, 3, 10, 2), torch.ones(1, 3, 2, 8))
    with pytest.raises(ValueError, match=message):
        state.extend(**({"lora_b": torch.ones(1, 2, 10, 2), "lora_a": torch.ones(1, 2, 2, 8)} | change))


def test_the_bad_adapter_is_named():
    b, a = random_adapters(2, 4, 10, 8, 2)
    b[1, 3, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="lora_b must be finite, got NaN or Inf in layer 1, adapter 3"):
        MiningState.of(b[:, :2], a[:, :2]).extend(b[:, 2:], a[:, 2:]).mine(2)


@pytest.mark.parametrize("model", MODELS)
def test_held_out_is_mining_without_it(model):
    b, a = random_adapters(2, 4, 30, 26, 3)
    shares = MiningState.of(b, a).held_out(3, model=model, max_iter=5)
    for n in range(4):
        kept = [m for m in range(4) if m != n]
        mined = mine_subspace(b[:, kept], a[:, kept], 3, model=model, max_iter=5)
        sides = [side / side.norm(dim=1, keepdim=True) for side in (mined.u, mined.v)]
        delta = b[:, n] @ a[:, n]
        held = (sides[0].mT @ delta @ sides[1]).flatten(1).norm(dim=1) / delta.flatten(1).norm(dim=1)
        torch.testing.assert_close(shares[:, n], held.square(), rtol=1e-9, atol=0)


def test_held_out_energy_tells_the_models_apart():
    own, one = in_factors(8, 96, 6, own=True), in_factors(8, 96, 6, own=False)
    states = [MiningState.of(planted.b, planted.a) for planted in (own, one)]
    shares = [[float(state.held_out(6, model=model).mean()) for model in MODELS] for state in states]
    assert shares[0][1] > shares[0][0] + 0.1  # own cores: only "shared" finds the subspace
    assert shares[1][0] >= shares[1][1]  # one mean: "mean" has the edge


def test_held_out_of_zero_and_of_one_adapter():
    b, a = random_adapters(1, 4, 20, 15, 2)
    b[0, 1] = 0
    shares = MiningState.of(b, a).held_out(2, model="shared")
    assert shares[0, 1].isnan() and torch.isfinite(shares[0, [0, 2, 3]]).all()
    with pytest.raises(ValueError, match="at least two adapters to hold one out, got 1"):
        MiningState.of(b[:, :1], a[:, :1]).held_out(2)
    with pytest.raises(ValueError, match=r"k must be in 1\.\.min\(N r, out, in\) = 1\.\.6"):
        MiningState.of(b, a).held_out(7)
