"""What the training loop asks of a source of batches and of a tuning method; nothing else of them is known to it."""

from __future__ import annotations

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


class MethodHook(Protocol):
    """What a tuning method does in a step besides having trainable parameters."""

    def extra_loss(self) -> torch.Tensor:
        """A scalar with a gradient that is added to the loss; called once per step, outside autocast."""

    def after_step(self, step: int) -> None:
        """``step`` optimiser steps are done; gradients are still in place. Not called after a step that was skipped."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """State by name; a checkpoint is loaded by copying into these tensors."""
