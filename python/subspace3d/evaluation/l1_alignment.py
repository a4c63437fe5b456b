"""The scale and shift of least absolute error, exactly: a convex problem in the scale alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from subspace3d.evaluation.alignment import Array, check_finite, check_weights

# Round-off of a cost summed over a million terms stays below this share of the cost without a fit.
_GAP = 1e-12
# The bracket is halved at least every third evaluation, so this many exhaust float64.
_MOST_EVALUATIONS = 200


@dataclass(frozen=True)
class ScaleShift:
    """``y = scale * x + shift``.

    Args:
        scale (float): may be zero or negative.
        shift (Array): float64 [D], in units of the target.
        cost (float): the weighted sum of absolute errors that is left.
        bound (float): no scale and shift cost less; at ``cost`` but for round-off.
    """

    scale: float
    shift: Array
    cost: float
    bound: float

    def apply(self, points: Array) -> Array:
        """``scale * points + shift``, points [..., D]."""
        return self.scale * points + self.shift


@dataclass(frozen=True)
class _Tangent:
    """Value and a subgradient of the cost at one scale, with the best shift there."""

    scale: float
    shift: Array
    cost: float
    slope: float

    def meet(self, other: _Tangent) -> tuple[float, float]:
        """Scale and cost where both tangents cross; their slopes have different signs."""
        ahead = other.cost - self.cost - other.slope * (other.scale - self.scale)
        step = ahead / (self.slope - other.slope)
        return self.scale + step, self.cost + self.slope * step


def align_scale_shift(source: Array, target: Array, weights: Array | None = None) -> ScaleShift:
    """``argmin_{s, t} sum_i w_i |s source_i + t - target_i|_1``, s one number, t in R^D: the global minimum.

    For a fixed s the best t is, coordinate by coordinate, the weighted median of ``target - s source``. What is left is
    convex and piecewise linear in s. Its minimum is bracketed and narrowed by tangents, whose crossing bounds it from
    below, until cost and bound differ by less than 1e-12 of the cost at s = 0. A source without any spread leaves s
    undetermined; s = 0 is then returned.

    Args:
        source (Array): [n, D].
        target (Array): [n, D]; row i corresponds to row i of ``source``.
        weights (Array | None): [n], not negative; None: all 1.

    Raises:
        ValueError: shapes differ or are not [n >= 1, D], a value is not finite, or a weight is negative or all are 0.
    """
    source, target = np.asarray(source, np.float64), np.asarray(target, np.float64)
    weights = None if weights is None else np.asarray(weights, np.float64)
    _check(source, target, weights)
    columns = [(np.ascontiguousarray(source[:, d]), np.ascontiguousarray(target[:, d])) for d in range(source.shape[1])]

    start = _tangent(columns, weights, 0.0)
    # without a target the cost at s = 1 is the spread of the source
    spread = _tangent([(x, -x) for x, _ in columns], weights, 0.0).cost
    # with a cost of 0 the target has no spread either, and both ends of the bracket would be s = 0
    if spread == 0 or start.slope == 0 or start.cost == 0:
        return ScaleShift(0.0, start.shift, start.cost, start.cost)
    # |s| spread - cost(0) <= cost(s), so no minimum lies further out; the margin is for round-off
    far = _tangent(columns, weights, -np.sign(start.slope) * 2.1 * start.cost / spread)
    low, high = (start, far) if start.slope < 0 else (far, start)
    best, bound = min(low, high, key=lambda tangent: tangent.cost), 0.0
    for turn in range(_MOST_EVALUATIONS):
        crossing, bound = low.meet(high)
        if best.cost - bound <= _GAP * start.cost:
            break
        secant = low.scale - low.slope * (high.scale - low.scale) / (high.slope - low.slope)
        scale = (secant, crossing, 0.5 * (low.scale + high.scale))[turn % 3]
        if not low.scale < scale < high.scale:
            scale = 0.5 * (low.scale + high.scale)
            if not low.scale < scale < high.scale:
                break
        middle = _tangent(columns, weights, scale)
        best = min(best, middle, key=lambda tangent: tangent.cost)
        if middle.slope == 0:
            bound = middle.cost
            break
        low, high = (middle, high) if middle.slope < 0 else (low, middle)
    return ScaleShift(float(best.scale), best.shift, best.cost, float(min(bound, best.cost)))


def _tangent(columns: list[tuple[Array, Array]], weights: Array | None, scale: float) -> _Tangent:
    """``min_t sum_i w_i |s x_i + t - y_i|_1`` over all columns (x, y), each [n]."""
    shift = np.empty(len(columns))
    cost = slope = 0.0
    for index, (x, y) in enumerate(columns):
        residual = y - scale * x
        shift[index], signs = _median(residual, weights)
        # the signs sum to zero, so the median drops out
        cost += float(signs @ (residual - shift[index]))
        slope -= float(signs @ x)
    return _Tangent(scale, shift, cost, slope)


def _median(values: Array, weights: Array | None) -> tuple[float, Array]:
    """Weighted median m [scalar] and ``w_i sign(values_i - m)`` [n], chosen at m so that they sum to zero."""
    if weights is None:
        middle = len(values) // 2
        order = np.argpartition(values, middle)
        signs = np.ones(len(values))
    else:
        order = np.argsort(values)
        cumulative = np.cumsum(weights[order])
        middle = int(np.searchsorted(cumulative, 0.5 * cumulative[-1]))
        signs = weights.copy()
    below, at = order[:middle], order[middle]
    signs[below] *= -1
    signs[at] = 0
    signs[at] = -signs.sum()
    return float(values[at]), signs


def _check(source: Array, target: Array, weights: Array | None) -> None:
    if source.ndim != 2 or source.shape != target.shape or source.size == 0:
        raise ValueError(f"source and target must both be [n >= 1, D], got {source.shape} and {target.shape}")
    check_finite("source", source)
    check_finite("target", target)
    if weights is not None:
        check_weights(weights, len(source))
