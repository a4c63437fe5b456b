"""The settings of every verb: plain frozen dataclasses, cheap to import, checked where they are made.

The string under a field is its help text on the command line.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Attribute = Literal["texture", "geometry", "camera", "lighting"]
ATTRIBUTES: tuple[Attribute, ...] = ("texture", "geometry", "camera", "lighting")
Method = Literal["none", "full", "lora", "subspace"]
Variant = Literal["auto", "cuda", "llvm", "scalar"]


def _require(condition: bool, name: str, rule: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{name} must be {rule}, got {value!r}")


@dataclass(frozen=True)
class DoctorConfig:
    """Say what this machine has and what is missing."""

    json: bool = False
    """Print one JSON object instead of text."""


@dataclass(frozen=True)
class GenerateConfig:
    """Render multi-view scenes in which one attribute varies from scene to scene: OUT/<data set>/<scene>/scene.json."""

    out: Path
    """Folder of the data sets."""
    attribute: Literal["texture", "geometry", "camera", "lighting", "all"] = "texture"
    """What varies within a data set; the other attributes are drawn once per data set. all: everything varies."""
    preset: Literal["paper", "generic"] = "paper"
    """paper: extreme ranges, objects alone. generic: milder ranges, objects on a ground plane, some before walls."""
    datasets: int = 1
    """Number of data sets, named <name>_00, <name>_01, ..."""
    scenes: int = 200
    """Scenes per data set."""
    views: int = 100
    """Images per scene."""
    resolution: int = 518
    """Image width and height in pixels."""
    spp: int = 64
    """Samples per pixel."""
    seed: int = 0
    """Root seed; every random draw follows from it."""
    name: str = ""
    """Prefix of the data set names; empty: the attribute."""
    workers: int = 0
    """Processes; 0: one per core."""
    variant: Variant = "auto"
    """Mitsuba variant; auto: the fastest that works on this machine."""

    def __post_init__(self) -> None:
        for name in ("datasets", "scenes", "views", "resolution", "spp"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        _require(self.workers >= 0, "workers", "at least 0", self.workers)


@dataclass(frozen=True)
class TrainConfig:
    """One optimisation run; the same fields for pre-training, adapters and fine-tuning."""

    steps: int = 400
    """Optimiser steps."""
    lr: float = 1e-5
    """Peak learning rate of AdamW."""
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
    """Images in one step; scenes per step = images_per_step // frames."""
    image_size: int = 0
    """Images are resized to this many pixels a side; 0: the backbone's own size."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Autocast type; weights and optimiser state stay fp32."""
    checkpointing: bool = False
    """Recompute block activations in the backward pass: less memory, about a third more time."""
    augment: bool = False
    """Colour jitter on the training images."""
    save_every: int = 200
    """Steps between checkpoints."""
    seed: int = 0
    """Order of scenes and frames, initialisation of adapters."""
    device: str = "auto"
    """auto: cuda when there is one, else cpu."""
    threads: int = 0
    """CPU threads; 0: torch's default."""

    def __post_init__(self) -> None:
        _require(self.steps >= 1, "steps", "at least 1", self.steps)
        _require(self.lr > 0, "lr", "positive", self.lr)
        _require(0 <= self.warmup < 1, "warmup", "in [0, 1)", self.warmup)
        _require(self.camera_weight >= 0, "camera_weight", "at least 0", self.camera_weight)
        _require(1 <= self.frames[0] <= self.frames[1], "frames", "1 <= least <= most", self.frames)
        _require(
            self.images_per_step >= self.frames[1],
            "images_per_step",
            f"at least the most frames per scene ({self.frames[1]})",
            self.images_per_step,
        )


