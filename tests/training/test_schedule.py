from __future__ import annotations

import math

import pytest

from subspace3d.training.schedule import constant_rate, cooldown_rate, learning_rate


def test_ends_and_peak() -> None:
    rates = [learning_rate(step, 400, 1e-5, 0.05) for step in range(400)]
    assert rates[0] == pytest.approx(1e-8)
    assert rates[20] == max(rates) == pytest.approx(1e-5)
    assert rates[-1] == pytest.approx(1e-8)
    assert rates[10] == pytest.approx(1e-5 * (1e-3 + 0.999 / 2))


def test_rises_linearly_then_falls_as_a_cosine() -> None:
    rates = [learning_rate(step, 101, 1.0, 0.0) for step in range(101)]
    assert rates == sorted(rates, reverse=True)
    assert rates[25] == pytest.approx(1e-3 + 0.999 * (1 + math.cos(math.pi / 4)) / 2)


def test_shortest_runs() -> None:
    assert learning_rate(0, 1, 2.0, 0.0) == 2.0
    assert learning_rate(0, 2, 2.0, 0.9) == pytest.approx(2e-3)
    assert learning_rate(1, 2, 2.0, 0.9) == 2.0


@pytest.mark.parametrize("step", [-1, 10])
def test_outside_the_run(step: int) -> None:
    with pytest.raises(ValueError, match=r"step must be in \[0, 10\)"):
        learning_rate(step, 10, 1.0, 0.1)


def test_constant_rate_rises_and_stays() -> None:
    assert constant_rate(0, 2.0, 10) == pytest.approx(2e-3)
    assert constant_rate(5, 2.0, 10) == pytest.approx(2 * (1e-3 + 0.999 / 2))
    assert {constant_rate(step, 2.0, 10) for step in (10, 11, 10**9)} == {2.0}


def test_cooldown_falls_from_the_constant_rate_by_a_square_root() -> None:
    assert cooldown_rate(100, 100, 16, 2.0) == 2.0
    assert cooldown_rate(104, 100, 16, 2.0) == pytest.approx(1.0)
    assert cooldown_rate(115, 100, 16, 2.0) == pytest.approx(2 * (1 - math.sqrt(15 / 16)))
    for step in (99, 116):
        with pytest.raises(ValueError, match=r"step must be in \[100, 116\)"):
            cooldown_rate(step, 100, 16, 2.0)
