"""Errors of a pre-trained model on scenes it has not seen."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from subspace3d.backbones.pose import decode_pose
from subspace3d.datasets.multiview import MultiViewDataset
from subspace3d.evaluation.alignment import scale_alignment
from subspace3d.evaluation.depth import absolute_relative, edge_recall
from subspace3d.evaluation.pose import relative_pose_errors


def measure(model: nn.Module, dataset: MultiViewDataset, frames: int) -> dict[str, float]:
    """Errors of depth, depth edges and cameras on the first ``frames`` views of every scene.

    Both the model's and the constant's depth are scaled once per scene by the factor that minimises Abs Rel itself
    (see `scale_alignment`), so the constant compared with is the best one there is for each scene. Camera errors are
    those of all pairs of views of all scenes; edges are found and true as in `edge_recall`, mean over scenes.
    """
    device = next(model.parameters()).device
    model.eval()
    errors: dict[str, list[float]] = {"model": [], "constant": []}
    rotations: list[float] = []
    translations: list[float] = []
    recalls: list[float] = []
    precisions: list[float] = []
    for index in range(len(dataset)):
        scene = dataset.scene(index)
        images = torch.from_numpy(scene.images[:frames]).permute(0, 3, 1, 2)[None].float() / 255
        with torch.no_grad():
            predictions = model(images.to(device))
        depth = predictions["depth"][0, ..., 0].cpu().numpy().astype(np.float64)
        truth = scene.depths[:frames].astype(np.float64)
        valid = truth > 0
        for name, predicted in (("model", depth), ("constant", np.ones_like(truth))):
            scale = scale_alignment(predicted, truth, valid)
            errors[name].append(absolute_relative(scale * predicted, truth, valid))
        recalls.append(edge_recall(depth, truth, valid))
        precisions.append(edge_recall(truth, depth, valid))
        extrinsics, _ = decode_pose(predictions["pose_enc"].cpu(), (images.shape[-2], images.shape[-1]))
        pairs = relative_pose_errors(extrinsics[0].double().numpy(), scene.extrinsics[:frames])
        rotations += pairs.rotation_deg.tolist()
        translations += pairs.translation_deg.tolist()
    return {
        "scenes": len(dataset),
        "frames": frames,
        "abs_rel": float(np.mean(errors["model"])),
        "abs_rel_constant": float(np.mean(errors["constant"])),
        "times_better": float(np.mean(errors["constant"]) / np.mean(errors["model"])),
        "rotation_error_median_deg": float(np.median(rotations)),
        "rotation_error_mean_deg": float(np.mean(rotations)),
        "translation_error_median_deg": float(np.median(translations)),
        "translation_error_mean_deg": float(np.mean(translations)),
        "edge_recall": _mean(recalls),
        "edge_precision": _mean(precisions),
    }


def _mean(values: list[float]) -> float:
    """Of the values that are not NaN; 0 if there is none."""
    kept = [value for value in values if not np.isnan(value)]
    return float(np.mean(kept)) if kept else 0.0
