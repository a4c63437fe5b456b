"""Paired statistics against scipy and cases worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from experiments.paired import bca_interval, compare_pairs, holm, sign_flip_p, spearman

stats = pytest.importorskip("scipy.stats")
DRAWS = 200_000


@pytest.mark.parametrize("count", [6, 12, 30])
def test_the_bca_interval_is_scipys(count: int) -> None:
    values = np.random.default_rng(count).exponential(size=count) - 0.4
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=DRAWS, method="BCa", rng=np.random.default_rng(1)
    ).confidence_interval
    low, high = bca_interval(values, draws=DRAWS)
    # skew moves an end as far out as the 99.9 % quantile, where two sets of resamples differ by about a hundredth
    width = high - low
    assert low == pytest.approx(expected.low, abs=0.02 * width)
    assert high == pytest.approx(expected.high, abs=0.02 * width)


def test_equal_values_have_no_width() -> None:
    assert bca_interval([0.25] * 5) == (0.25, 0.25)
    # equal but for rounding
    assert bca_interval([0.1 + shift - shift for shift in (0.2, 0.3, 0.7)]) == pytest.approx((0.1, 0.1))


@pytest.mark.parametrize("count", [3, 6, 10])
def test_sign_flips_are_scipys_permutations(count: int) -> None:
    values = np.random.default_rng(count).normal(0.5, 1, count)
    expected = stats.permutation_test(
        (values, np.zeros(count)),
        lambda x, y, axis: np.mean(x - y, axis),
        permutation_type="samples",
        n_resamples=np.inf,
    )
    assert sign_flip_p(values) == pytest.approx(expected.pvalue)


def test_sign_flips_by_hand() -> None:
    # all of one sign: two of the 64 sign vectors are as far from zero
    assert sign_flip_p([1, 2, 3, 4, 5, 6]) == 2 / 64
    # |1 + 1 - 2| = 0: every vector is at least as far
    assert sign_flip_p([1, 1, -2]) == 1.0
    # sums of 3, 1, 1 by signs: 5 3 3 1 and their negatives; seen 3
    assert sign_flip_p([3, 1, -1]) == 6 / 8
    # many pairs are drawn; all positive is as rare as can be
    assert sign_flip_p([1.0] * 30) == pytest.approx(1 / 20_001)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_pairs() -> None:
    result = compare_pairs([3.0, 2.0, 4.0, 5.0], [1.0, 1.0, 1.0, 1.0])
    assert result.mean == 2.5 and result.p == 2 / 16 and result.count == 4
    assert result.low is not None and result.high is not None and 1 < result.low < 2.5 < result.high <= 4
    assert compare_pairs([1.0, 2.0], [0.0, 0.0]).low is None
    with pytest.raises(ValueError, match="equally many"):
        compare_pairs([1.0], [])
    with pytest.raises(ValueError, match="finite"):
        compare_pairs([math.nan], [0.0])


def test_the_rank_correlation_is_scipys() -> None:
    first, second = [1.0, 2.0, 2.0, 5.0, 4.0], [0.3, 0.1, 0.4, 0.9, 0.9]
    assert spearman(first, second) == pytest.approx(stats.spearmanr(first, second).statistic)
    assert spearman([1, 2, 3], [9, 8, 7]) == pytest.approx(-1)
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))
