"""What the training loop asks of a source of batches; nothing else of it is known to the loop."""

from __future__ import annotations

from typing import Protocol


class BatchSource(Protocol):
    """Where the loop gets its batches; `subspace3d.datasets.multiview.MultiViewDataset` is one."""

    def batch(self, seed: int, step: int, frames: tuple[int, int], images_per_step: int) -> dict:
        """The scenes of one step, the same for the same arguments: so the step is the position in the data.

        Returns:
            dict: ``images [B, S, 3, H, W]`` float32 in 0..1, ``depths [B, S, H, W]`` float32,
            ``point_masks [B, S, H, W]`` bool, ``extrinsics [B, S, 3, 4]`` float32 OpenCV camera-from-world,
            ``intrinsics [B, S, 3, 3]`` float32 in pixels; other entries are lists of B.
        """
