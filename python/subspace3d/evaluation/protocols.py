"""The protocols that published figures follow, by name: frames, size, alignment, mask and metrics of each."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from subspace3d.cropping import Box, centred_box, crop_resize
from subspace3d.evaluation import protocol_metrics as metrics
from subspace3d.evaluation.predict import choose_frames
from subspace3d.evaluation.protocol_metrics import Measured
from subspace3d.evaluation.scene_metrics import SceneResult
from subspace3d.formats.scene import Scene, SceneFile

Size = tuple[int, int]
Crop = Callable[[np.ndarray, Size, int, int], tuple[Box, Size]]


@dataclass(frozen=True)
class Protocol:
    """One protocol.

    Args:
        source (str): the paper and the evaluation code it follows.
        frames (Callable): number of frames of a scene -> those that are used, in order.
        frames_in_words (str): the same.
        crop (Callable): intrinsics [3, 3], (height, width), the backbone's image size and patch size -> what is cut out
            of the image and the (height, width) it is resized to.
        size_in_words (str): the same.
        alignment (str): what is fitted to the truth before something is measured.
        mask (str): which pixels count.
        differs (str): where this implementation is not what the original does, and why.
        metrics (tuple[str, ...]): keys of `table.QUANTITIES`, in the order they are shown.
        measure (Callable): what one scene gives.
    """

    source: str
    frames: Callable[[int], list[int]]
    frames_in_words: str
    crop: Crop
    size_in_words: str
    alignment: str
    mask: str
    differs: str
    metrics: tuple[str, ...]
    measure: Callable[[Measured], SceneResult]

    def in_words(self) -> dict[str, Any]:
        """What is kept of it in results.json."""
        return {
            "source": self.source,
            "frames": self.frames_in_words,
            "size": self.size_in_words,
            "alignment": self.alignment,
            "mask": self.mask,
            "differs": self.differs,
            "metrics": list(self.metrics),
        }


def load_views(path: Path, frames: list[int], crop: Crop, image_size: int, patch_size: int) -> Scene:
    """Frames of a scene, cut and resized as ``crop`` says.

    Raises:
        FileNotFoundError: a file that is not there.
        ValueError: a file that breaks the format.
    """
    file = SceneFile(path)
    views = []
    for index in frames:
        intrinsic, extrinsic = file.camera(index)
        box, size = crop(intrinsic, file.size, image_size, patch_size)
        views.append((*crop_resize(file.image(index), file.valid_depth(index), intrinsic, box, size), extrinsic))
    return Scene.of(file, views)


# ---- frames ----------------------------------------------------------------------------------------------------------


def ten_at_random(available: int) -> list[int]:
    """Ten different frames in random order, from NumPy's RandomState(0); all in order when there are no more."""
    if available <= 10:
        return list(range(available))
    return np.random.RandomState(0).choice(available, 10, replace=False).tolist()


def every_fifth(available: int) -> list[int]:
    """0, 5, 10, ..."""
    return list(range(0, available, 5))


def hundred_shuffled(available: int) -> list[int]:
    """The first hundred of all frames as Python's Random(42) shuffles them, in order; all when there are no more."""
    if available <= 100:
        return list(range(available))
    indices = list(range(available))
    random.Random(42).shuffle(indices)
    return sorted(indices[:100])


# ---- sizes -----------------------------------------------------------------------------------------------------------


def whole_width(intrinsic: np.ndarray, size: Size, image_size: int, patch_size: int) -> tuple[Box, Size]:
    """The whole image, ``image_size`` pixels wide, its height rounded to a multiple of ``patch_size``."""
    height, width = size
    rows = max(1, round(height * image_size / width / patch_size)) * patch_size
    return (0.0, 0.0, float(width), float(height)), (rows, image_size)


