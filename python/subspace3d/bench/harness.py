"""How things are timed: interleaved rounds, ratios within a round, and a record of where the numbers come from."""

from __future__ import annotations

import functools
import gc
import json
import math
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from subspace3d import files, outputs, records
from subspace3d.reading import LARGEST_RECORD, parse_json, read_text

Step = Callable[[], None]

CLOCKS = {"wall": time.perf_counter, "process": time.process_time}
"""What measures time on a CPU. The processor time of all threads of the process says how much work a step is on a
machine that others use too, where wall time says how busy they are; it means a duration with one thread only."""

FLUSH_BYTES = 2**28
"""Written between the rounds on a GPU: more than any L2 cache holds."""

PEER_LIBRARIES = ("peft", "triton", "unsloth", "axolotl", "lorafusion")
"""Whose versions a row names, where they are installed."""


# ---- where a number comes from ---------------------------------------------------------------------------------------
def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's name and the cores this process may use. Times compare within one name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return records.processor()


def provenance(device: torch.device) -> dict[str, Any]:
    """Command, device, threads, versions and commit; on a GPU also driver, clocks and power."""
    record: dict[str, Any] = {
        "device": device_name(device),
        "command": records.command_line(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PEER_LIBRARIES if _version(name)},
        "commit": records.commit(),
    }
    if device.type == "cuda":
        fields = "driver_version,clocks.sm,clocks.mem,power.limit,power.draw"
        query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", f"--id={device.index or 0}"]
        values = records.output_of(query).split(", ")
        record["gpu"] = dict(zip(fields.split(","), values))
        record["cuda"] = torch.version.cuda
    return record


def _version(distribution: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def results_path(folder: Path, device: str) -> Path:
    return folder / (re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".jsonl")


def append_rows(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Path | None:
    """Append rows of one device to that device's file; None where there are no rows.

    Raises:
        ValueError: rows, or the file they belong to, name more than one device.
    """
    if not rows:
        return None
    device = one_device(rows)
    path = outputs.claim(results_path(folder, device), outputs.ROWS, "out")
    if path.is_file():
        one_device([*read_rows(path), *rows])
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.open_to_append(path) as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    lines = read_text(path, LARGEST_RECORD).splitlines()
    return [parse_json(line, str(path)) for line in lines if line.strip()]


def one_device(rows: Iterable[Mapping[str, Any]]) -> str:
    """The device all rows were measured on.

    Raises:
        ValueError: they name more than one; times of different devices are not compared.
    """
    devices = sorted({row["device"] for row in rows})
    if len(devices) != 1:
        raise ValueError(f"rows must be of one device, got {', '.join(devices) or 'none'}")
    return devices[0]


# ---- timing ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Timing:
    """Seconds of one step, and its ratio to the baseline's step of the same round: median, 10 % and 90 % quantile."""

    seconds: float
    ratio: tuple[float, float, float]
    rounds: int

    def fields(self, prefix: str = "") -> dict[str, Any]:
        low, middle, high = (round(value, 4) for value in (self.ratio[1], self.ratio[0], self.ratio[2]))
        return {
            f"{prefix}seconds": self.seconds,
            f"{prefix}ratio": middle,
            f"{prefix}ratio_10": low,
            f"{prefix}ratio_90": high,
            f"{prefix}rounds": self.rounds,
        }


def quantile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between the order statistics."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def measure(
    steps: Mapping[str, Step],
    baseline: str,
    device: torch.device,
    rounds: int,
    least_seconds: float,
    clock: str = "wall",
) -> dict[str, Timing]:
    """Time every step in turn, round after round, so that drift of clock and load meets all of them alike.

    Args:
        steps: name -> one step.
        baseline: the name the ratios refer to.
        rounds: rounds that count; one more warms up and does not.
        least_seconds: a step shorter than this is repeated within a round.
        clock: of `CLOCKS`; a GPU is always timed by its own events.
    """
    taken_by = _cuda_seconds if device.type == "cuda" else functools.partial(_cpu_seconds, CLOCKS[clock])
    repeats = {}
    for name, step in steps.items():
        taken_by(step, 1)
        repeats[name] = max(1, math.ceil(least_seconds / max(taken_by(step, 1), 1e-6)))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device) if device.type == "cuda" else None
    names = list(steps)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for number in range(rounds):
            gc.collect()
            # whoever comes first in every round would always meet the same state of the machine
            for name in names[number % len(names) :] + names[: number % len(names)]:
                if flush is not None:
                    flush.zero_()
                seconds[name].append(taken_by(steps[name], repeats[name]))
    finally:
        if collecting:
            gc.enable()
    return {name: _summary(taken, seconds[baseline]) for name, taken in seconds.items()}


def _summary(taken: list[float], baseline: list[float]) -> Timing:
    ratios = [mine / other for mine, other in zip(taken, baseline)]
    return Timing(
        statistics.median(taken), (statistics.median(ratios), quantile(ratios, 0.1), quantile(ratios, 0.9)), len(taken)
    )


def _cpu_seconds(now: Callable[[], float], step: Step, repeats: int) -> float:
    start = now()
    for _ in range(repeats):
        step()
    return (now() - start) / repeats


def _cuda_seconds(step: Step, repeats: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / repeats


def as_graph(step: Step) -> Step:
    """The step captured in a CUDA graph: kernel time without the cost of launching.

    Raises:
        RuntimeError: the step cannot be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


# ---- memory ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Saved:
    """Bytes kept for the backward pass, each storage once; parameters and buffers of the module do not count."""

    activations: int  # storages of at least one value a token
    weights: int  # everything else: casts and folds of weights


def saved_for_backward(forward: Callable[[], Any], owned: Iterable[Tensor], tokens: int) -> Saved:
    """What ``forward`` leaves for its backward pass.

    Args:
        forward: runs the forward pass and returns what holds its graph.
        owned: tensors that exist anyway.
        tokens: a storage counts as activations if its tensor has a size of `tokens`, or of a multiple of it.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in owned}
    found: dict[int, tuple[bool, int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known and storage.nbytes():
            of_tokens = tensor.numel() % tokens == 0
            # the tensor is held so that no other one can come to lie at its address
            found[storage.data_ptr()] = (of_tokens, storage.nbytes(), tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()
    del kept
    of_activations = sum(size for of_tokens, size, _ in found.values() if of_tokens)
    return Saved(of_activations, sum(size for of_tokens, size, _ in found.values() if not of_tokens))


def peak_bytes(step: Step, device: torch.device) -> int | None:
    """Peak of allocated GPU memory beyond what was there before the step; None on a CPU."""
    if device.type != "cuda":
        return None
    step()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


# ---- output ----------------------------------------------------------------------------------------------------------
def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns aligned for a terminal; the first is text, the others are numbers."""
    lines = [[*line, *[""] * (len(header) - len(line))] for line in (header, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    aligned = [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))])
        for line in lines
    ]
    aligned.insert(1, "-" * len(aligned[0]))
    return "\n".join(line.rstrip() for line in aligned)


def mib(size: float | None) -> str:
    return "" if size is None else f"{size / 2**20:.1f}"
