"""What an evaluation keeps of a scene so that it can be shown: small depth maps, images and cameras, true and predicted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from subspace3d.evaluation.alignment import Similarity
from subspace3d.evaluation.predict import choose_frames
from subspace3d.evaluation.scene_metrics import SceneResult, Views
from subspace3d.files import load_tensors, save_tensors

VERSION = 2  # of the files; raise it when one that was kept can no longer be shown
MOST_FRAMES = 8
LARGEST_SIDE = 224
_FORMAT = "subspace3d-views"
_LARGEST_HALF = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class ShownViews:
    """The frames of a scene that were kept, of the truth or of one method.

    Args:
        views (Views): depth maps (predicted ones in the model's own unit) and cameras at the kept size.
        frames (list[int]): which of the evaluated frames these are.
        images (NDArray[np.uint8] | None): [S, H, W, 3] sRGB, of the truth only.
        depth_scale (float): true units per predicted unit, as fitted to the depths; 1 for the truth.
        alignment (Similarity | None): predicted to true world, the Sim(3) and ICP of the point clouds; the identity
            for the truth, None where it was not defined.
    """

    views: Views
    frames: list[int]
    images: NDArray[np.uint8] | None
    depth_scale: float
    alignment: Similarity | None


def save_truth(path: Path, images: NDArray[np.uint8], true: Views) -> None:
    """Write the images [S, H, W, 3], true depths and cameras of a scene, see `_save`."""
    _save(path, true, images, {"depth_scale": 1.0, "alignment": _similarity(1.0, np.eye(3), np.zeros(3))})


def save_prediction(path: Path, pred: Views, result: SceneResult) -> None:
    """Write predicted depths, confidences and cameras with the alignment that the metrics fitted, see `_save`."""
    details = result.details
    known = "rotation" in details
    alignment = _similarity(details["scale"], details["rotation"], details["translation"]) if known else None
    _save(path, pred, None, {"depth_scale": result.depth_scale, "alignment": alignment})


def load(path: Path) -> ShownViews:
    """Read what `save_truth` or `save_prediction` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not a whole file of this format; names it.
    """
    tensors, header = load_tensors(path)
    if header.get("format") != _FORMAT or header.get("version") != VERSION:
        raise ValueError(f"{path}: format and version must be {_FORMAT!r} and {VERSION}, got {header}")
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    confidence = arrays.get("confidence")
    views = Views(
        arrays["depth"].astype(np.float64),
        arrays["intrinsics"].astype(np.float64),
        arrays["extrinsics"].astype(np.float64),
        header["translation_known"],
        None if confidence is None else confidence.astype(np.float64),
    )
    stored = header["alignment"]
    alignment = None
    if stored is not None:
        rotation, translation = np.array(stored["rotation"]), np.array(stored["translation"])
        alignment = Similarity(stored["scale"], rotation, translation)
    return ShownViews(views, header["frames"], arrays.get("image"), header["depth_scale"], alignment)


def _similarity(scale: float, rotation: Any, translation: Any) -> dict[str, Any]:
    lists = {"rotation": np.asarray(rotation).tolist(), "translation": np.asarray(translation).tolist()}
    return {"scale": float(scale), **lists}


def _save(path: Path, views: Views, images: NDArray[np.uint8] | None, header: dict[str, Any]) -> None:
    """Write at most 8 evenly spaced frames, every n-th row and column so that no side is longer than 224 pixels.

    Depth and confidence are kept in float16: a relative step of 1/2048, far below what a picture shows.
    """
    import torch

    frames = choose_frames(len(views.depths), MOST_FRAMES)
    reduced = reduce_views(views, frames)
    tensors = {
        "depth": _half(reduced.depths),
        "intrinsics": torch.from_numpy(reduced.intrinsics.astype(np.float32)),
        "extrinsics": torch.from_numpy(reduced.extrinsics.astype(np.float32)),
    }
    if reduced.confidence is not None:
        tensors["confidence"] = _half(reduced.confidence)
    if images is not None:
        tensors["image"] = torch.from_numpy(reduce_images(images[frames]))
    known = {"frames": frames, "translation_known": views.translation_known}
    save_tensors(path, tensors, {"format": _FORMAT, "version": VERSION, **known, **header})


def _half(values: NDArray[Any]) -> Any:
    import torch

    return torch.from_numpy(np.clip(values, -_LARGEST_HALF, _LARGEST_HALF).astype(np.float16))


def _stride(height: int, width: int) -> int:
    return -(-max(height, width) // LARGEST_SIDE)


def reduce_views(views: Views, frames: list[int]) -> Views:
    """Some frames of ``views``, every n-th row and column, with intrinsics that see the kept pixels where they were.

    Pixel i of a reduced row is pixel ``n i + n // 2`` of the full one, so ``u' + 1/2 = (u + 1/2 - n // 2 - 1/2) / n +
    1/2`` with centres at half pixels.
    """
    height, width = views.depths.shape[1:]
    step = _stride(height, width)
    start = step // 2
    rows, columns = slice(start, height // step * step, step), slice(start, width // step * step, step)
    intrinsics = views.intrinsics[frames].astype(np.float64)
    intrinsics[:, :2] /= step
    intrinsics[:, :2, 2] += 0.5 - (start + 0.5) / step
    confidence = None if views.confidence is None else views.confidence[frames][:, rows, columns]
    depths, extrinsics = views.depths[frames][:, rows, columns], views.extrinsics[frames]
    return Views(depths, intrinsics, extrinsics, views.translation_known, confidence)


def reduce_images(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The mean over blocks of n x n pixels, n as in `reduce_views`: [S, H, W, 3] -> [S, H // n, W // n, 3]."""
    count, height, width, _ = images.shape
    step = _stride(height, width)
    whole = images[:, : height // step * step, : width // step * step]
    blocks = whole.reshape(count, height // step, step, width // step, step, 3)
    return np.rint(blocks.mean((2, 4))).astype(np.uint8)