def width_cut_to_square(intrinsic: np.ndarray, size: Size, image_size: int, patch_size: int) -> tuple[Box, Size]:
    """As `whole_width`, but of an image that comes out taller than wide only the middle square."""
    box, (rows, columns) = whole_width(intrinsic, size, image_size, patch_size)
    if rows <= image_size:
        return box, (rows, columns)
    kept = size[0] * image_size / rows
    top = (size[0] - kept) / 2
    return (0.0, top, float(size[1]), top + kept), (image_size, image_size)


def four_to_three(intrinsic: np.ndarray, size: Size, image_size: int, patch_size: int) -> tuple[Box, Size]:
    """The largest box of 4 : 3 about the principal point, ``image_size`` pixels wide; upright images as 3 : 4."""
    short = max(1, round(0.75 * image_size / patch_size)) * patch_size
    rows, columns = (short, image_size) if size[0] <= size[1] else (image_size, short)
    return centred_box(intrinsic, size, aspect=rows / columns), (rows, columns)


def longest_side(intrinsic: np.ndarray, size: Size, image_size: int, patch_size: int) -> tuple[Box, Size]:
    """The whole image, its longer side the multiple of ``patch_size`` nearest to 504 / 518 of ``image_size``."""
    target = round(image_size * 504 / 518)
    scale = target / max(size)
    rows, columns = (max(1, round(round(side * scale) / patch_size)) * patch_size for side in size)
    return (0.0, 0.0, float(size[1]), float(size[0])), (rows, columns)


# ---- the table -------------------------------------------------------------------------------------------------------


_SAMPLED = "means over surfaces are over 50,000 evenly spaced points of each, normals over 20,000, ICP sees 25,000"
_GLOBAL = (
    "scale and shift are the global minimum (the original takes steps of 1e-4 by Adam, which move the shift by 0.1 at "
    "most); video depth is a mean over scenes (the original weighs them by pixels)"
)
_VIDEO_MASK = "true depth > 0; video depth in metres: also < 70, and predictions beyond count as 70"
_WHOLE = "whole image, 518 wide (or the backbone's size), height rounded to a multiple of the patch"
_SIM3_ICP = "Umeyama's Sim(3) on all corresponding pixels, then ICP as Open3D's, 0.1 (scenes in mm: 100)"

