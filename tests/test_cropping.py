from __future__ import annotations

import numpy as np
import pytest

from subspace3d.cropping import centred_box, crop_resize


def intrinsic(cx: float, cy: float) -> np.ndarray:
    return np.array([[50.0, 0, cx], [0, 40, cy], [0, 0, 1]])


def test_the_box_reaches_the_nearer_edge_on_each_axis() -> None:
    # 90 x 60 pixels: 30 to the left of cx, 20 below cy; x goes with the width and y with the height
    assert centred_box(intrinsic(30, 40), (60, 90), aspect=20 / 30) == (0, 20, 60, 60)
    # a square is limited by the height, a flat box by the width
    assert centred_box(intrinsic(30, 40), (60, 90)) == (10, 20, 50, 60)
    assert centred_box(intrinsic(30, 40), (60, 90), aspect=0.5) == (0, 25, 60, 55)
    # half of the height is kept, so the square halves
    assert centred_box(intrinsic(30, 40), (60, 90), zoom=(0.5, 1.0)) == (20, 30, 40, 50)


@pytest.mark.parametrize("centre", [(0, 10), (10, 0), (90, 10), (10, 60)])
def test_a_principal_point_outside_the_image_has_no_box(centre: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="principal point must lie inside the 90 x 60 image"):
        centred_box(intrinsic(*centre), (60, 90))


@pytest.mark.parametrize("box", [(0, 0, 16, 12), (2.5, 1.5, 12.5, 9.0), (4, 2, 12, 8), (3, 3, 6, 5.25)])
def test_a_linear_picture_stays_in_its_place(box: tuple[float, float, float, float]) -> None:
    """An image that is linear in x and y is still so where the new intrinsics say it is; depth is the nearest pixel."""
    x, y = np.meshgrid(np.arange(16) + 0.5, np.arange(12) + 0.5)
    image = np.rint(np.stack([10 * x, 10 * y, 5 * x + 5 * y], -1)).astype(np.uint8)
    depth = (1 + x + 20 * y).astype(np.float32)
    new_image, new_depth, new = crop_resize(image, depth, intrinsic(8, 6), box, (6, 8))
    columns, rows = np.meshgrid(np.arange(8) + 0.5, np.arange(6) + 0.5)
    # the same rays: (u - cx) / fx
    old_x = 8 + 50 * (columns - new[0, 2]) / new[0, 0]
    old_y = 6 + 40 * (rows - new[1, 2]) / new[1, 1]
    inner = (old_x > 2) & (old_x < 14) & (old_y > 2) & (old_y < 10)  # the filter stops short at the image's edge
    assert np.abs(new_image[..., 0] - 10 * old_x)[inner].max() <= 1
    assert np.abs(new_image[..., 1] - 10 * old_y)[inner].max() <= 1
    np.testing.assert_array_equal(new_depth, 1 + np.floor(old_x) + 0.5 + 20 * (np.floor(old_y) + 0.5))


def test_a_whole_cut_copies_pixels(rng: np.random.Generator) -> None:
    image, depth = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8), rng.uniform(1, 2, (12, 16)).astype(np.float32)
    cut, cut_depth, new = crop_resize(image, depth, intrinsic(8, 6), (3, 2, 11, 8), (6, 8))
    assert np.array_equal(cut, image[2:8, 3:11]) and np.array_equal(cut_depth, depth[2:8, 3:11])
    np.testing.assert_allclose(new, intrinsic(5, 4))
