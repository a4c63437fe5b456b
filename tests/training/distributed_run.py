"""A short training run that may be cut off after a step; started by torchrun in two processes, or alone.

python distributed_run.py SCENES OUT [STOP]
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from training.tiny import CONFIG, tiny_model

from subspace3d.datasets.multiview import MultiViewDataset
from subspace3d.training.loop import train

STEPS = 6


class StopAfter:
    """Ends the process after a step and before its checkpoint, on every rank alike."""

    def __init__(self, step: int) -> None:
        self.step = step

    def extra_loss(self) -> torch.Tensor:
        return torch.zeros(())

    def after_step(self, step: int) -> None:
        if step == self.step:
            raise SystemExit(0)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}


def main(scenes: Path, out: Path, stop: int = 0) -> None:
    config = dataclasses.replace(CONFIG, steps=STEPS, save_every=3, frames=(2, 2), images_per_step=4)
    hook = StopAfter(stop)
    try:
        train(tiny_model(method="full"), MultiViewDataset(scenes, image_size=28), config, out, hook=hook, quiet=True)
    except SystemExit:
        if not stop:
            raise


if __name__ == "__main__":
    # {rank} in the folder stands for the process's number
    place = Path(sys.argv[2].format(rank=os.environ.get("RANK", "0")))
    main(Path(sys.argv[1]), place, int(sys.argv[3]) if len(sys.argv) > 3 else 0)
