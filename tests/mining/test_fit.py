"""What a basis holds of a gradient, against dense projections, planted directions and Monte Carlo."""

from __future__ import annotations

import pytest
import torch

from subspace3d.mining import fit
from subspace3d.mining.fit import MINED, OWN, PSV, RANDOM, Measured, add_up, inside, measure_module, random_share


def orthonormal(out: int, k: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(out, k, generator=generator, dtype=torch.float64))[0]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_energies_equal_dense_projections_at_every_size_and_any_scale_of_the_columns() -> None:
    g, u, v = normal(3, 11, 7), normal(11, 4, seed=1), normal(7, 4, seed=2)
    held = inside(g, u * torch.tensor([1.0, 5.0, 1e-3, 2.0]), v)
    for k in range(1, 5):
        p, q = (side[:, :k] @ torch.linalg.pinv(side[:, :k]) for side in (u, v))
        for part in range(3):
            dense = [(p @ g[part] @ q), (p @ g[part]), (g[part] @ q)]
            expected = torch.stack([matrix.square().sum() for matrix in dense])
            torch.testing.assert_close(held[part, :, k - 1], expected, rtol=1e-10, atol=1e-12)


def test_a_dependent_column_adds_nothing() -> None:
    g, u, v = normal(1, 9, 8), normal(9, 3, seed=1), normal(8, 3, seed=2)
    u[:, 2] = u[:, 0] - 2 * u[:, 1]
    held = inside(g, u, v)
    torch.testing.assert_close(held[0, 1, 2], held[0, 1, 1], rtol=1e-8, atol=0)


def test_the_random_share_is_the_mean_over_draws() -> None:
    g = normal(1, 12, 9)
    draws = torch.stack([inside(g, orthonormal(12, 5, 2 * i), orthonormal(9, 5, 2 * i + 1))[0] for i in range(600)])
    shares = draws / g.square().sum()
    expected = random_share(12, 9, 5)
    error = shares.std(0) / 600**0.5
    assert ((shares.mean(0) - expected).abs() < 4 * error).all()
    # in closed form at the last size
    torch.testing.assert_close(expected[:, -1], torch.tensor([25 / 108, 5 / 12, 5 / 9], dtype=torch.float64))


