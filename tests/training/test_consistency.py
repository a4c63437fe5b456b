"""Consistency between views: cases worked by hand, and a dense version pixel by pixel with its gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from subspace3d.training.consistency import (
    GEOMETRIC_WEIGHT,
    consistency_loss,
    dissimilarity,
    reproject,
    sample,
)

F64 = torch.float64


def camera(x: float = 0.0, y: float = 0.0, z: float = 0.0) -> torch.Tensor:
    """Looks along z from (x, y, z)."""
    return torch.tensor([[1.0, 0, 0, -x], [0, 1, 0, -y], [0, 0, 1, -z]], dtype=F64)


def intrinsic(focal: float, size: int) -> torch.Tensor:
    return torch.tensor([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]], dtype=F64)


def wall(depth: float = 2.0, size: int = 12, focal: float = 12.0, baseline: float = 1.0 / 3):
    """Two views of a textured wall at z = ``depth``; the second stands to the right by ``baseline``.

    A point moves to the left by f b / d pixels: 2 of them with the numbers above.
    """
    shift = focal * baseline / depth
    rows, columns = torch.meshgrid(torch.arange(size, dtype=F64), torch.arange(size, dtype=F64), indexing="ij")

    def picture(offset: float) -> torch.Tensor:
        values = torch.sin(0.7 * (columns + offset)) * torch.cos(0.4 * rows)
        return 0.5 + 0.4 * torch.stack([values, -values, values**2])

    images = torch.stack([picture(0.0), picture(shift)])
    return {
        "images": images,
        "depth": torch.full((2, size, size), depth, dtype=F64),
        "extrinsics": torch.stack([camera(), camera(x=baseline)]),
        "intrinsics": torch.stack([intrinsic(focal, size)] * 2),
    }


def test_a_point_moves_by_focal_length_times_baseline_over_depth():
    scene = wall()
    pixels, depth = reproject(scene["depth"][0], *(scene[name][0] for name in ("extrinsics", "intrinsics")),
                              *(scene[name][1] for name in ("extrinsics", "intrinsics")))  # fmt: skip
    torch.testing.assert_close(pixels[3, 5], torch.tensor([5.5 - 2, 3.5], dtype=F64))
    torch.testing.assert_close(depth, scene["depth"][0])


def test_the_right_depth_has_no_loss_and_a_wrong_one_has():
    scene = wall()
    right = consistency_loss(**scene, pairs=[(0, 1), (1, 0)])
    assert right["photometric"] < 1e-12
    assert right["geometric"] < 1e-12
    # two of twelve columns leave the other image
    assert right["counted"] == pytest.approx(10 / 12)
    # twice the depth in both views: the geometry agrees with itself, the colours do not
    wrong = consistency_loss(**{**scene, "depth": 2 * scene["depth"]}, pairs=[(0, 1), (1, 0)])
    assert wrong["geometric"] < 1e-12
    assert wrong["photometric"] > 0.05


def test_a_scale_of_the_whole_prediction_changes_nothing():
    scene = wall()
    scene["depth"] = scene["depth"] * torch.linspace(0.9, 1.1, 12, dtype=F64)
    loss = consistency_loss(**scene, pairs=[(0, 1)])["loss"]
    scaled = {**scene, "depth": 7 * scene["depth"], "extrinsics": scene["extrinsics"].clone()}
    scaled["extrinsics"][:, :, 3] *= 7
    torch.testing.assert_close(consistency_loss(**scaled, pairs=[(0, 1)])["loss"], loss)


def test_geometric_term_by_hand():
    scene = wall()
    # the other view thinks the wall is at 2.5: |2 - 2.5| / 4.5 everywhere, and nothing is hidden
    scene["depth"][1] = 2.5
    found = consistency_loss(**scene, pairs=[(0, 1)])
    assert found["geometric"] == pytest.approx(0.5 / 4.5)
    assert found["loss"] == pytest.approx(float(found["photometric"]) + GEOMETRIC_WEIGHT * 0.5 / 4.5)


def test_what_is_hidden_does_not_count():
    scene = wall()
    # in the other view something stands before the wall: its columns 2 to 5 hide what view 0 sees in columns 4 to 7
    scene["depth"][1, :, 2:6] = 1.0
    found = consistency_loss(**scene, pairs=[(0, 1)])
    # columns 0 and 1 leave the image, 4 to 7 are hidden
    assert found["counted"] == pytest.approx(6 / 12)
    assert found["geometric"] < 1e-12


def test_without_parallax_nothing_counts():
    scene = wall(baseline=0.0)
    scene["depth"].requires_grad_()
    found = consistency_loss(**scene, pairs=[(0, 1)])
    assert found["counted"] == 0
    assert found["loss"] == 0
    found["loss"].backward()
    assert not scene["depth"].grad.any()
    # centres 1 / 3 apart, a point 2 away: at most 2 atan(1 / 12) = 9.53 degrees, in the middle between them
    assert consistency_loss(**wall(), pairs=[(0, 1)], parallax_deg=9.6)["counted"] == 0
    assert consistency_loss(**wall(), pairs=[(0, 1)], parallax_deg=7.0)["counted"] > 0.5


def test_points_behind_the_other_camera_do_not_count():
    scene = wall()
    scene["extrinsics"][1] = camera(x=1.0, z=5.0)
    scene["depth"].requires_grad_()
    found = consistency_loss(**scene, pairs=[(0, 1)])
    assert found["counted"] == 0
    # and a point in its very plane, whose pixel is not finite, leaves no NaN
    plane = {**wall(), "extrinsics": torch.stack([camera(), camera(x=1.0, z=2.0)])}
    plane["depth"].requires_grad_()
    consistency_loss(**plane, pairs=[(0, 1)])["loss"].backward()
    assert torch.isfinite(plane["depth"].grad).all()


def test_pairs_are_of_different_views():
    with pytest.raises(ValueError, match="at least one pair of different views"):
        consistency_loss(**wall(), pairs=[(1, 1)])
    with pytest.raises(ValueError, match="at least one pair"):
        consistency_loss(**wall(), pairs=[])


# ---- a dense version -------------------------------------------------------------------------------------------------


def bilinear(values: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``values [H, W]`` at one pixel (x, y), whose four neighbours exist."""
    column, row = x - 0.5, y - 0.5
    left = min(int(torch.floor(column)), values.shape[1] - 2)
    top = min(int(torch.floor(row)), values.shape[0] - 2)
    a, b = column - left, row - top
    upper = (1 - a) * values[top, left] + a * values[top, left + 1]
    lower = (1 - a) * values[top + 1, left] + a * values[top + 1, left + 1]
    return (1 - b) * upper + b * lower


