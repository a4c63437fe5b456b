"""The training loop: AdamW, warm-up and cosine, per-part clipping, checkpoints a killed run continues from."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import platform
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from subspace3d.adapters.hooks import MethodHook
from subspace3d.adapters.parameters import PARTS, part_of, trainable_parameters
from subspace3d.configs import TrainConfig
from subspace3d.datasets.multiview import MultiViewDataset
from subspace3d.files import write_text
from subspace3d.progress import Progress
from subspace3d.training import checkpoints
from subspace3d.training.losses import multitask_loss
from subspace3d.training.normalization import normalize_scenes
from subspace3d.training.schedule import learning_rate

_MOST_SKIPPED = 10
# these change how a run is carried out, not what it computes
_FREE_FIELDS = ("device", "threads", "save_every", "checkpointing")


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run did, over all its starts."""

    steps: int
    skipped: int
    """Steps left out because the loss or a gradient was not finite."""
    seconds: float
    peak_memory_bytes: int
    """CUDA: most memory allocated by tensors. CPU: most resident memory of the process."""
    loss: float | None
    """Mean of the last ten steps that were not skipped; none if there was none."""


def choose_device(name: str) -> torch.device:
    """``auto`` is cuda when there is one, else cpu; any other name is taken as it is."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def device_name(name: str) -> str:
    """What `choose_device` takes, in words: the name of the GPU, or the CPU's architecture and cores."""
    device = choose_device(name)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {os.cpu_count()} cores, {platform.machine()}"


