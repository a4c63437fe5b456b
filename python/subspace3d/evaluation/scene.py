"""The metrics of one scene, for a model at hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from subspace3d.evaluation.alignment import scale_alignment
from subspace3d.evaluation.depth import absolute_relative
from subspace3d.evaluation.predict import predict
from subspace3d.evaluation.scene_metrics import SceneResult, Views, measure

if TYPE_CHECKING:
    import torch

    from subspace3d.formats.scene import Scene


def abs_rel(model: torch.nn.Module, scene: Scene, frames: Sequence[int]) -> float:
    """``mean |s d - d*| / d*`` over the valid pixels of ``frames``, s the scale that fits all views of the scene best.

    All views are predicted in one forward pass; arguments as in `evaluate_scene`.
    """
    predicted = predict(model, scene.images, next(model.parameters()).device).depths
    mask, chosen = scene.depths > 0, list(frames)
    scale = scale_alignment(predicted, scene.depths, mask)
    return absolute_relative(scale * predicted[chosen], scene.depths[chosen], mask[chosen])


def evaluate_scene(model: torch.nn.Module, scene: Scene, icp_threshold: float = 0.1) -> SceneResult:
    """Predict all views of a scene in one forward pass and measure every metric of docs/evaluation.md.

    Args:
        model (torch.nn.Module): what a backbone built, plain or adapted, or any VGGT; left in evaluation mode.
        scene (Scene): what `load_scene` returned, at a size the model takes.
        icp_threshold (float): largest correspondence distance of ICP, in the scene's unit.

    Returns:
        SceneResult: ``metrics`` by name (None where one is not defined, with the reason in ``reasons``).

    Raises:
        ValueError: fewer than 3 pixels of a scene of one view have depth.
        ImportError: SciPy cannot be imported.
    """
    true = Views(scene.depths, scene.intrinsics, scene.extrinsics, scene.translation_known, unit=scene.unit)
    device = next(model.parameters()).device
    return measure(predict(model, scene.images, device), true, icp_threshold)
