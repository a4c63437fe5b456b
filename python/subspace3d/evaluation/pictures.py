"""What an evaluation keeps of a scene so that it can be shown: small images, depth maps and cameras."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from subspace3d.evaluation.alignment import Similarity
from subspace3d.evaluation.predict import choose_frames
from subspace3d.evaluation.scene_metrics import SceneResult, Views
from subspace3d.files import inside, load_tensors, save_tensors
from subspace3d.formats.results import ViewsHeader
from subspace3d.schema import check

VERSION = 2  # of the files; raise it when one that was kept can no longer be shown
MOST_FRAMES = 8
LARGEST_SIDE = 224
IDENTITY = Similarity(1.0, np.eye(3), np.zeros(3))
_FORMAT = "subspace3d-views"
_TYPES = {
    "depth": "float16", "intrinsics": "float32", "extrinsics": "float32", "confidence": "uint8", "image": "uint8",
}  # fmt: skip
_LARGEST_HALF = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class ShownViews:
    """The frames of a scene that were kept, of the truth or of one method.

    Args:
        views (Views): depth maps (predicted ones in the model's own unit) and cameras at the kept size; confidences as
            `ranks`.
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

    @property
    def rgb(self) -> NDArray[np.uint8]:
        """``images``.

        Raises:
            ValueError: there are none.
        """
        if self.images is None:
            raise ValueError("what is kept of the truth must hold images")
        return self.images


def shown_truth(images: NDArray[np.uint8], true: Views) -> ShownViews:
    """What is kept of the images [S, H, W, 3], true depths and cameras of a scene.

    At most 8 evenly spaced frames, every n-th row and column so that no side is longer than 224 pixels.
    """
    frames = choose_frames(len(true.depths), MOST_FRAMES)
    return ShownViews(reduce_views(true, frames), frames, reduce_images(images[frames]), 1.0, IDENTITY)


def shown_prediction(pred: Views, depth_scale: float, alignment: Similarity | None) -> ShownViews:
    """What is kept of a prediction: the frames and pixels of `shown_truth`."""
    frames = choose_frames(len(pred.depths), MOST_FRAMES)
    reduced = reduce_views(pred, frames)
    if reduced.confidence is not None:
        reduced = replace(reduced, confidence=ranks(reduced.confidence).astype(np.float64))
    return ShownViews(reduced, frames, None, depth_scale, alignment)


def ranks(values: NDArray[Any]) -> NDArray[np.uint8]:
    """``floor(255 (#{values <= v} - 1) / (n - 1))`` of every v: what share of all is no surer, in one byte."""
    order = np.searchsorted(np.sort(values, axis=None), values, side="right") - 1
    return (255 * order // max(1, values.size - 1)).astype(np.uint8)


def fitted_alignment(result: SceneResult) -> Similarity | None:
    """Sim(3) and ICP of the point clouds; None where they are not defined."""
    details = result.details
    if "rotation" not in details:
        return None
    return Similarity(details["scale"], np.array(details["rotation"]), np.array(details["translation"]))


def save(path: Path, shown: ShownViews) -> None:
    """Write a safetensors file; docs/evaluation.md has its tensors and its header.

    Depth is kept in float16: a relative step of 1/2048, far below what a picture shows.
    """
    import torch

    views, fitted = shown.views, shown.alignment
    tensors = {
        "depth": torch.from_numpy(np.clip(views.depths, -_LARGEST_HALF, _LARGEST_HALF).astype(np.float16)),
    }
    for name, cameras in (("intrinsics", views.intrinsics), ("extrinsics", views.extrinsics)):
        if cameras is not None:
            tensors[name] = torch.from_numpy(cameras.astype(np.float32))
    if views.confidence is not None:
        tensors["confidence"] = torch.from_numpy(views.confidence.astype(np.uint8))
    if shown.images is not None:
        tensors["image"] = torch.from_numpy(shown.images)
    alignment = None
    if fitted is not None:
        lists = {"rotation": fitted.rotation.tolist(), "translation": fitted.translation.tolist()}
        alignment = {"scale": fitted.scale, **lists}
    header = {
        "format": _FORMAT,
        "version": VERSION,
        "frames": shown.frames,
        "translation_known": views.translation_known,
        "depth_scale": shown.depth_scale,
        "alignment": alignment,
    }
    save_tensors(path, tensors, header)


def load(path: Path) -> ShownViews:
    """Read what `save` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not a whole file of this format; names it.
    """
    tensors, header = load_tensors(path)
    if header.get("format") != _FORMAT or header.get("version") != VERSION:
        raise ValueError(f"{path}: format and version must be {_FORMAT!r} and {VERSION}, got {header}")
    shown = check(header, ViewsHeader, f"{path}: header")
    arrays = _arrays(path, tensors, len(shown["frames"]))
    confidence, stored = arrays.get("confidence"), shown["alignment"]
    intrinsics, extrinsics = arrays.get("intrinsics"), arrays.get("extrinsics")
    views = Views(
        arrays["depth"].astype(np.float64),
        None if intrinsics is None else intrinsics.astype(np.float64),
        None if extrinsics is None else extrinsics.astype(np.float64),
        shown["translation_known"],
        None if confidence is None else confidence.astype(np.float64),
    )
    alignment = None
    if stored is not None:
        rotation, translation = np.array(stored["rotation"], float), np.array(stored["translation"], float)
        alignment = Similarity(stored["scale"], rotation, translation)
    return ShownViews(views, shown["frames"], arrays.get("image"), shown["depth_scale"], alignment)


def _arrays(path: Path, tensors: Mapping[str, Any], count: int) -> dict[str, NDArray[Any]]:
    """The tensors as arrays, of the types and sizes that `save` gives them."""
    arrays = {}
    for name in ("depth", "intrinsics", "extrinsics", "confidence", "image"):
        if name in tensors:
            arrays[name] = tensors[name].numpy() if str(tensors[name].dtype) == f"torch.{_TYPES[name]}" else np.zeros(0)
        elif name == "depth":
            raise ValueError(f"{path}: must hold {name}")
    size = arrays["depth"].shape
    fits = len(size) == 3 and 1 <= min(size) <= max(size) <= LARGEST_SIDE
    if not fits or size[0] != count or count > MOST_FRAMES:
        raise ValueError(f"{path}: depth must be {_TYPES['depth']} of {count} frames, got {list(size)}")
    wanted = {"depth": size, "intrinsics": (count, 3, 3), "extrinsics": (count, 3, 4)}
    wanted |= {"confidence": size, "image": (*size, 3)}
    for name, array in arrays.items():
        if array.shape != wanted[name] or not np.isfinite(array).all():
            raise ValueError(f"{path}: {name} must be finite {_TYPES[name]} {list(wanted[name])}")
    if "intrinsics" in arrays and (arrays["intrinsics"][:, (0, 1), (0, 1)] <= 0).any():
        raise ValueError(f"{path}: intrinsics must have positive focal lengths")
    return arrays


def load_entry(
    folder: Path, entry: Mapping[str, Any], methods: Iterable[str]
) -> tuple[ShownViews, dict[str, ShownViews]]:
    """What was kept of one scene.

    Args:
        folder (Path): that of results.json.
        entry (Mapping): one of its ``pictures``.
        methods (Iterable): the methods wanted; those that failed on the scene are left out.

    Returns:
        tuple: the truth, and method -> prediction, all of the same frames and size.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is broken, lies outside the folder, or is from an earlier version.
    """
    files = {name: entry["methods"][name] for name in methods if name in entry["methods"]}
    if not all(isinstance(file, str) for file in (*files.values(), entry.get("true"))) or "image" in entry:
        raise ValueError(f"what is kept of {entry['scene']} is from an earlier version; evaluate again")
    where = f"what is kept of {entry['scene']}"
    true = load(inside(folder, entry["true"], where))
    if true.views.not_predicted():
        raise ValueError(f"{entry['true']} must hold {' and '.join(true.views.not_predicted())}")
    predicted = {name: load(inside(folder, file, where)) for name, file in files.items()}
    for name, shown in predicted.items():
        if shown.views.depths.shape != true.views.depths.shape:
            sizes = f"{list(shown.views.depths.shape)} and {list(true.views.depths.shape)}"
            raise ValueError(f"{files[name]} must have the frames and size of {entry['true']}, got {sizes}")
    return true, predicted


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
    intrinsics = extrinsics = None
    if views.intrinsics is not None:
        intrinsics = views.intrinsics[frames].astype(np.float64)
        intrinsics[:, :2] /= step
        intrinsics[:, :2, 2] += 0.5 - (start + 0.5) / step
    if views.extrinsics is not None:
        extrinsics = views.extrinsics[frames]
    confidence = None if views.confidence is None else views.confidence[frames][:, rows, columns]
    depths = views.depths[frames][:, rows, columns]
    return Views(depths, intrinsics, extrinsics, views.translation_known, confidence)


def reduce_images(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The mean over blocks of n x n pixels, n as in `reduce_views`: [S, H, W, 3] -> [S, H // n, W // n, 3]."""
    count, height, width, _ = images.shape
    step = _stride(height, width)
    whole = images[:, : height // step * step, : width // step * step]
    blocks = whole.reshape(count, height // step, step, width // step, step, 3)
    return np.rint(blocks.mean((2, 4))).astype(np.uint8)
