"""Umeyama's similarity and the depth scale: planted answers, SciPy, evo, reflections, degenerate input."""

from __future__ import annotations

import numpy as np
import pytest
from evo.core.geometry import umeyama_alignment
from scipy.spatial.transform import Rotation

from subspace3d.evaluation.alignment import Similarity, scale_alignment, umeyama


def random_similarity(rng: np.random.Generator) -> Similarity:
    return Similarity(float(rng.uniform(0.1, 10)), Rotation.random(None, rng).as_matrix(), rng.normal(size=3) * 5)


def assert_same(found: Similarity, wanted: Similarity, tolerance: float = 1e-10) -> None:
    assert found.scale == pytest.approx(wanted.scale, rel=tolerance)
    np.testing.assert_allclose(found.rotation, wanted.rotation, atol=tolerance)
    np.testing.assert_allclose(found.translation, wanted.translation, atol=tolerance * 10)


@pytest.mark.parametrize("count", [3, 4, 1000])
def test_umeyama_recovers_a_similarity(rng, count):
    wanted = random_similarity(rng)
    source = rng.normal(size=(count, 3)) + 3
    assert_same(umeyama(source, wanted.apply(source)), wanted)


def test_umeyama_recovers_a_similarity_of_a_plane(rng):
    wanted = random_similarity(rng)
    source = rng.normal(size=(50, 3)) * [1, 1, 0]
    assert_same(umeyama(source, wanted.apply(source)), wanted)


def test_umeyama_rotation_is_that_of_scipy(rng):
    source, target, weights = rng.normal(size=(40, 3)), rng.normal(size=(40, 3)), rng.uniform(size=40)
    found = umeyama(source, target, weights)
    share = weights / weights.sum()
    expected, _ = Rotation.align_vectors(target - share @ target, source - share @ source, weights)
    np.testing.assert_allclose(found.rotation, expected.as_matrix(), atol=1e-9)


@pytest.mark.parametrize("with_scale", [True, False])
@pytest.mark.parametrize("mirror", [1, -1])
def test_umeyama_is_that_of_evo(rng, with_scale, mirror):
    source = rng.normal(size=(40, 3))
    target = source * [1, 1, mirror] + 0.3 * rng.normal(size=(40, 3)) + 2
    rotation, translation, scale = umeyama_alignment(source.T, target.T, with_scale)
    assert_same(umeyama(source, target, with_scale=with_scale), Similarity(scale, rotation, translation))


def test_umeyama_by_hand():
    # a quarter turn about z, doubled, moved by (1, 0, 0)
    source = np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]])
    target = np.array([[1.0, 0, 0], [1, 2, 0], [-1, 0, 0]])
    quarter = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
    assert_same(umeyama(source, target), Similarity(2.0, quarter, np.array([1.0, 0, 0])))


def test_a_weight_of_zero_leaves_a_point_out(rng):
    source, target = rng.normal(size=(2, 10, 3))
    target[3] = 1e6
    weights = np.ones(10)
    weights[3] = 0
    kept = weights > 0
    assert_same(umeyama(source, target, weights), umeyama(source[kept], target[kept]), 1e-9)


def test_umeyama_is_the_minimum(rng):
    source, target, weights = rng.normal(size=(40, 3)), rng.normal(size=(40, 3)), rng.uniform(size=40)
    found = umeyama(source, target, weights)

    def cost(similarity: Similarity) -> float:
        return float(weights @ ((similarity.apply(source) - target) ** 2).sum(axis=1))

    best = cost(found)
    for axis in np.eye(3):
        turned = Rotation.from_rotvec(1e-3 * axis).as_matrix() @ found.rotation
        assert cost(Similarity(found.scale, turned, found.translation)) > best
        assert cost(Similarity(found.scale, found.rotation, found.translation + 1e-3 * axis)) > best
    for factor in (0.999, 1.001):
        assert cost(Similarity(found.scale * factor, found.rotation, found.translation)) > best


def test_umeyama_never_reflects(rng):
    source = rng.normal(size=(30, 3))
    found = umeyama(source, source * [1, 1, -1])
    assert np.linalg.det(found.rotation) == pytest.approx(1)


