"""One training step whose gradients are saved; started by torchrun in two processes, or alone.

python distributed_step.py SCENES OUT
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from training.tiny import CONFIG, tiny_model

from subspace3d.datasets.multiview import MultiViewDataset
from subspace3d.files import save_tensors
from subspace3d.training.device import choose_device, joined_processes
from subspace3d.training.loop import train


class SaveGradients:
    def __init__(self, model: torch.nn.Module, folder: Path) -> None:
        self.model, self.folder = model, folder

    def extra_loss(self) -> torch.Tensor:
        return 0.01 * torch.stack([p.sum() for p in self.model.parameters() if p.requires_grad]).sum()

    def after_step(self, step: int) -> None:
        with joined_processes(choose_device(CONFIG.device)) as processes:
            gradients = {name: p.grad.cpu() for name, p in self.model.named_parameters() if p.grad is not None}
            save_tensors(self.folder / f"gradients-{processes.count}-{processes.rank}.safetensors", gradients)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}


def main(scenes: Path, out: Path) -> None:
    # three scenes of three frames: one for the first process, two for the second, which takes them one by one
    config = dataclasses.replace(
        CONFIG, steps=1, frames=(3, 3), images_per_step=9, max_images=3, clip_norm=1e9, augment=False
    )
    model = tiny_model(method="full")
    train(model, MultiViewDataset(scenes, image_size=28), config, out, hook=SaveGradients(model, out.parent))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
