"""Print the memory table of docs/training.md: estimates for vggt-1b, which need neither its weights nor a GPU.

python benchmarks/training_memory.py
"""

from __future__ import annotations

import argparse
from typing import cast

import torch
from torch import nn

from subspace3d.adapters.methods import apply_method
from subspace3d.backbones.config import named_config
from subspace3d.backbones.targets import target_modules
from subspace3d.backbones.vggt import VGGT
from subspace3d.choices import Method
from subspace3d.training.config import TrainConfig
from subspace3d.training.memory import MemoryEstimate, estimate_memory

# method, rank or K, activation checkpointing, images (in scenes of 8 frames)
ROWS = (
    ("lora", 16, True, 8),
    ("lora", 16, True, 16),
    ("lora", 16, True, 48),
    ("lora", 16, False, 16),
    ("lora", 256, True, 48),
    ("subspace", 256, True, 48),
    ("full", 0, True, 16),
    ("full", 0, True, 48),
)
FRAMES = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="vggt-1b")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    arguments = parser.parse_args()
    print("| method | checkpointing | images at a time | weights | optimiser | activations, gradients | total |")
    print("|---|---|---|---|---|---|---|")
    for method, size, checkpointing, images in ROWS:
        config = TrainConfig(precision=arguments.precision, device="cpu")
        model = build(arguments.backbone, method, size, checkpointing)
        image_size = named_config(arguments.backbone).image_size
        estimate = estimate_memory(model, config, image_size, images // FRAMES, FRAMES)
        print(row(f"{method}{f' {size}' if size else ''}", checkpointing, estimate), flush=True)


def build(backbone: str, method: str, size: int, checkpointing: bool) -> nn.Module:
    """The tuned model with weights that are allocated and never written, so that they take no memory."""
    with torch.device("meta"):
        model = VGGT(named_config(backbone))
    model.to_empty(device="cpu")
    model.enable_checkpointing(checkpointing)
    basis = None
    if method == "subspace":
        shapes = {name: model.get_parameter(f"{name}.weight").shape for name in target_modules(model, "aggregator")}
        basis = {name: (torch.eye(out, size), torch.eye(in_, size)) for name, (out, in_) in shapes.items()}
    return apply_method(model, cast(Method, method), 16 if basis else max(1, size), basis=basis)


def row(name: str, checkpointing: bool, estimate: MemoryEstimate) -> str:
    sizes = (estimate.weights, estimate.optimizer, estimate.step, estimate.total)
    return f"| {name} | {'on' if checkpointing else 'off'} | {estimate.images} | " + " | ".join(
        f"{size / 2**30:.1f} GiB" for size in sizes
    ) + " |"  # fmt: skip


if __name__ == "__main__":
    main()
