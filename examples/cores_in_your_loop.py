"""Train cores inside mined subspaces in a training loop of your own.

    python examples/cores_in_your_loop.py --scenes data/glass_train --subspaces subspaces --out cores.safetensors

The model here is the small VGGT that ships with the package; any nn.Module will do. `inject` freezes it and puts a
trained core on every module of the basis; the loop is plain PyTorch.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

import subspace3d as s3
from subspace3d.backbones.losses import multitask_loss
from subspace3d.training.normalization import normalize_scenes


def main(arguments: Sequence[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=Path, required=True, help="folder of scenes to train on")
    parser.add_argument("--subspaces", type=Path, required=True, help="folder of subspace files made by `mine`")
    parser.add_argument("--out", type=Path, required=True, help="file that gets the trained cores")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--image-size", type=int, default=112)
    options = parser.parse_args(arguments)

    model = s3.build_backbone("vggt-nano")
    names = s3.inject(model, s3.build_basis(sorted(options.subspaces.glob("*.safetensors"))))
    cores = {name: p for name, p in model.named_parameters() if p.requires_grad}
    print(f"{len(names)} modules have a core; {sum(p.numel() for p in cores.values()):,} parameters are trained")

    dataset = s3.MultiViewDataset(options.scenes, options.image_size)
    optimizer = torch.optim.AdamW(cores.values(), lr=options.lr, weight_decay=0.0)
    losses = []
    for step in range(options.steps):
        # the batch of a step depends on (seed, step) alone, so a run can continue anywhere
        batch, _ = normalize_scenes(dataset.batch(seed=0, step=step, frames=(2, 4), images_per_step=8))
        loss = multitask_loss(model(batch["images"]), batch)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(cores.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step}: loss {losses[-1]:.4f}")

    save_file({name: p.detach().contiguous() for name, p in cores.items()}, options.out)
    print(f"cores -> {options.out}")
    return losses


if __name__ == "__main__":
    main()
