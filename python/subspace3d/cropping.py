"""Cut views around their principal point and resize them; intrinsics and depth follow the image.

Pixel coordinates have their origin in the corner of the image: the centre of the top-left pixel is (0.5, 0.5).
"""

from __future__ import annotations

import numpy as np

_LEAST_MARGIN = 0.05  # of a side, between the principal point and the border
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels


def centred_box(
    intrinsic: np.ndarray, size: tuple[int, int], aspect: float = 1.0, zoom: tuple[float, float] = (1.0, 1.0)
) -> Box:
    """The largest box with height / width = ``aspect`` whose centre is the principal point, inside the image.

    The half sizes around (cx, cy) = (K[0, 2], K[1, 2]) are a = min(cx, W - cx) across and b = min(cy, H - cy) down,
    times the shares ``zoom`` in (0, 1] of (height, width); the longer of the two relative to ``aspect`` is cut.

    Args:
        intrinsic (float [3, 3]): pixels.
        size (tuple[int, int]): height and width of the image, pixels.
        aspect (float): height / width of the box.
        zoom (tuple[float, float]): shares of the height and of the width that are kept.

    Raises:
        ValueError: the principal point is not inside the image, or so near its border that hardly a pixel is left.
    """
    (height, width), cx, cy = size, float(intrinsic[0, 2]), float(intrinsic[1, 2])
    if not (0 < cx < width and 0 < cy < height):
        raise ValueError(f"principal point must lie inside the {width} x {height} image, got ({cx:g}, {cy:g})")
    if min(cx, width - cx) < _LEAST_MARGIN * width or min(cy, height - cy) < _LEAST_MARGIN * height:
        raise ValueError(
            f"principal point must be at least {_LEAST_MARGIN:.0%} of the sides away from the border of the {width} x "
            f"{height} image, because images are cut around it, got ({cx:g}, {cy:g})"
        )
    across, down = min(cx, width - cx) * zoom[1], min(cy, height - cy) * zoom[0]
    across, down = min(across, down / aspect), min(down, across * aspect)
    return cx - across, cy - down, cx + across, cy + down


def crop_resize(
    image: np.ndarray, depth: np.ndarray, intrinsic: np.ndarray, box: Box, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Show the part ``box`` of a view in ``size`` pixels: K' = diag(w / box width, h / box height, 1) (K - corner).

    The image is averaged over blocks where the box falls into whole blocks of pixels, else resampled bicubically
    (with the filter widened to the block when it shrinks). Depth is taken from the pixel whose square holds the new
    pixel's centre, never mixed.

    Args:
        image (uint8 [H, W, 3]): sRGB.
        depth (float32 [H, W]): z-depth.
        intrinsic (float64 [3, 3]): pixels.
        box (Box): part of the image, pixels.
        size (tuple[int, int]): height and width of the result.

    Returns:
        image uint8 [h, w, 3], depth float32 [h, w], intrinsic float64 [3, 3].
    """
    from PIL import Image

    left, top, right, bottom = box
    height, width = size
    steps = ((bottom - top) / height, (right - left) / width)
    corner = np.array([[0, 0, left], [0, 0, top], [0, 0, 0]])
    intrinsic = (intrinsic - corner) / np.array([[steps[1]], [steps[0]], [1.0]])
    rows = _nearest(top, steps[0], height, depth.shape[0])
    columns = _nearest(left, steps[1], width, depth.shape[1])
    depth = depth[np.ix_(rows, columns)]
    whole = all(float(value).is_integer() for value in (left, top, *steps))
    if whole and steps == (1, 1):
        return image[int(top) : int(top) + height, int(left) : int(left) + width], depth, intrinsic
    filter_ = Image.Resampling.BOX if whole else Image.Resampling.BICUBIC
    picture = Image.fromarray(np.ascontiguousarray(image)).resize((width, height), filter_, box=box)
    return np.array(picture), depth, intrinsic


def _nearest(start: float, step: float, count: int, limit: int) -> np.ndarray:
    index = np.floor(start + (np.arange(count) + 0.5) * step).astype(np.int64)
    return np.clip(index, 0, limit - 1)