def ssim(first: torch.Tensor, second: torch.Tensor, row: int, column: int) -> torch.Tensor:
    """Of the 3 x 3 pixels around one, mirrored at the edge."""

    def around(values):
        size = values.shape
        rows = [abs(r) if r < size[0] else 2 * size[0] - 2 - r for r in (row - 1, row, row + 1)]
        columns = [abs(c) if c < size[1] else 2 * size[1] - 2 - c for c in (column - 1, column, column + 1)]
        return torch.stack([values[r, c] for r in rows for c in columns])

    a, b = around(first), around(second)
    means = a.mean(), b.mean()
    variances = ((a - means[0]) ** 2).mean(), ((b - means[1]) ** 2).mean()
    shared = ((a - means[0]) * (b - means[1])).mean()
    top = (2 * means[0] * means[1] + 1e-4) * (2 * shared + 9e-4)
    return top / ((means[0] ** 2 + means[1] ** 2 + 1e-4) * (variances[0] + variances[1] + 9e-4))


def dense_loss(images, depth, extrinsics, intrinsics, pairs, parallax_deg, reach) -> torch.Tensor:
    """The definition, one pixel after the other."""
    size = depth.shape[1:]
    photometric, geometric, count = [], [], 0
    for i, j in pairs:
        warped, kept = images[i].clone(), []
        for row in range(size[0]):
            for column in range(size[1]):
                pixel = torch.tensor([column + 0.5, row + 0.5, 1.0], dtype=F64)
                ray = torch.linalg.solve(intrinsics[i], pixel)
                world = extrinsics[i][:, :3].T @ (depth[i, row, column] * ray - extrinsics[i][:, 3])
                seen = extrinsics[j][:, :3] @ world + extrinsics[j][:, 3]
                image = intrinsics[j] @ seen
                x, y = image[0] / image[2], image[1] / image[2]
                inside = 0.5 <= x <= size[1] - 0.5 and 0.5 <= y <= size[0] - 0.5 and seen[2] > 0  # no ties here
                if not inside:
                    continue
                surface = bilinear(depth[j], x, y)
                centres = [-e[:, :3].T @ e[:, 3] for e in (extrinsics[i], extrinsics[j])]
                rays = [(world - centre).detach() for centre in centres]
                cosine = rays[0] @ rays[1] / (rays[0].norm() * rays[1].norm())
                if torch.rad2deg(torch.acos(cosine)) < parallax_deg or seen[2] > (1 + reach) * surface:
                    continue
                kept.append((row, column))
                warped = warped.clone()
                warped[:, row, column] = torch.stack([bilinear(colour, x, y) for colour in images[j]])
                geometric.append((seen[2] - surface).abs() / (seen[2] + surface))
        for row, column in kept:
            structure = torch.stack(
                [((1 - ssim(images[i][c], warped[c], row, column)) / 2).clamp(0, 1) for c in range(3)]
            )
            difference = (images[i][:, row, column] - warped[:, row, column]).abs()
            photometric.append((0.85 * structure + 0.15 * difference).mean())
        count += len(kept)
    return (sum(photometric) + GEOMETRIC_WEIGHT * sum(geometric)) / count


