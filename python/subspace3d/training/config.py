"""The settings of an optimisation run, cheap to import; the string under a field is its help text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from subspace3d import outputs
from subspace3d.settings import require


@dataclass(frozen=True)
class TrainConfig:
    """One optimisation run; the same fields for pre-training, adapters and fine-tuning."""

    steps: int = 400
    """Optimiser steps."""
    lr: float = 0.0
    """Peak learning rate of AdamW; 0: the usual one of the method on the backbone (training/rates.py)."""
    weight_decay: float = 0.05
    """Decoupled weight decay."""
    warmup: float = 0.05
    """Share of the steps in which the rate rises linearly from 1e-3 of lr; cosine to 1e-3 of lr afterwards."""
    clip_norm: float = 1.0
    """L2 gradient clip, separately for aggregator, depth head and camera head."""
    camera_weight: float = 5.0
    """Weight of the camera loss beside a depth loss of weight 1."""
    frames: tuple[int, int] = (2, 6)
    """Least and most frames drawn per scene."""
    images_per_step: int = 16
    """Images in one step, over all processes; scenes per step = images_per_step // frames."""
    max_images: int = 0
    """Most images in one forward pass of one process: the budget that sets the memory. A larger step is accumulated,
    with the same gradients. 0: all at once."""
    image_size: int = 0
    """Images are resized to this many pixels a side; 0: the backbone's own size."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Autocast type; weights and optimiser state stay fp32."""
    checkpointing: bool = True
    """Recompute block activations in the backward pass: less memory, about a third more time."""
    check_memory: bool = True
    """Print an estimate of the memory first, and refuse to start where the device has less left."""
    augment: bool = False
    """Colour jitter on the training images."""
    save_every: int = 200
    """Steps between checkpoints; the newest two are kept."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where the figures of every step go besides metrics.jsonl."""
    seed: int = 0
    """Order of scenes and frames, initialisation of adapters."""
    device: str = "auto"
    """auto: cuda when there is one, else cpu."""
    threads: int = 0
    """CPU threads; 0: torch's default."""
    aspect: tuple[float, float] = (1.0, 1.0)
    """Range of height / width of the images, drawn per step (the paper: 0.33 1); 1 1: square."""
    zoom: tuple[float, float] = (1.0, 1.0)
    """Range of the share of an image's height and width that is kept, drawn per image, capped at 1 (paper: 0.8 1.2)."""
    nearby: float = 0.0
    """Frames of a scene come from a stretch of so many times their number, in recorded order; 0: the whole scene."""

    def __post_init__(self) -> None:
        require(self.steps >= 1, "steps", "at least 1", self.steps)
        require(self.lr >= 0, "lr", "at least 0", self.lr)
        require(0 <= self.warmup < 1, "warmup", "in [0, 1)", self.warmup)
        require(self.camera_weight >= 0, "camera_weight", "at least 0", self.camera_weight)
        require(1 <= self.frames[0] <= self.frames[1], "frames", "1 <= least <= most", self.frames)
        require(
            self.images_per_step >= self.frames[1],
            "images_per_step",
            f"at least the most frames per scene ({self.frames[1]})",
            self.images_per_step,
        )
        require(
            self.max_images == 0 or self.max_images >= self.frames[1],
            "max_images",
            f"0 or at least the most frames per scene ({self.frames[1]})",
            self.max_images,
        )
        require(self.save_every >= 1, "save_every", "at least 1", self.save_every)


def check_cache(folder: Path | None, gigabytes: float, train: TrainConfig) -> None:
    if folder is not None:
        same = "with cache_tokens (the same image must look the same)"
        require(not train.augment, "augment", f"off {same}", True)
        for name in ("aspect", "zoom"):
            require(getattr(train, name) == (1.0, 1.0), name, f"1 1 {same}", getattr(train, name))
        require(gigabytes > 0, "cache_gigabytes", "positive", gigabytes)


def cache_target(folder: Path | None) -> list[outputs.Output]:
    """What a command with this folder of tokens writes there."""
    return [] if folder is None else [outputs.Output("cache_tokens", folder, outputs.TOKENS)]
