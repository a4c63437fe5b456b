from __future__ import annotations

import math

import pytest

from subspace3d.training.schedule import learning_rate


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