def random_scene(seed: int, views: int = 3, height: int = 5, width: int = 7):
    rng = np.random.default_rng(seed)
    scene = {
        "images": torch.from_numpy(rng.uniform(0.1, 0.9, (views, 3, height, width))),
        "depth": torch.from_numpy(rng.uniform(1.8, 2.2, (views, height, width))),
        "extrinsics": torch.stack([camera(*rng.uniform(-0.3, 0.3, 3)) for _ in range(views)]),
        "intrinsics": torch.stack([intrinsic(f, width) for f in rng.uniform(6, 8, views)]),
    }
    angles = torch.from_numpy(rng.uniform(-0.05, 0.05, views))
    turns = torch.stack([torch.linalg.matrix_exp(a * torch.tensor([[0, 0, 1.0], [0, 0, 0], [-1, 0, 0]], dtype=F64))
                         for a in angles])  # fmt: skip
    scene["extrinsics"] = torch.cat([turns, scene["extrinsics"][:, :, 3:]], dim=2)
    return scene


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_loss_and_gradients_are_those_of_the_dense_version(seed):
    scene = random_scene(seed)
    pairs = [(0, 1), (1, 2), (2, 0)]
    results = []
    for loss in (lambda **s: consistency_loss(**s, pairs=pairs, parallax_deg=2.0, reach=0.05)["loss"],
                 lambda **s: dense_loss(**s, pairs=pairs, parallax_deg=2.0, reach=0.05)):  # fmt: skip
        leaves = {name: value.clone().requires_grad_() for name, value in scene.items()}
        value = loss(**leaves)
        value.backward()
        results.append((value.detach(), {name: leaf.grad for name, leaf in leaves.items()}))
    assert results[0][0] > 0
    # float64, a few hundred operations
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-10, atol=1e-12)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], rtol=1e-8, atol=1e-10, msg=name)


def test_sampling_is_bilinear(rng):
    maps = torch.from_numpy(rng.standard_normal((2, 5, 7)))
    pixels = torch.from_numpy(rng.uniform([0.5, 0.5], [6.5, 4.5], (3, 4, 2)))
    expected = [[[bilinear(m, *pixels[r, c]) for c in range(4)] for r in range(3)] for m in maps]
    torch.testing.assert_close(sample(maps, pixels), torch.tensor(expected, dtype=F64))


def test_equal_images_are_not_dissimilar(rng):
    image = torch.from_numpy(rng.uniform(size=(3, 6, 6)))
    assert dissimilarity(image, image).abs().max() < 1e-12
    assert dissimilarity(image, 1 - image).min() > 0
