"""The settings of the benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from subspace3d import outputs
from subspace3d.settings import require


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
    """linear: which peers, by the names in subspace3d.bench.peers; empty: all (on a CPU all but lora-compiled
    and fold-separate)."""
    rounds: int = 0
    """Interleaved rounds; 0: 30 on a GPU, 7 on a CPU."""
    clock: Literal["wall", "process"] = "wall"
    """On a CPU. process: processor time, for a machine that others use too; only with OMP_NUM_THREADS=1."""
    backbone: str = "auto"
    """step: a preset or package.module:factory, random weights; auto: vggt-1b on a GPU, vggt-nano on a CPU."""
    layers: int = 48
    """mining: matrices of each shape."""
    adapters: int = 10
    """mining: adapters N of the attribute."""
    k: int = 16
    """mining: rank of the subspace."""
    iterations: int = 20
    """mining: IRLS iterations; tol is 0, so that only weights that no longer move at all save any."""
    model: Literal["mean", "shared"] = "mean"
    """mining: what the adapters are taken to share."""
    spectra: tuple[Literal["planted", "drift", "unrelated"], ...] = ("planted", "drift", "unrelated")
    """mining: what the adapters are made of. planted: a strong shared part. drift: as tuned ones are, random lora_A and
    a shared drift of lora_B as large as the rest. unrelated: nothing shared."""
    dense: int = 3
    """mining: matrices of each shape that also take the dense route (model mean); 0: skip it."""
    sweep: bool = False
    """mining: instead, show how the time grows with layers, N and r."""

    def __post_init__(self) -> None:
        for name in ("views", "cores"):
            values = getattr(self, name)
            require(len(values) > 0 and min(values) >= 1, name, "one or more sizes of at least 1", values)
        require(max(self.cores) <= 1024, "cores", "at most 1024, the width of VGGT-1B", self.cores)
        require(len(self.shapes) > 0, "shapes", "at least one shape", self.shapes)
        require(len(self.spectra) > 0, "spectra", "at least one spectrum", self.spectra)
        for name in ("rank", "layers", "adapters", "k", "iterations"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("rounds", "dense"):
            require(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))

    def writes(self) -> list[outputs.Output]:
        return [] if self.out is None else [outputs.Output("out", self.out, outputs.FOLDER)]

    def rounds_on(self, device: str) -> int:
        return self.rounds or (30 if device == "cuda" else 7)