def planted(noise: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two parts with the same signal ``u diag(3, 2) v^T`` and noise of their own."""
    u, v = orthonormal(40, 2, 1), orthonormal(30, 2, 2)
    signal = u @ torch.diag(torch.tensor([3.0, 2.0], dtype=torch.float64)) @ v.T
    return signal + noise * normal(2, 40, 30, seed=5) / 1200**0.5, u, v


def test_planted_directions_are_held_and_the_oracle_is_measured_on_the_other_part() -> None:
    g, u, v = planted(noise=2.0)
    weight = normal(40, 30, seed=7)
    measured = measure_module(g, weight, (u, v))
    signal, whole = 13.0, float(g.square().sum())
    here = float(measured.held[MINED][:, 0, -1].sum())
    assert here == pytest.approx(2 * signal, rel=0.1)
    # directions of the part itself would hold more than the signal: the noise's own
    own = float(measured.held[OWN][:, 0, -1].sum())
    cheating = sum(float(torch.linalg.svdvals(part)[:2].square().sum()) for part in g)
    assert own < here < cheating and own > 0.8 * here
    assert float(measured.total.sum()) == pytest.approx(whole)
    top, _, right = torch.linalg.svd(weight)
    expected = sum(float((top[:, :2].T @ part @ right[:2].T).square().sum()) for part in g)
    assert float(measured.held[PSV][:, 0, -1].sum()) == pytest.approx(expected, rel=1e-5)
    assert fit.verdict(measured) == "fits" and fit.compare(measured, PSV) == "better"
    assert "more than the singular vectors of the weights" in fit.sentence(measured, "here")
    assert f"the basis holds {here / whole:.1%} of the gradient" in fit.sentence(measured, "here")


def test_directions_from_nowhere_do_not_fit() -> None:
    g, _, _ = planted(noise=0.1)
    # the weight has the gradient's directions, the basis is orthogonal to them
    u, v = (
        torch.linalg.svd(side, full_matrices=True)[0][:, 2:5] for side in (orthonormal(40, 2, 1), orthonormal(30, 2, 2))
    )
    measured = measure_module(g, g.sum(0), (u, v))
    assert fit.verdict(measured) == "chance"
    assert fit.compare(measured, PSV) == "worse"


def test_attributes_and_sizes_are_suggested_by_what_they_hold() -> None:
    u, v = orthonormal(20, 6, 1), orthonormal(18, 6, 2)
    sizes = torch.tensor([10.0, 8.0, 0.0, 0.0, 0.1, 0.0], dtype=torch.float64)
    g = (u * sizes) @ v.T
    pairs = {"texture": (u[:, :2], v[:, :2]), "camera": (u[:, 2:4], v[:, 2:4]), "lighting": (u[:, 4:], v[:, 4:])}
    measured = measure_module(torch.stack([g, g]), normal(20, 18), (u, v), pairs)
    whole = float(sizes.square().sum())
    share = fit.share(measured.alone["texture"], measured.total)
    assert share == pytest.approx(164 / whole)
    assert fit.share(measured.alone["camera"], measured.total) == pytest.approx(0.0, abs=1e-9)
    lost, cut = measured.without["texture"]
    assert float(lost[0]) == pytest.approx(0.01, rel=1e-6) and float(cut[0]) == pytest.approx(164.0)
    # k = 1: the first of each attribute, of which texture's holds 100
    assert {k: (round(float(e[0]), 6), K) for k, (e, K) in measured.by_k.items()} == {1: (100.01, 3), 2: (164.01, 6)}
    advice = fit.suggest(measured)
    assert (advice.K, advice.k, advice.attributes) == (2, 2, ["texture"])


def test_modules_add_up_and_narrow_ones_hold_no_more_than_they_can() -> None:
    one = measure_module(normal(2, 10, 9), normal(10, 9), (orthonormal(10, 4, 1), orthonormal(9, 4, 2)))
    two = measure_module(normal(2, 3, 2, seed=3), normal(3, 2), (orthonormal(3, 2, 1), orthonormal(2, 2, 2)))
    both = add_up([one, two])
    assert both.held[MINED].shape == (2, 3, 4)
    torch.testing.assert_close(both.total, one.total + two.total)
    for source in (MINED, RANDOM, PSV, OWN):
        torch.testing.assert_close(both.held[source][..., 0], one.held[source][..., 0] + two.held[source][..., 0])
        torch.testing.assert_close(both.held[source][..., 3], one.held[source][..., 3] + two.held[source][..., 1])


def test_no_gradient_is_said() -> None:
    measured = measure_module(torch.zeros(2, 5, 4), normal(5, 4), (orthonormal(5, 2, 1), orthonormal(4, 2, 2)))
    assert fit.share(measured.held[MINED], measured.total) is None
    assert "has no gradient" in fit.sentence(measured, "scenes")
    assert fit.stable_rank(torch.zeros(2, 5, 4)) is None
    assert fit.stable_rank(torch.eye(4)[None]) == pytest.approx(4.0)


def test_one_part_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two parts"):
        measure_module(normal(1, 5, 4), normal(5, 4), (orthonormal(5, 2, 1), orthonormal(4, 2, 2)))


def test_compare_needs_every_part() -> None:
    held = {MINED: torch.tensor([2.0, 1.0]), PSV: torch.tensor([1.0, 1.5]), RANDOM: torch.tensor([0.5, 0.5])}
    measured = Measured(torch.ones(2), {name: value[:, None, None].expand(2, 3, 1) for name, value in held.items()})
    assert fit.compare(measured, PSV) == "level" and fit.compare(measured, RANDOM) == "better"
    assert fit.verdict(measured) == "weak"
