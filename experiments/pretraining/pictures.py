"""Pictures of a pre-training: the curve of every loss, and depth predicted on held-out scenes."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

from subspace3d.datasets.multiview import MultiViewDataset
from subspace3d.evaluation.alignment import scale_alignment
from subspace3d.files import atomic_path


def plot_losses(metrics: list[Path], start: int, picture: Path) -> None:
    """Every logged term of the long run up to step ``start`` and of the cooldown after it, smoothed over 1 %."""
    long_run, cooldown = (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in metrics
    )
    lines = [line for line in (*long_run[:start], *cooldown) if line["loss"] is not None]
    images = np.array([line["images"] for line in lines]) / 1000
    width = max(1, len(lines) // 100)
    figure, axes = plt.subplots(2, 4, figsize=(14, 6), sharex=True, layout="constrained")
    names = ("rotation", "translation", "fov", "match", "points", "depth_error", "depth_gradient", "lr")
    for axis, name in zip(axes.flat, names):
        values = [line.get(name, np.nan) for line in lines]
        axis.plot(images[width - 1 :], np.convolve(values, np.ones(width) / width, mode="valid"), linewidth=1)
        axis.set_title(name)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("thousand images")
    with atomic_path(picture) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)


def draw_examples(model: nn.Module, measured: dict[str, MultiViewDataset], picture: Path, scenes: int = 2) -> None:
    """First view of a few scenes of every kind: image, true depth, predicted depth in the colours of the true one."""
    figure, axes = plt.subplots(len(measured), 3 * scenes, figsize=(2 * 3 * scenes, 2.1 * len(measured)))
    figure.subplots_adjust(left=0.03, right=0.998, bottom=0.005, top=0.95, wspace=0.03, hspace=0.03)
    for row, (name, dataset) in zip(axes, measured.items()):
        row[0].set_ylabel(name)
        for index, (image, true, predicted) in enumerate(zip(row[::3], row[1::3], row[2::3])):
            scene = dataset.scene(index)
            images = torch.from_numpy(scene.images[:4]).permute(0, 3, 1, 2)[None].float() / 255
            with torch.no_grad():
                depth = model(images.to(next(model.parameters()).device))["depth"][0, 0, ..., 0].cpu().numpy()
            truth = np.where(scene.depths[0] > 0, scene.depths[0], np.nan)
            scale = scale_alignment(
                depth[None].astype(np.float64), scene.depths[:1].astype(np.float64), truth[None] > 0
            )
            low, high = np.nanpercentile(truth, (2, 98))
            image.imshow(scene.images[0])
            true.imshow(truth, cmap="turbo_r", vmin=low, vmax=high)
            predicted.imshow(np.where(np.isnan(truth), np.nan, scale * depth), cmap="turbo_r", vmin=low, vmax=high)
    for axis, title in zip(axes[0], ("image", "true depth", "predicted depth") * scenes):
        axis.set_title(title, fontsize=10)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    with atomic_path(picture) as temporary:
        figure.savefig(temporary, dpi=80)
    plt.close(figure)