@dataclass(frozen=True)
class AdaptConfig:
    """Tune one stock PEFT LoRA per data set found below SCENES; OUT/<data set> is a PEFT adapter folder."""

    scenes: Path
    """Folder with data sets anywhere below it (a data set is a folder of scenes)."""
    out: Path
    """Adapters are written below it at the same relative paths."""
    backbone: str = "vggt-nano"
    """vggt-nano or vggt-1b."""
    weights: Path | None = None
    """Weights of the backbone; none: those shipped with the package (nano only)."""
    rank: int = 16
    """LoRA rank r; lora_alpha is 2 r."""
    targets: str = "all"
    """Target preset: aggregator, heads, all."""
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class MineConfig:
    """Mine the subspace that all PEFT adapters below ADAPTERS share, module by module."""

    adapters: Path
    """Every PEFT adapter folder below it is one adapter."""
    out: Path
    """Subspace file (.safetensors)."""
    k: int = 16
    """Rank of the shared subspace."""
    p: float = 1.0
    """Exponent of the residual norm, 0 < p <= 2; 2 is the plain mean."""
    eps: float = 1e-3
    """Smoothing, relative to the median norm of the updates."""
    max_iter: int = 50
    """Most IRLS iterations."""
    tol: float = 1e-6
    """Stop when no weight moves by more than this, relative."""

    def __post_init__(self) -> None:
        _require(self.k >= 1, "k", "at least 1", self.k)
        _require(0 < self.p <= 2, "p", "in (0, 2]", self.p)
        _require(self.eps > 0, "eps", "positive", self.eps)
        _require(self.max_iter >= 1, "max_iter", "at least 1", self.max_iter)
        _require(self.tol >= 0, "tol", "at least 0", self.tol)


@dataclass(frozen=True)
class AnalyzeConfig:
    """Spectra and disentanglement of mined subspaces as JSON and PNG."""

    subspaces: tuple[Path, ...]
    """Subspace files, or folders of them; a file's stem names its attribute."""
    out: Path
    """Folder for analysis.json and the figures."""


