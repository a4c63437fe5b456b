"""The smallest VGGT and settings the loop's tests train with."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from adapters.models import TINY
from torch import nn

from subspace3d.adapters.methods import apply_method
from subspace3d.backbones.vggt import VGGT
from subspace3d.training.config import TrainConfig

CONFIG = TrainConfig(
    steps=6,
    lr=1e-3,
    frames=(2, 3),
    images_per_step=3,
    save_every=3,
    augment=True,
    device=os.environ.get("SUBSPACE_TEST_DEVICE", "cpu"),
    threads=1,
)


def tiny_model(seed: int = 0, method: str = "lora") -> nn.Module:
    torch.manual_seed(seed)
    return apply_method(VGGT(TINY), method, rank=2)  # type: ignore[arg-type]


def read_metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def without_time(lines: list[dict]) -> list[dict]:
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
