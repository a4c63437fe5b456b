"""What the training loop asks of a source of batches and of a tuning method; nothing else of them is known to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch


class BatchSource(Protocol):
    """Where the loop gets its batches; `subspace3d.datasets.multiview.MultiViewDataset` is one."""

    def batch(self, seed: int, step: int, frames: tuple[int, int], images_per_step: int) -> dict:
        """The scenes of one step, the same for the same arguments: so the step is the position in the data.

        Returns:
            dict: ``images [B, S, 3, H, W]`` float32 in 0..1, ``depths [B, S, H, W]`` float32,
            ``point_masks [B, S, H, W]`` bool, ``extrinsics [B, S, 3, 4]`` float32 OpenCV camera-from-world,
            ``intrinsics [B, S, 3, 3]`` float32 in pixels; other entries are lists of B.
        """


class StepHook(Protocol):
    """What a tuning method does in a step besides having trainable parameters."""

    def penalty(self) -> torch.Tensor | None:
        """A scalar added to the loss once per step; none if there is none."""

    def after_step(self, step: int) -> None:
        """Called after step ``step`` (from 0) of the optimiser, while the gradients are still there."""

    def state(self) -> dict[str, torch.Tensor]:
        """What must be kept in a checkpoint."""

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take back what `state` gave."""
