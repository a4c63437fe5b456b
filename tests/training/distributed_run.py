"""A short training run that may be cut off after a step; started by torchrun in two processes, or alone.

python distributed_run.py SCENES OUT [STOP [fails | signal]]
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from training.tiny import CONFIG, tiny_model

from subspace3d.datasets.multiview import MultiViewDataset
from subspace3d.training.loop import train

STEPS = 6


class StopAfter:
    """Ends the process after a step and before its checkpoint, on every rank alike, or in one process alone.

    how: "" on every rank; "fails", an exception on rank 1; "signal", a SIGTERM to rank 0.
    """

    def __init__(self, step: int, how: str = "") -> None:
        self.step, self.how, self.rank = step, how, os.environ.get("RANK", "0")

    def extra_loss(self) -> torch.Tensor:
        return torch.zeros(())

    def after_step(self, step: int) -> None:
        if step != self.step:
            return
        if not self.how:
            raise SystemExit(0)
        if self.how == "fails" and self.rank == "1":
            raise ValueError("this process has a fault of its own")
        if self.how == "signal" and self.rank == "0":
            os.kill(os.getpid(), signal.SIGTERM)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}


def main(scenes: Path, out: Path, stop: int = 0, how: str = "") -> None:
    config = dataclasses.replace(CONFIG, steps=STEPS, save_every=3, frames=(2, 2), images_per_step=4)
    hook = StopAfter(stop, how)
    try:
        train(tiny_model(method="full"), MultiViewDataset(scenes, image_size=28), config, out, hook=hook, quiet=True)
    except SystemExit:
        if not stop or how:
            raise


if __name__ == "__main__":
    # {rank} in the folder stands for the process's number
    place = Path(sys.argv[2].format(rank=os.environ.get("RANK", "0")))
    main(Path(sys.argv[1]), place, int(sys.argv[3]) if len(sys.argv) > 3 else 0, *sys.argv[4:])
