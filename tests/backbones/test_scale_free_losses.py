"""Losses up to scale and world: hand-worked cases, a dense float64 definition, gradients, and what changes nothing."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from subspace3d.backbones.losses import LossCounts
from subspace3d.backbones.point_maps import intrinsics_from_points, world_to_camera
from subspace3d.backbones.scale_free_losses import (
    angles,
    best_scale,
    camera_points,
    relative_poses,
    scale_free_loss,
)

SIDE = 11  # 121 pixels: above the 100 that make a scene count
FLOAT64 = 1e-12


def _batch(rng, scenes=2, frames=3, side=SIDE, dtype=torch.float64):
    depths = torch.from_numpy(rng.uniform(0.5, 2, (scenes, frames, side, side))).to(dtype)
    masks = torch.from_numpy(rng.uniform(size=depths.shape) < 0.95)
    rotations = Rotation.from_rotvec(rng.uniform(-0.5, 0.5, (scenes * frames, 3))).as_matrix()
    extrinsics = np.concatenate([rotations, rng.uniform(-1, 1, (scenes * frames, 3, 1))], -1)
    intrinsics = torch.tensor([[9.0, 0, side / 2], [0, 8.0, side / 2], [0, 0, 1]], dtype=dtype)
    return {
        "depths": depths,
        "point_masks": masks,
        "extrinsics": torch.from_numpy(extrinsics).reshape(scenes, frames, 3, 4).to(dtype),
        "intrinsics": intrinsics.expand(scenes, frames, 3, 3),
    }


def _perfect(batch):
    return camera_points(batch["depths"], batch["intrinsics"]), batch["extrinsics"]


def _loss(points, extrinsics, batch, weight=1.0):
    return scale_free_loss(points, extrinsics, batch, weight, LossCounts.of(batch))


def _moved(extrinsics, rotation, centre, scale):
    """The same cameras in a world that is turned, moved and scaled."""
    turned = extrinsics[..., :3] @ rotation.T
    return torch.cat([turned, scale * (extrinsics[..., 3:] - turned @ centre[:, None])], -1)


def test_a_world_and_a_unit_of_its_own_cost_nothing(rng):
    batch = _batch(rng)
    points, extrinsics = _perfect(batch)
    rotation = torch.from_numpy(Rotation.from_rotvec([0.3, -2.0, 1.0]).as_matrix())
    moved = _moved(extrinsics, rotation, torch.tensor([5.0, -3.0, 2.0]).double(), 3.7)
    for term in _loss(3.7 * points, moved, batch).values():
        assert float(term) == pytest.approx(0, abs=1e-9)


def test_camera_to_world_in_the_place_of_world_to_camera_costs(rng):
    batch = _batch(rng)
    points, extrinsics = _perfect(batch)
    terms = _loss(points, world_to_camera(extrinsics), batch)
    assert float(terms["rotation"]) > 0.1 and float(terms["translation"]) > 0.1 and float(terms["points"]) < FLOAT64


def test_by_hand():
    """Two cameras; the second one is turned by 0.1 rad about z and moved by (0.3, 0, 0) too far; one point is off."""
    batch = {
        "depths": torch.full((1, 2, SIDE, SIDE), 2.0),
        "point_masks": torch.ones(1, 2, SIDE, SIDE, dtype=torch.bool),
        "extrinsics": torch.eye(3, 4).repeat(1, 2, 1, 1),
        "intrinsics": torch.tensor([[10.0, 0, 5.5], [0, 10.0, 5.5], [0, 0, 1]]).expand(1, 2, 3, 3),
    }
    points, extrinsics = _perfect(batch)
    points, extrinsics = points / 4, extrinsics.clone()
    # scaled by 4 it is 0.6 + 0 + 1.2 off, a mean of 0.6, at depth 2: 0.3, of 242 points
    points[0, 1, 3, 4] += torch.tensor([0.15, 0.0, 0.3])
    cos, sin = math.cos(0.1), math.sin(0.1)
    extrinsics[0, 1, :, :3] = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])
    # in the unit of the points, a quarter of the true one
    extrinsics[0, 1, :, 3] = torch.tensor([0.075, 0.0, 0.0])
    terms = _loss(points, extrinsics, batch, weight=2.0)
    assert float(terms["points"]) == pytest.approx(0.3 / 242, rel=1e-5)
    assert float(terms["rotation"]) == pytest.approx(0.1, rel=1e-5)
    # camera 1 in camera 2: (0.3, 0, 0), mean 0.1; camera 2 in camera 1: -R^T (0.3, 0, 0), mean 0.1 (cos + sin)
    assert float(terms["translation"]) == pytest.approx((0.1 + 0.1 * (cos + sin)) / 2, rel=1e-5)
    expected = 0.3 / 242 + 2 * (0.1 + (0.1 + 0.1 * (cos + sin)) / 2)
    assert float(terms["loss"]) == pytest.approx(expected, rel=1e-5)


def _dense(points, extrinsics, batch, weight):
    """The definition with loops; the scale is tried at every ratio."""
    total, pixels = 0.0, int(batch["point_masks"].sum())
    frames = points.shape[1]
    pairs = sum(int(mask[0].sum()) > 100 for mask in batch["point_masks"]) * frames * (frames - 1)
    for scene in range(len(points)):
        mask = batch["point_masks"][scene]
        rays = torch.tensor(
            [[[(j + 0.5 - SIDE / 2) / 9, (i + 0.5 - SIDE / 2) / 8, 1.0] for j in range(SIDE)] for i in range(SIDE)],
            dtype=torch.float64,
        )
        q = (batch["depths"][scene][..., None] * rays)[mask]
        p = points[scene][mask]
        ratios = (q / p).flatten().detach()
        costs = [((s * p - q).abs().sum(-1) / q[:, 2]).sum().item() for s in ratios]
        s = ratios[int(np.argmin(costs))]
        total = total + ((s * p - q).abs().sum(-1) / q[:, 2]).sum() / 3 / pixels
        if int(mask[0].sum()) <= 100:
            continue
        for i, j in itertools.permutations(range(frames), 2):
            (ri, ti), (rj, tj) = ((extrinsics[scene, n, :, :3], extrinsics[scene, n, :, 3]) for n in (i, j))
            (ai, bi), (aj, bj) = (
                (batch["extrinsics"][scene, n, :, :3], batch["extrinsics"][scene, n, :, 3]) for n in (i, j)
            )
            cosine = (torch.trace((ri @ rj.T) @ (ai @ aj.T).T) - 1) / 2
            moved = s * (ti - ri @ rj.T @ tj) - (bi - ai @ aj.T @ bj)
            total = total + weight * (torch.acos(cosine) + moved.abs().sum() / 3) / pairs
    return total


def test_value_and_gradients_are_those_of_the_dense_definition(rng):
    batch = _batch(rng)
    # the first frame of the second scene has too few points for its poses to count
    batch["point_masks"][1, 0] &= torch.rand(SIDE, SIDE) < 0.5
    points, extrinsics = _perfect(batch)
    points = (0.7 * points + 0.1 * torch.randn_like(points)).requires_grad_()
    extrinsics = (extrinsics + 0.05 * torch.randn_like(extrinsics)).requires_grad_()
    # of what is no rotation the arc cosine and the arc tangent differ
    u, _, vh = torch.linalg.svd(extrinsics[..., :3])
    proper = torch.cat([u @ vh, extrinsics[..., 3:]], -1)
    ours = _loss(points, proper, batch, 3.0)["loss"]
    theirs = _dense(points, proper, batch, 3.0)
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-12)
    for mine, dense in zip(
        torch.autograd.grad(ours, (points, extrinsics), retain_graph=True),
        torch.autograd.grad(theirs, (points, extrinsics)),
    ):
        torch.testing.assert_close(mine, dense, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("count", [1, 2, 7, 50])
def test_the_scale_is_the_best_of_all(rng, count):
    p = torch.from_numpy(rng.standard_normal((count, 3)))
    q = torch.from_numpy(np.abs(rng.standard_normal((count, 3))) + 0.1)
    p[0, 0] = 0.0

    def cost(s):
        return float(((s * p - q).abs().sum(-1) / q[:, 2]).sum())

    found = float(best_scale(p, q))
    tried = [*np.linspace(1e-6, 5, 2001), *(float(r) for r in (q / p).flatten() if math.isfinite(r) and r > 0)]
    assert cost(found) <= min(map(cost, tried)) + 1e-9
    assert not best_scale(p.requires_grad_(), q).requires_grad


def test_without_points_the_scale_is_one():
    empty = torch.zeros(0, 3)
    assert float(best_scale(empty, empty)) == 1
    assert float(best_scale(torch.zeros(4, 3), torch.ones(4, 3))) == 1


def test_many_points_give_the_scale_of_evenly_spaced_ones():
    q = torch.rand(200_000, 3) + 0.5
    assert float(best_scale(q / 5, q)) == pytest.approx(5, rel=1e-5)


def test_angles_agree_with_scipy_and_have_finite_gradients(rng):
    vectors = rng.uniform(-2, 2, (20, 3))
    one = torch.from_numpy(Rotation.from_rotvec(vectors).as_matrix())
    other = torch.from_numpy(Rotation.from_rotvec(rng.uniform(-2, 2, (20, 3))).as_matrix())
    expected = (Rotation.from_matrix(one.numpy()) * Rotation.from_matrix(other.numpy()).inv()).magnitude()
    np.testing.assert_allclose(angles(one, other).numpy(), expected, atol=1e-9)
    for vector in ([0.0, 0, 0], [math.pi, 0, 0], [0, 0, 1e-9]):
        rotation = torch.from_numpy(Rotation.from_rotvec(vector).as_matrix()).requires_grad_()
        value = angles(rotation, torch.eye(3).double())
        (gradient,) = torch.autograd.grad(value, rotation)
        assert float(value.detach()) == pytest.approx(np.linalg.norm(vector), abs=1e-7)
        assert torch.isfinite(gradient).all()


def test_relative_poses_are_independent_of_the_world(rng):
    extrinsics = _batch(rng)["extrinsics"]
    rotation = torch.from_numpy(Rotation.from_rotvec([1.0, 0.2, -0.4]).as_matrix())
    moved = _moved(extrinsics, rotation, torch.tensor([1.0, 2.0, 3.0]).double(), 1.0)
    for one, other in zip(relative_poses(extrinsics), relative_poses(moved)):
        torch.testing.assert_close(one, other, rtol=0, atol=FLOAT64 * 100)
    # a point in camera 2, seen from camera 1
    point = torch.tensor([0.3, -0.1, 2.0]).double()
    (r1, t1), (r2, t2) = ((extrinsics[0, n, :, :3], extrinsics[0, n, :, 3]) for n in (1, 2))
    turned, shift = relative_poses(extrinsics)
    torch.testing.assert_close(turned[0, 1, 2] @ point + shift[0, 1, 2], r1 @ (r2.T @ (point - t2)) + t1)


def test_the_losses_of_the_parts_of_a_step_add_up(rng):
    batch = _batch(rng, scenes=4)
    points, extrinsics = _perfect(batch)
    points, extrinsics = points + 0.1, extrinsics + 0.05
    counts = LossCounts.of(batch)
    whole = scale_free_loss(points, extrinsics, batch, 2.0, counts)
    parts = [
        scale_free_loss(points[s], extrinsics[s], {key: value[s] for key, value in batch.items()}, 2.0, counts)
        for s in (slice(0, 1), slice(1, 4))
    ]
    for name, value in whole.items():
        assert float(sum(part[name] for part in parts)) == pytest.approx(float(value), rel=1e-10)


def test_what_is_not_known_does_not_count(rng):
    batch = _batch(rng, scenes=3)
    batch["has_depth"] = torch.tensor([True, False, True])
    batch["translation_known"] = torch.tensor([True, True, False])
    batch["point_masks"][1] = False
    points, extrinsics = _perfect(batch)
    wrong = extrinsics.clone()
    wrong[2, :, :, 3] += torch.rand(3, 3)
    points = points.clone()
    points[1] = torch.nan
    assert float(_loss(points, wrong, batch)["loss"]) == pytest.approx(0, abs=1e-9)
    # the rotations of a scene without depth count
    wrong[1, 0, :, :3] = torch.from_numpy(Rotation.from_rotvec([0, 0.5, 0]).as_matrix()) @ wrong[1, 0, :, :3]
    # two of three pairs in each direction, in one of three scenes
    assert float(_loss(points, wrong, batch)["rotation"]) == pytest.approx(0.5 * 4 / 18)


def test_one_frame_and_no_scene_give_zero_with_a_graph(rng):
    batch = _batch(rng, scenes=1, frames=1)
    batch["point_masks"][:] = False
    points, extrinsics = (value.requires_grad_() for value in _perfect(batch))
    terms = _loss(points, extrinsics, batch)
    assert float(terms["loss"].detach()) == 0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(terms["loss"], (points, extrinsics)))


def test_intrinsics_are_found_in_points_of_any_scale(rng):
    height, width = 12, 20
    intrinsics = torch.tensor([[31.0, 0, width / 2], [0, 17.0, height / 2], [0, 0, 1]]).double()
    depth = torch.from_numpy(rng.uniform(1, 3, (2, height, width)))
    points = 0.2 * camera_points(depth[None], intrinsics.expand(1, 2, 3, 3))[0]
    found = intrinsics_from_points(points)
    torch.testing.assert_close(found, intrinsics.expand(2, 3, 3), rtol=0, atol=1e-9)
    # what has no weight has no say, nor has what lies behind the camera
    points[0, :3] = torch.randn(3, width, 3).double()
    points[1, 4, :, 2] = -1.0
    weights = torch.ones(2, height, width)
    weights[0, :3] = 0
    found = intrinsics_from_points(points, weights.double())
    torch.testing.assert_close(found, intrinsics.expand(2, 3, 3), rtol=0, atol=1e-9)
    # in normalised image coordinates the focal length would be of the order of one
    assert float(found[0, 0, 0]) > 10


def test_world_to_camera_is_the_inverse(rng):
    extrinsics = _batch(rng)["extrinsics"]
    again = world_to_camera(world_to_camera(extrinsics))
    torch.testing.assert_close(again, extrinsics, rtol=0, atol=FLOAT64)
    point = torch.tensor([0.1, 0.2, 3.0]).double()
    inverse = world_to_camera(extrinsics)[0, 0]
    world = inverse[:, :3] @ point + inverse[:, 3]
    torch.testing.assert_close(extrinsics[0, 0, :, :3] @ world + extrinsics[0, 0, :, 3], point)
