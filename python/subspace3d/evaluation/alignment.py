"""Alignment of a prediction with the truth: Umeyama's similarity for points, one scale for depth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# A second singular value below this share of the first leaves the rotation about the common line undetermined;
# float64 round-off of exactly collinear points stays several orders below it.
_RANK_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Similarity:
    """``y = scale * rotation @ x + translation``.

    Args:
        scale (float): positive.
        rotation (Array): float64 [3, 3], determinant +1.
        translation (Array): float64 [3], in units of the target.
    """

    scale: float
    rotation: Array
    translation: Array

    def apply(self, points: Array) -> Array:
        """``scale * points @ rotation^T + translation``, points [..., 3]."""
        return points @ (self.scale * self.rotation).T + self.translation

    def after(self, first: Similarity) -> Similarity:
        """The similarity that applies ``first`` and then this one."""
        return Similarity(
            self.scale * first.scale,
            self.rotation @ first.rotation,
            self.scale * self.rotation @ first.translation + self.translation,
        )

    def inverse(self) -> Similarity:
        return Similarity(1.0 / self.scale, self.rotation.T, -(self.rotation.T @ self.translation) / self.scale)


def umeyama(source: Array, target: Array, weights: Array | None = None, with_scale: bool = True) -> Similarity:
    """``argmin_{c, R, t} sum_i w_i |target_i - (c R source_i + t)|^2``, R a rotation (never a reflection).

    With weighted means mu and ``Sigma = sum w (y - mu_y)(x - mu_x)^T / sum w = U D V^T``:
    ``S = diag(1, 1, sign(det U det V))``, ``R = U S V^T``, ``c = tr(D S) / var_x``, ``t = mu_y - c R mu_x``
    (Umeyama 1991, with weights as in Wahba's problem). All in float64.

    Args:
        source (Array): [n, 3], the prediction.
        target (Array): [n, 3], the truth; row i corresponds to row i of ``source``.
        weights (Array | None): [n], not negative; None: all equal.
        with_scale (bool): False fixes c = 1.

    Returns:
        Similarity: maps ``source`` onto ``target``.

    Raises:
        ValueError: shapes differ or are not [n, 3]; fewer than 3 points; a value is not finite; a weight is
            negative or all are zero; the points lie on one line or in one point, so that R is not determined.
    """
    source, target = np.asarray(source, np.float64), np.asarray(target, np.float64)
    _check_points(source, target)
    weights = np.ones(len(source)) if weights is None else np.asarray(weights, np.float64)
    check_weights(weights, len(source))
    share = weights / weights.sum()

    mean_source, mean_target = share @ source, share @ target
    centred_source, centred_target = source - mean_source, target - mean_target
    variance = float(share @ np.einsum("ij,ij->i", centred_source, centred_source))
    covariance = (centred_target * share[:, None]).T @ centred_source
    left, values, right_t = np.linalg.svd(covariance)
    if variance <= 0 or values[1] <= _RANK_TOLERANCE * values[0]:
        raise ValueError(
            "source and target must span at least a plane, "
            f"got variance {variance:.3g} of source and singular values {values.tolist()} of the cross-covariance"
        )
    # the product is +-1; taken of the factors because det(covariance) is 0 for planar points
    handedness = np.array([1.0, 1.0, np.sign(np.linalg.det(left) * np.linalg.det(right_t))])
    rotation = (left * handedness) @ right_t
    scale = float(values @ handedness) / variance if with_scale else 1.0
    if scale <= 0:
        raise ValueError(f"source must not be a mirror image of target along every axis, got scale {scale:.3g}")
    return Similarity(scale, rotation, mean_target - scale * rotation @ mean_source)


def scale_alignment(pred: Array, true: Array, mask: NDArray[np.bool_]) -> float:
    """``argmin_{s > 0} sum_mask |s pred - true| / true``: the scale with the least Abs Rel, found exactly.

    The sum equals ``sum w |s - r|`` with ``r = true / pred`` and ``w = |pred| / true``, which a weighted median of r
    minimises. One scale is fitted to all pixels given, so pass a whole sequence to get one scale per sequence.

    Args:
        pred (Array): predicted depth, any shape and unit.
        true (Array): true depth, same shape, positive where ``mask`` holds.
        mask (NDArray[np.bool_]): same shape, pixels that count.

    Returns:
        float: s, true units per predicted unit.

    Raises:
        ValueError: shapes differ, the mask is empty, a masked value is not finite, a masked true depth is not
            positive, every masked prediction is 0, or so much of it lies behind the cameras that no positive scale is
            the best.
    """
    predicted, truth = masked_depths(pred, true, mask)
    used = predicted != 0
    if not used.any():
        raise ValueError(f"pred must not be 0 everywhere, got {predicted.size} zeros")
    predicted, truth = predicted[used], truth[used]
    ratio, weight = truth / predicted, np.abs(predicted) / truth
    order = np.argsort(ratio)
    cumulative = np.cumsum(weight[order])
    scale = float(ratio[order[np.searchsorted(cumulative, 0.5 * cumulative[-1])]])
    if scale <= 0:
        behind = np.count_nonzero(predicted < 0)
        raise ValueError(f"pred must be positive depth for the most part, got {behind} of {used.size} values below 0")
    return scale


def masked_depths(pred: Array, true: Array, mask: NDArray[np.bool_]) -> tuple[Array, Array]:
    """``pred[mask], true[mask]`` as float64 [n], checked.

    Raises:
        ValueError: as `scale_alignment`.
    """
    pred, true, mask = np.asarray(pred), np.asarray(true), np.asarray(mask)
    if not pred.shape == true.shape == mask.shape:
        raise ValueError(f"pred, true and mask must have one shape, got {pred.shape}, {true.shape}, {mask.shape}")
    if mask.dtype != np.bool_:
        raise ValueError(f"mask must be boolean, got {mask.dtype}")
    if not mask.any():
        raise ValueError(f"mask must hold at least one pixel, got none of {mask.size}")
    predicted, truth = pred[mask].astype(np.float64), true[mask].astype(np.float64)
    for name, value in (("pred", predicted), ("true", truth)):
        bad = int(np.count_nonzero(~np.isfinite(value)))
        if bad:
            raise ValueError(f"{name} must be finite where mask holds, got {bad} of {value.size} values that are not")
    if truth.min() <= 0:
        raise ValueError(f"true must be positive where mask holds, got {truth.min():.6g}")
    return predicted, truth


def _check_points(source: Array, target: Array) -> None:
    if source.ndim != 2 or source.shape[1] != 3 or source.shape != target.shape:
        raise ValueError(f"source and target must both be [n, 3], got {source.shape} and {target.shape}")
    if len(source) < 3:
        raise ValueError(f"source must have at least 3 points, got {len(source)}")
    check_finite("source", source)
    check_finite("target", target)


def check_finite(name: str, values: Array) -> None:
    """Raise ValueError, naming ``name``, unless all ``values`` are finite."""
    bad = int(np.count_nonzero(~np.isfinite(values)))
    if bad:
        raise ValueError(f"{name} must be finite, got {bad} of {values.size} values that are not")


def check_weights(weights: Array, count: int) -> None:
    """Raise ValueError unless ``weights`` are [count], finite, not negative and not all zero."""
    if weights.shape != (count,):
        raise ValueError(f"weights must be [{count}], got {weights.shape}")
    if not np.isfinite(weights).all() or weights.min() < 0 or weights.sum() <= 0:
        raise ValueError(
            "weights must be finite, not negative and not all zero, "
            f"got least {weights.min():.6g} and sum {weights.sum():.6g}"
        )