PROTOCOLS: dict[str, Protocol] = {
    "authors": Protocol(
        source="arXiv 2604.10095 and its release (mv_recon, videodepth)",
        frames=lambda available: choose_frames(available, 8),
        frames_in_words="8, evenly spaced: every 12th of 96, as for THuman2.1 and 2K2K",
        crop=whole_width,
        size_in_words=_WHOLE,
        alignment=f"{_SIM3_ICP}; depth: scale and shift a frame, the truth to the prediction",
        mask="true depth > 0 (the release: > 1e-4)",
        differs=f"{_SAMPLED}; the focal lengths follow each side of the image by itself (the release scales both by "
        "the larger factor, up to 2 % off); the depth fit is the global minimum (the release: 1,000 steps of Adam); "
        "scenes weigh the same (the release weighs depth by pixels)",
        metrics=(*metrics.SURFACE, "abs_rel_frame_affine", "delta_frame_affine"),
        measure=metrics.measure_authors,
    ),
    "vggt": Protocol(
        source="VGGT, arXiv 2503.11651: poses as on Co3Dv2 and RealEstate10K (test_co3d.py), points as on ETH3D",
        frames=ten_at_random,
        frames_in_words="10 at random",
        crop=width_cut_to_square,
        size_in_words=f"{_WHOLE}; the middle square of what is taller",
        alignment="Umeyama's Sim(3) on all corresponding pixels, no ICP; poses: camera i from camera j, the direction "
        "of the translation up to its sign",
        mask="true depth > 0 (ETH3D: its own masks)",
        differs="AUC is a mean over scenes (the original pools the pairs of a category); frames are drawn for each "
        f"scene anew from seed 0 (the original: one seed for all sequences); {_SAMPLED}",
        metrics=("auc_3", "auc_5", "auc_15", "auc_30", "accuracy", "completeness", "overall"),
        measure=metrics.measure_vggt,
    ),
    "pi3": Protocol(
        source="Pi3, arXiv 2507.13347, and recons_eval",
        frames=every_fifth,
        frames_in_words="every 5th, as on DTU and ETH3D (7-Scenes: every 40th or 200th, NRGBD: every 100th or 500th)",
        crop=whole_width,
        size_in_words=_WHOLE,
        alignment=f"{_SIM3_ICP}; poses: camera j from camera i, the direction up to its sign; trajectory: Sim(3) of "
        "the centres; video depth: one scale (reweighted), or one scale and shift",
        mask=_VIDEO_MASK,
        differs=f"{_SAMPLED}; {_GLOBAL}; AUC is a mean over scenes (the original pools the pairs)",
        metrics=(
            "auc_5", "auc_15", "auc_30", "ate", "rpe_translation", "rpe_rotation_deg", *metrics.SURFACE,
            "abs_rel_scale", "delta_scale", "abs_rel_scale_shift", "delta_scale_shift",
        ),
        measure=metrics.measure_pi3,
    ),
    "cut3r": Protocol(
        source="CUT3R, arXiv 2501.12387: eval/mv_recon, eval/relpose, eval/video_depth",
        frames=every_fifth,
        frames_in_words="every 5th (7-Scenes: every 200th, NRGBD: every 500th)",
        crop=four_to_three,
        size_in_words="4 : 3 about the principal point, 518 wide (or the backbone's size; the original: 512 x 384); "
        "points of the middle square alone, whose side is 224 / 512 of the width",
        alignment="points in the first camera: shift of z and scale by medians, then ICP as Open3D's, 0.1 (scenes in "
        "mm: 100); trajectory: Sim(3) of the centres; video depth: one scale (reweighted), one scale and shift, or the "
        "prediction as it is, of models that predict metres in scenes in m or mm",
        mask=_VIDEO_MASK,
        differs=f"{_SAMPLED}; {_GLOBAL}",
        metrics=(
            "ate", "rpe_translation", "rpe_rotation_deg", *metrics.SURFACE, "abs_rel_scale", "delta_scale",
            "abs_rel_scale_shift", "delta_scale_shift", "abs_rel_metric", "delta_metric",
        ),
        measure=metrics.measure_cut3r,
    ),
    "da3": Protocol(
        source="Depth Anything 3, arXiv 2511.10647: DA3-BENCH, bench/evaluator.py",
        frames=hundred_shuffled,
        frames_in_words="all, of more than 100 those that Python's Random(42) draws",
        crop=longest_side,
        size_in_words="whole image, its longer side 504 (or 504 / 518 of the backbone's size), both rounded to the "
        "patch",
        alignment="Sim(3) of the camera centres, by consensus of ten random halves (seed 42); its scale for the "
        "depths, which are fused (voxels of 4 / 512, truncation 0.04) as seen from predicted or from true cameras; of "
        "1,000,000 points of the surface one per voxel; poses: F_i^-1 F_j, F the pose against the first camera, the "
        "direction up to its sign",
        mask="true depth > 0",
        differs="the truth is fused from the true depth maps in the same way (the benchmark has scans and meshes); "
        "sizes are those of 7-Scenes and HiRoom in the scene's unit (ETH3D: five times as large; ScanNet++: voxels of "
        "0.02, truncation 0.15); depth is fused at the backbone's size (the original: at the image's); DTU without its "
        "observability mask and plane",
        metrics=(
            "auc_3", "auc_5", "auc_15", "auc_30", "f_score", "precision", "recall", "accuracy", "completeness",
            "overall", "f_score_posed", "overall_posed", "overall_dtu",
        ),
        measure=metrics.measure_da3,
    ),
}  # fmt: skip