def test_umeyama_weights_are_repetitions(rng):
    source, target = rng.normal(size=(12, 3)), rng.normal(size=(12, 3))
    counts = rng.integers(0, 5, size=12)
    repeated = umeyama(np.repeat(source, counts, axis=0), np.repeat(target, counts, axis=0))
    assert_same(umeyama(source, target, counts.astype(float)), repeated)
    assert_same(umeyama(source, target, np.full(12, 7.0)), umeyama(source, target))


def test_umeyama_without_scale(rng):
    source = rng.normal(size=(30, 3))
    found = umeyama(source, 3 * source + 1, with_scale=False)
    assert_same(found, Similarity(1.0, np.eye(3), 2 * source.mean(axis=0) + 1))


LINE = np.arange(5.0)[:, None] * [1.0, 2.0, 3.0] + 100


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (np.zeros((2, 3)), np.zeros((2, 3)), "at least 3 points, got 2"),
        (np.ones((5, 3)), np.arange(15.0).reshape(5, 3), "span at least a plane"),
        (np.arange(15.0).reshape(5, 3) ** 2, np.ones((5, 3)), "span at least a plane"),
        (LINE, LINE, "span at least a plane"),
        (np.full((4, 3), np.nan), np.ones((4, 3)), "source must be finite, got 12"),
        (np.ones((4, 3)), np.full((4, 3), np.inf), "target must be finite, got 12"),
        (np.ones((4, 3)), np.ones((5, 3)), r"got \(4, 3\) and \(5, 3\)"),
        (np.ones((4, 2)), np.ones((4, 2)), r"\[n, 3\]"),
    ],
)
def test_umeyama_refuses_degenerate_input(source, target, message):
    with pytest.raises(ValueError, match=message):
        umeyama(source, target)


@pytest.mark.parametrize("weights", [np.zeros(5), np.full(5, -1.0), np.full(5, np.nan), np.ones(4)])
def test_umeyama_refuses_bad_weights(rng, weights):
    points = rng.normal(size=(5, 3))
    with pytest.raises(ValueError, match="weights must be"):
        umeyama(points, points, weights)


def test_similarities_compose_and_invert(rng):
    first, second, points = random_similarity(rng), random_similarity(rng), rng.normal(size=(7, 3))
    np.testing.assert_allclose(second.after(first).apply(points), second.apply(first.apply(points)), atol=1e-10)
    np.testing.assert_allclose(first.inverse().apply(first.apply(points)), points, atol=1e-12)


def test_scale_alignment_by_hand():
    # ratios 2, 2, 5 with weights 1/2, 1/2, 1/5: half of the weight 1.2 is reached at the second 2
    pred, true = np.array([1.0, 2.0, 1.0, 9.0]), np.array([2.0, 4.0, 5.0, 1.0])
    assert scale_alignment(pred, true, np.array([True, True, True, False])) == 2.0


def test_scale_alignment_has_the_least_abs_rel(rng):
    pred, true = rng.uniform(0.5, 4, size=(2, 5, 6)), rng.uniform(0.5, 4, size=(2, 5, 6))
    mask = rng.uniform(size=true.shape) < 0.8

    def abs_rel(scale: float) -> float:
        return float(np.mean(np.abs(scale * pred[mask] - true[mask]) / true[mask]))

    best = abs_rel(scale_alignment(pred, true, mask))
    # the cost is convex and piecewise linear: its minimum lies at one of the ratios
    assert best == pytest.approx(min(abs_rel(ratio) for ratio in true[mask] / pred[mask]), abs=1e-15)


@pytest.mark.parametrize(
    ("pred", "true", "mask", "message"),
    [
        (np.ones(3), np.ones(3), np.zeros(3, bool), "at least one pixel"),
        (np.ones(3), np.array([1.0, 0.0, 1.0]), np.ones(3, bool), "true must be positive"),
        (np.array([1.0, np.nan, 1.0]), np.ones(3), np.ones(3, bool), "pred must be finite"),
        (np.zeros(3), np.ones(3), np.ones(3, bool), "0 everywhere"),
        # the best scale of all real ones is -1, with an Abs Rel of 0
        (np.array([-1.0, -1.0, 1.0]), np.ones(3), np.ones(3, bool), "positive depth for the most part, got 2 of 3"),
        (np.ones(3), np.ones(4), np.ones(3, bool), "one shape"),
        (np.ones(3), np.ones(3), np.ones(3), "mask must be boolean"),
    ],
)
def test_scale_alignment_refuses(pred, true, mask, message):
    with pytest.raises(ValueError, match=message):
        scale_alignment(pred, true, mask)
