"""Statistics of paired differences: two rows that saw the same batches differ by what they are, not by the seed."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_EXACT = 16  # up to so many pairs every sign is tried
_DRAWS = 20_000
LEVEL = 0.95
ALPHA = 0.05
NORMAL = statistics.NormalDist()


@dataclass(frozen=True)
class Paired:
    """What the differences of pairs say.

    Attributes:
        mean: of the differences.
        low, high: ends of the BCa interval of the mean at `LEVEL`; None with fewer than three pairs.
        p: of `sign_flip_p`, two-sided.
        count: pairs.
    """

    mean: float
    low: float | None
    high: float | None
    p: float
    count: int


def compare_pairs(first: Sequence[float], second: Sequence[float]) -> Paired:
    """``first - second``, pair by pair.

    Raises:
        ValueError: not equally many values, none, or one that is not finite.
    """
    if len(first) != len(second) or not first:
        raise ValueError(
            f"first and second must have equally many values, at least one, got {len(first)}, {len(second)}"
        )
    differences = [a - b for a, b in zip(first, second)]
    if not np.isfinite(differences).all():
        raise ValueError(f"differences must be finite, got {differences}")
    low, high = bca_interval(differences) if len(differences) > 2 else (None, None)
    return Paired(statistics.fmean(differences), low, high, sign_flip_p(differences), len(differences))


def bca_interval(
    values: Sequence[float], level: float = LEVEL, draws: int = _DRAWS, seed: int = 0
) -> tuple[float, float]:
    """Bias-corrected and accelerated bootstrap interval of the mean (Efron 1987).

    The ends are the quantiles ``Phi(b + (b + z) / (1 - a (b + z)))`` of the means of ``draws`` resamples, with z the
    normal quantile of either end, b the normal quantile of the share of resamples below the mean, and a the
    acceleration ``sum (m - m_i)^3 / (6 (sum (m - m_i)^2)^1.5)`` over the means m_i without one value.

    Raises:
        ValueError: fewer than two values, or a level outside (0, 1).
    """
    sample = np.asarray(values, dtype=np.float64)
    if len(sample) < 2 or not 0 < level < 1:
        raise ValueError(f"values must be at least two and level in (0, 1), got {len(sample)} and {level}")
    mean = float(sample.mean())
    if np.ptp(sample) <= 1e-12 * np.abs(sample).max():  # equal but for rounding
        return mean, mean
    generator = np.random.default_rng(seed)
    means = np.sort(sample[generator.integers(len(sample), size=(draws, len(sample)))].mean(1))
    # ties count half, and no quantile is infinite
    below = (np.sum(means < mean) + np.sum(means <= mean)) / 2
    bias = NORMAL.inv_cdf(min(max(below / draws, 0.5 / draws), 1 - 0.5 / draws))
    left_out = (sample.sum() - sample) / (len(sample) - 1)
    spread = left_out.mean() - left_out
    acceleration = float((spread**3).sum() / (6 * ((spread**2).sum()) ** 1.5))
    ends = []
    for probability in ((1 - level) / 2, (1 + level) / 2):
        z = bias + NORMAL.inv_cdf(probability)
        ends.append(float(np.quantile(means, NORMAL.cdf(bias + z / (1 - acceleration * z)))))
    return ends[0], ends[1]


def sign_flip_p(differences: Sequence[float], draws: int = _DRAWS, seed: int = 0) -> float:
    """Two-sided p of the mean under random signs: the share of sign vectors whose ``|mean|`` is at least the one seen.

    Exact up to 16 pairs: the least it can be is ``2 / 2^n``, 0.03 with six pairs. Beyond, ``draws`` random vectors and
    the one seen.

    Raises:
        ValueError: no differences.
    """
    values = np.asarray(differences, dtype=np.float64)
    if not len(values):
        raise ValueError("differences must have at least one value, got none")
    seen = abs(values.sum())
    if len(values) <= _EXACT:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(values))))
        extra = 0
    else:
        signs = np.random.default_rng(seed).choice((1.0, -1.0), size=(draws, len(values)))
        extra = 1
    # sums in another order differ in their last bits
    hits = int((np.abs(signs @ values) >= seen * (1 - 1e-12)).sum())
    return (hits + extra) / (len(signs) + extra)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p: ``max over j <= i of min(1, (m - j) p_(j))`` in ascending order, j from 0.

    A claim is shown at level alpha, all claims together, where its adjusted p is at most alpha.
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Rank correlation, ties at their mean rank; NaN where one side is constant."""
    ranks = [_ranks(values) for values in (first, second)]
    if any(np.ptp(values) == 0 for values in ranks):
        return float("nan")
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    return np.array([(array < value).sum() + ((array == value).sum() + 1) / 2 for value in array])
