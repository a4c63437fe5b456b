"""Pictures of the first frame of a scene: image, true depth, and a method's depth and error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from subspace3d.evaluation.alignment import Array
from subspace3d.files import atomic_path

DEPTH_COLOURS = "viridis"
ERROR_COLOURS = "magma"
LARGEST_ERROR = 0.5
_NO_DEPTH = (128, 128, 128)  # a grey that neither colour map contains


def colour(values: Array, low: float, high: float, colours: str, valid: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """``colour map((values - low) / (high - low))``, clipped; grey where not ``valid``.

    Args:
        values (Array): [H, W].
        low (float): value of the first colour.
        high (float): value of the last colour; may equal ``low``.
        colours (str): name of a matplotlib colour map.
        valid (NDArray[np.bool_]): [H, W].

    Returns:
        NDArray[np.uint8]: [H, W, 3] sRGB.
    """
    import matplotlib

    share = np.clip((values - low) / max(high - low, np.finfo(np.float64).tiny), 0.0, 1.0)
    picture = matplotlib.colormaps[colours](np.where(valid, share, 0.0), bytes=True)[..., :3].copy()
    picture[~valid] = _NO_DEPTH
    return picture


def depth_range(true: Array) -> tuple[float, float]:
    """The 2nd and 98th percentile of the valid depths of a true map [H, W]; (0, 1) when it has none."""
    valid = true[true > 0]
    if valid.size == 0:
        return 0.0, 1.0
    low, high = np.percentile(valid, (2, 98))
    return float(low), float(high)


def save_truth(folder: Path, image: NDArray[np.uint8], true: Array) -> dict[str, Any]:
    """Write image.png and true.png.

    Args:
        folder (Path): pictures of the scene.
        image (NDArray[np.uint8]): [H, W, 3] sRGB.
        true (Array): [H, W] z-depth, 0 = invalid.

    Returns:
        dict: file names and the depth range of the colours, in scene units.
    """
    low, high = depth_range(true)
    _save(folder / "image.png", image)
    _save(folder / "true.png", colour(true, low, high, DEPTH_COLOURS, true > 0))
    return {"image": "image.png", "true": "true.png", "depth_range": [low, high]}


def save_prediction(folder: Path, method: str, pred: Array, true: Array) -> dict[str, str]:
    """Write <method>.png, coloured over the range of the true depth, and error_<method>.png, Abs Rel from 0 to 0.5.

    Args:
        folder (Path): pictures of the scene.
        method (str): name of the method.
        pred (Array): [H, W] z-depth in the unit of ``true``, after alignment.
        true (Array): [H, W] z-depth, 0 = invalid.

    Returns:
        dict: file names.
    """
    low, high = depth_range(true)
    valid = true > 0
    error = np.abs(pred - true) / np.where(valid, true, 1.0)
    _save(folder / f"{method}.png", colour(pred, low, high, DEPTH_COLOURS, np.isfinite(pred)))
    _save(folder / f"error_{method}.png", colour(error, 0.0, LARGEST_ERROR, ERROR_COLOURS, valid))
    return {"depth": f"{method}.png", "error": f"error_{method}.png"}


def _save(path: Path, picture: NDArray[np.uint8]) -> None:
    from PIL import Image

    with atomic_path(path) as temporary:
        Image.fromarray(picture).save(temporary, format="PNG", optimize=True)