@dataclass(frozen=True)
class FinetuneConfig:
    """Tune a backbone on scenes by one method."""

    scenes: Path
    """Training scenes: a folder with scenes anywhere below it."""
    out: Path
    """Run folder."""
    method: Method = "subspace"
    """none: only writes the run folder, so that it can be evaluated as the base."""
    backbone: str = "vggt-nano"
    """vggt-nano or vggt-1b."""
    weights: Path | None = None
    """Weights of the backbone; none: those shipped with the package (nano only)."""
    subspaces: tuple[Path, ...] = ()
    """Subspace files (or folders of them) whose concatenation is the frozen basis; method subspace only."""
    rank: int = 16
    """LoRA rank: of the whole adapter for lora, of the adapters on the heads for subspace."""
    K: int = 0
    """subspace: keep only this many leading principal directions of the concatenation; 0: all."""
    resume: bool = True
    """Continue from the newest checkpoint in OUT, if there is one."""
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure a backbone and tuned runs of it on scenes: point clouds, depth, cameras; per scene and mean."""

    scenes: Path
    """Test scenes: a folder with scenes anywhere below it."""
    out: Path
    """Folder for results.json and the depth pictures."""
    tuned: tuple[Path, ...] = ()
    """Run folders of finetune; the base model is always measured beside them."""
    backbone: str = "vggt-nano"
    """vggt-nano or vggt-1b."""
    weights: Path | None = None
    """Weights of the backbone; none: those shipped with the package (nano only)."""
    frames: int = 8
    """Frames used per scene, evenly spaced."""
    icp_threshold: float = 0.1
    """Largest correspondence distance of ICP, in scene units."""
    images: int = 4
    """Scenes whose images and depth maps are kept for the report."""
    device: str = "auto"
    """auto: cuda when there is one, else cpu."""


@dataclass(frozen=True)
class ReportConfig:
    """Write one self-contained HTML page about a run folder."""

    run: Path
    """Run folder of demo, or any folder with results.json and analysis.json below it."""
    out: Path | None = None
    """Page to write; none: RUN/report/index.html."""


@dataclass(frozen=True)
class ParamsConfig:
    """Count trainable parameters of a method, without loading weights."""

    backbone: str = "vggt-1b"
    """vggt-nano or vggt-1b."""
    method: Literal["full", "lora", "pissa", "adalora", "psv", "subspace"] = "lora"
    """Tuning method; pissa counts like lora, psv like subspace."""
    rank: int = 16
    """r for the LoRA family, K for subspace and psv."""
    head_cores: bool = False
    """subspace and psv: also a core on every head module whose smaller side is 256 or more, beside its LoRA."""
    json: bool = False
    """Print the counts per part as JSON."""

    def __post_init__(self) -> None:
        _require(self.rank >= 1, "rank", "at least 1", self.rank)


@dataclass(frozen=True)
class BenchConfig:
    """Time the fused layer or the mining beside its peers: bench linear, block, step or mining."""

    benchmark: Literal["linear", "block", "step", "mining"] = "linear"
    """linear: one layer, every peer. block: one VGGT-1B block. step: a training step. mining: IRLS and dense route."""
    out: Path | None = None
    """Folder that gets the rows as <device>.jsonl; without it they are only printed."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to measure; auto: the GPU if there is one."""
    precision: Literal["auto", "fp32", "bf16", "autocast"] = "auto"
    """autocast: float32 weights under bfloat16 autocast. auto: autocast on a GPU, fp32 on a CPU."""
    views: tuple[int, ...] = (2,)
    """linear, block, step: images of 1,374 tokens; several values are several cases."""
    shapes: tuple[Literal["qkv", "proj", "fc1", "fc2"], ...] = ("qkv", "proj", "fc1", "fc2")
    """linear: which layers of VGGT-1B."""
    cores: tuple[int, ...] = (64,)
    """linear, block, step: K, columns of the subspaces; several values are several cases."""
    rank: int = 16
    """LoRA rank r of the peers, and of the adapters that are mined."""
    peers: tuple[str, ...] = ()
    """linear: which peers, by the names in subspace3d.bench.peers; empty: all (on a CPU all but lora-compiled)."""
    rounds: int = 0
    """Interleaved rounds; 0: 30 on a GPU, 7 on a CPU."""
    clock: Literal["wall", "process"] = "wall"
    """On a CPU. process: processor time, for a machine that others use too; only with OMP_NUM_THREADS=1."""
    backbone: Literal["auto", "vggt-nano", "vggt-1b"] = "auto"
    """step: which model, random weights; auto: vggt-1b on a GPU, vggt-nano on a CPU."""
    layers: int = 48
    """mining: matrices of each shape."""
    adapters: int = 10
    """mining: adapters N of the attribute."""
    k: int = 16
    """mining: rank of the subspace."""
    iterations: int = 20
    """mining: IRLS iterations, none saved by convergence."""
    dense: int = 3
    """mining: matrices of each shape that also take the dense route; 0: skip it."""
    sweep: bool = False
    """mining: instead, show how the time grows with layers, N and r."""

    def __post_init__(self) -> None:
        for name in ("views", "cores"):
            values = getattr(self, name)
            _require(len(values) > 0 and min(values) >= 1, name, "one or more sizes of at least 1", values)
        _require(max(self.cores) <= 1024, "cores", "at most 1024, the width of VGGT-1B", self.cores)
        _require(len(self.shapes) > 0, "shapes", "at least one shape", self.shapes)
        for name in ("rank", "layers", "adapters", "k", "iterations"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("rounds", "dense"):
            _require(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))

    def rounds_on(self, device: str) -> int:
        return self.rounds or (30 if device == "cuda" else 7)


@dataclass(frozen=True)
class DemoConfig:
    """Run the whole method at nano scale: render, adapt, mine, analyze, fine-tune, evaluate, report."""

    out: Path = Path("runs/demo")
    """Run folder; a run that was cut off continues in it."""
    smoke: bool = False
    """The least that still runs every stage, in about a minute; its numbers mean nothing."""
    seed: int = 0
    """Root seed."""