def run_settings(config: TrainConfig, others: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a run computes depends on: ``config`` without device, threads and the like, and ``others``; as in JSON."""
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in _FREE_FIELDS}
    # through JSON and back, so that a saved tuple compares equal to the list it became
    return json.loads(json.dumps({**settings, **(others or {})}))


def set_modes(model: nn.Module) -> None:
    """Training mode for modules that hold something trainable, evaluation mode for all others."""
    for module in model.modules():
        module.training = any(parameter.requires_grad for parameter in module.parameters())


def train(
    model: nn.Module,
    dataset: MultiViewDataset,
    config: TrainConfig,
    out: Path,
    groups: Iterable[dict] | None = None,
    resume: bool = True,
    log_every: int = 1,
    label: str = "train",
    settings: Mapping[str, Any] | None = None,
    hook: MethodHook | None = None,
) -> TrainResult:
    """Minimise `multitask_loss` over the trainable parameters of ``model``, in place.

    Writes ``out/metrics.jsonl`` and ``out/checkpoints/step_N``. A run that was cut off continues from its newest
    checkpoint; on the CPU it then ends in the same bits as one that was not. SIGINT and SIGTERM finish the step, save
    a checkpoint and raise SystemExit with 128 + the signal's number.

    Args:
        model (nn.Module): maps ``images [B, S, 3, H, W]`` to ``pose_enc_list``, ``depth``, ``depth_conf``; what has
            ``requires_grad`` is trained.
        dataset (MultiViewDataset): source of the batches.
        config (TrainConfig): length, rates, batch, precision, device.
        out (Path): run folder.
        groups (Iterable[dict]): AdamW parameter groups; none: one group with the configured weight decay.
        resume (bool): continue from the newest checkpoint below ``out``; otherwise start over.
        log_every (int): steps per line of metrics.jsonl.
        label (str): name of the run in the progress display.
        settings (Mapping | None): JSON values a checkpoint must have been made with, besides those of ``config``.
        hook (MethodHook | None): what the tuning method adds to a step, see `method_hook`.

    Raises:
        ValueError: nothing is trainable, or the checkpoint belongs to other settings or another model.
        RuntimeError: the loss or a gradient was not finite in ten steps in a row; the last checkpoint is intact.
        SystemExit: stopped by a signal.
    """
    device = choose_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    model.to(device)
    set_modes(model)
    parameters = trainable_parameters(model)
    if not parameters:
        raise ValueError("model must have trainable parameters, got none")
    optimizer = torch.optim.AdamW(
        groups if groups is not None else [{"params": list(parameters.values())}],
        lr=config.lr,
        weight_decay=config.weight_decay,
        fused=True,
    )
    run = _Run(model, parameters, optimizer, config, out, device, log_every, settings, hook)
    run.start(resume)
    with _stop_requests() as stop, ThreadPoolExecutor(1, "batch") as pool:
        progress = Progress(label, config.steps, initial=run.step)
        with progress:
            _steps(run, dataset, pool, stop, progress)
    return run.result()


def _steps(
    run: _Run, dataset: MultiViewDataset, pool: ThreadPoolExecutor, stop: list[signal.Signals], progress: Progress
) -> None:
    config = run.config

    def draw(step: int) -> dict:
        return dataset.batch(config.seed, step, config.frames, config.images_per_step)

    pending = pool.submit(draw, run.step) if run.step < config.steps else None
    while pending is not None:
        batch = pending.result()
        pending = pool.submit(draw, run.step + 1) if run.step + 1 < config.steps else None
        note = run.take_step(batch)
        progress.advance(note=note)
        if run.step % config.save_every == 0 or run.step == config.steps or stop:
            saved = run.save()
            if stop:
                print(
                    f"\nstopped by {stop[0].name} after step {run.step}; the same command continues from {saved}",
                    file=sys.stderr,
                )
                raise SystemExit(128 + stop[0])


class _Run:
    """Counters of one run and the three things done with them: take a step, save, start from what was saved."""

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        out: Path,
        device: torch.device,
        log_every: int,
        settings: Mapping[str, Any] | None,
        hook: MethodHook | None,
    ) -> None:
        self.settings = run_settings(config, settings)
        self.hook = hook
        self.model, self.parameters, self.optimizer = model, parameters, optimizer
        self.config, self.out, self.device, self.log_every = config, out, device, log_every
        self.clipped = {part: [p for n, p in parameters.items() if part_of(n) == part] for part in (*PARTS, "other")}
        self.clipped = {part: members for part, members in self.clipped.items() if members}
        self.step = self.skipped = self.skipped_in_a_row = self.images = 0
        self.losses: list[float] = []
        self.peak_memory = 0
        self._seconds_before = 0.0
        self._images_before = 0
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started

    def start(self, resume: bool) -> None:
        """Load the newest checkpoint, if there is one and it is wanted, and cut metrics.jsonl back to its step."""
        self.out.mkdir(parents=True, exist_ok=True)
        if not resume:
            shutil.rmtree(self.out / "checkpoints", ignore_errors=True)
        path = checkpoints.latest(self.out / "checkpoints")
        if path is not None:
            state = checkpoints.read_state(path)
            self._check_settings(path, state["settings"])
            checkpoints.load(path, self._saved(), self.optimizer)
            self.step, self.skipped, self.skipped_in_a_row = (
                state[key] for key in ("step", "skipped", "skipped_in_a_row")
            )
            self.images = self._images_before = state["images"]
            self.losses, self.peak_memory = state["losses"], state["peak_memory_bytes"]
            self._seconds_before = state["seconds"]
        metrics = self.out / "metrics.jsonl"
        if metrics.is_file():
            lines = metrics.read_text(encoding="utf-8").splitlines()
            write_text(metrics, "".join(line + "\n" for line in _lines_until(lines, self.step)))
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._started = time.monotonic()

    def _check_settings(self, path: Path, before: dict) -> None:
        for name, value in self.settings.items():
            if before.get(name) != value:
                raise ValueError(
                    f"{name} must be {before.get(name)!r} to continue from {path}, got {value!r}; "
                    "choose another output folder or start over"
                )

    def take_step(self, batch: dict) -> str:
        """One optimiser step on one batch; returns the note for the progress display."""
        rate = learning_rate(self.step, self.config.steps, self.config.lr, self.config.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = {key: value.to(self.device) if torch.is_tensor(value) else value for key, value in batch.items()}
        batch, _ = normalize_scenes(batch)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            predictions = self.model(batch["images"])
        terms = multitask_loss(predictions, batch, self.config.camera_weight)
        objective = terms["loss"]
        if self.hook is not None:
            # beside the loss, not in it: curves of different methods stay comparable
            terms["regularizer"] = self.hook.extra_loss()
            objective = objective + terms["regularizer"]
        self.optimizer.zero_grad(set_to_none=True)
        finite = bool(objective.isfinite())
        norms: dict[str, float] = {}
        if finite:
            objective.backward()
            norms = {
                part: float(nn.utils.clip_grad_norm_(members, self.config.clip_norm))
                for part, members in self.clipped.items()
            }
            finite = all(map(math.isfinite, norms.values()))
        if finite:
            self.optimizer.step()
            if self.hook is not None:
                self.hook.after_step(self.step + 1)
        self.step += 1
        self.images += batch["images"].shape[0] * batch["images"].shape[1]
        self._count(finite)
        if finite:
            self._log(terms, norms, rate)
        speed = (self.images - self._images_before) / max(1e-9, time.monotonic() - self._started)
        loss = f"{self.losses[-1]:.4f}" if self.losses else "not finite"
        return f"loss {loss}, {speed:.1f} images/s, {self._memory() / 2**30:.2f} GiB"

    def _count(self, finite: bool) -> None:
        if finite:
            self.skipped_in_a_row = 0
            return
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= _MOST_SKIPPED:
            newest = checkpoints.latest(self.out / "checkpoints")
            raise RuntimeError(
                f"loss or gradient was not finite in {_MOST_SKIPPED} steps in a row, up to step {self.step}; "
                f"last checkpoint: {newest if newest else 'none'}. A lower lr or precision fp32 usually helps"
            )

    def _log(self, terms: Mapping[str, torch.Tensor], norms: Mapping[str, float], rate: float) -> None:
        self.losses = [*self.losses[-9:], float(terms["loss"].detach())]
        if self.step % self.log_every and self.step != self.config.steps:
            return
        line = {
            "step": self.step,
            **{name: round(float(term.detach()), 6) for name, term in terms.items()},
            **{f"gradient_norm_{part}": round(norm, 6) for part, norm in norms.items()},
            "lr": rate,
            "skipped": self.skipped,
            "images": self.images,
            "seconds": round(self.seconds, 2),
        }
        with open(self.out / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _memory(self) -> int:
        if self.device.type == "cuda":
            now = torch.cuda.max_memory_allocated(self.device)
        else:
            # kilobytes on Linux, bytes on macOS
            unit = 1 if sys.platform == "darwin" else 1024
            now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        self.peak_memory = max(self.peak_memory, now)
        return self.peak_memory

    def save(self) -> Path:
        state = {
            "settings": self.settings,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "images": self.images,
            "losses": self.losses,
            "seconds": self.seconds,
            "peak_memory_bytes": self._memory(),
        }
        return checkpoints.save(self.out / "checkpoints", self.step, self._saved(), self.optimizer, state)

    def _saved(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds by name: the trained parameters and the state of the method."""
        return {**self.parameters, **(self.hook.tensors() if self.hook else {})}

    def result(self) -> TrainResult:
        loss = sum(self.losses) / len(self.losses) if self.losses else None
        return TrainResult(self.step, self.skipped, self.seconds, self._memory(), loss)


def _lines_until(lines: Iterable[str], step: int) -> Iterator[str]:
    for line in lines:
        try:
            number = json.loads(line)["step"]
        except (json.JSONDecodeError, KeyError, TypeError):
            # a run killed while writing leaves half a line
            continue
        if number <= step:
            yield line


@contextlib.contextmanager
def _stop_requests() -> Iterator[list[signal.Signals]]:
    """Yield a list that receives a SIGINT or SIGTERM instead of the process dying of it; a second SIGINT interrupts."""
    received: list[signal.Signals] = []
    # only the main thread may set handlers
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(signal.Signals(number))

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
