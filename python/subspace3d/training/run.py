"""One training run: its counters, its optimiser steps with per-part clipping, and the checkpoints it continues from."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from subspace3d.adapters.hooks import MethodHook
from subspace3d.adapters.parameters import trainable_parameters
from subspace3d.backbones.find import backbone_of
from subspace3d.files import DamagedError
from subspace3d.log import logger
from subspace3d.training import checkpoints
from subspace3d.training.config import TrainConfig
from subspace3d.training.device import Processes, peak_memory
from subspace3d.training.gradient_watch import GradientWatch, watched_parameters
from subspace3d.training.schedule import learning_rate
from subspace3d.training.step import Objective, StepData, loss_terms, set_modes
from subspace3d.training.trackers import Tracker, remove_records

_MOST_SKIPPED = 10
# what `Run.save` keeps, and `Run.start` finds again
_STATE = ("step", "settings", "skipped", "skipped_in_a_row", "images", "losses", "seconds", "peak_memory_bytes")
# these change how a run is carried out, not what it computes
_FREE_FIELDS = ("device", "threads", "save_every", "checkpointing", "max_images", "trackers", "check_memory")


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


def run_settings(config: TrainConfig, others: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a run computes depends on: ``config`` without device, threads and the like, and ``others``; as in JSON."""
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in _FREE_FIELDS}
    # through JSON and back, so that a saved tuple compares equal to the list it became
    return json.loads(json.dumps({**settings, **(others or {})}))


def prepare(model: nn.Module, config: TrainConfig, device: torch.device) -> dict[str, nn.Parameter]:
    """Put ``model`` on its device and into its modes, set the CPU threads; returns what is trained, by name.

    Raises:
        ValueError: no learning rate, or nothing is trainable.
    """
    if not config.lr > 0:
        raise ValueError(f"lr must be positive here, got {config.lr}; `training.rates.usual_rate` has usual ones")
    if config.threads:
        torch.set_num_threads(config.threads)
    model.to(device)
    set_modes(model)
    parameters = trainable_parameters(model)
    if not parameters:
        raise ValueError("model must have trainable parameters, got none")
    return parameters


def new_optimizer(
    parameters: Mapping[str, nn.Parameter], config: TrainConfig, groups: Iterable[dict] | None = None
) -> torch.optim.Optimizer:
    """AdamW over ``groups``, or over all ``parameters`` with the configured weight decay."""
    return torch.optim.AdamW(
        groups if groups is not None else [{"params": list(parameters.values())}],
        lr=config.lr,
        weight_decay=config.weight_decay,
        fused=True,
    )


def remove_run(out: Path) -> None:
    """Delete the checkpoints and records of a run in ``out``.

    Raises:
        ValueError: something among them is not the run's.
    """
    checkpoints.check_removable(out / "checkpoints")
    remove_records(out)
    checkpoints.remove_all(out / "checkpoints")


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of torch's generators that a run on ``device`` may draw from."""
    states = {"cpu": torch.get_rng_state()}
    return {**states, "cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else states


def set_random_state(states: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Put back what `random_state` gave, as far as it is there and belongs to ``device``."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


class Run:
    """Counters of one run and the three things done with them: take a step, save, start from what was saved."""

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        out: Path,
        device: torch.device,
        processes: Processes,
        settings: Mapping[str, Any] | None,
        hook: MethodHook | None = None,
        snapshot: Callable[[Path], object] | None = None,
        objective: Objective | None = None,
    ) -> None:
        self.settings = run_settings(config, settings)
        self.parameters, self.optimizer = parameters, optimizer
        self.config, self.out, self.device, self.processes = config, out, device, processes
        self.hook, self.snapshot, self.objective = hook, snapshot, objective
        self.wrapped: nn.Module = model
        if processes.count > 1:
            # buffers are constants, and bases are large; newer releases of torch have another word for it
            keywords = inspect.signature(DistributedDataParallel).parameters
            buffers = "forward_sync_buffers" if "forward_sync_buffers" in keywords else "broadcast_buffers"
            self.wrapped = DistributedDataParallel(
                model,
                gradient_as_bucket_view=True,
                **{buffers: False},  # type: ignore[arg-type]
            )
        self.rate: Callable[[int], float] = lambda step: learning_rate(step, config.steps, config.lr, config.warmup)
        backbone = backbone_of(model)
        clipped = {
            part: [p for name, p in parameters.items() if backbone.part_of(name) == part]
            for part in (*dict.fromkeys(backbone.parts.values()), "other")
        }
        self.clipped = {part: members for part, members in clipped.items() if members}
        self.watch = GradientWatch(watched_parameters(model) if processes.is_first else {})
        self.trackers: list[Tracker] = []
        self.step = self.skipped = self.skipped_in_a_row = self.images = 0
        self.losses: list[float] = []
        self.peak_memory = 0
        self._seconds_before = 0.0
        self._images_before = 0
        self._started = time.monotonic()

    def start(self, resume: bool) -> None:
        """Load the newest checkpoint, if there is one and it is wanted."""
        folder = self.out / "checkpoints"
        if self.processes.is_first:
            checkpoints.remove_unfinished(folder)
            if not resume:
                remove_run(self.out)
        self.processes.wait()
        candidates = checkpoints.newest_first(folder)
        self._check_shared(candidates)
        for path in candidates:
            try:
                self._continue_from(path)
                break
            except (DamagedError, FileNotFoundError) as error:
                if path == candidates[-1]:
                    raise
                if self.processes.is_first:
                    logger.warning(f"{error}; going back to the checkpoint before it")
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._started = time.monotonic()

    def _continue_from(self, path: Path) -> None:
        state = checkpoints.read_state(path, _STATE)
        self._check_settings(path, state["settings"])
        self._restore(checkpoints.load(path, self.parameters, self.optimizer))
        self.step, self.skipped, self.skipped_in_a_row = (state[key] for key in ("step", "skipped", "skipped_in_a_row"))
        self.images = self._images_before = state["images"]
        self.losses, self.peak_memory = state["losses"], state["peak_memory_bytes"]
        self._seconds_before = state["seconds"]
        before = state.get("processes", self.processes.count)
        if self.processes.is_first and before != self.processes.count:
            logger.warning(f"{path} was made by {before} processes, {self.processes.count} continue")

    def _check_shared(self, candidates: list[Path]) -> None:
        """Processes on several machines must see the files of the first one."""
        mine = torch.tensor([int(candidates[0].name.removeprefix("step_")) if candidates else 0])
        found = [int(step) for step in self.processes.gather(mine, self.device)]
        if len(set(found)) > 1:
            raise ValueError(
                f"out must be a folder that all processes share, but in {self.out} they find checkpoints of steps "
                f"{found}, by rank"
            )

    def _check_settings(self, path: Path, before: dict) -> None:
        # a setting that did not exist when the checkpoint was made had its default
        before = {**run_settings(TrainConfig()), **before}
        for name, value in self.settings.items():
            if before.get(name) != value:
                raise ValueError(
                    f"{name} must be {before.get(name)!r} to continue from {path}, got {value!r}; "
                    "choose another output folder or start over"
                )

    def unwrap(self) -> None:
        """Let go of DistributedDataParallel and of the process group it holds."""
        if isinstance(self.wrapped, DistributedDataParallel):
            self.wrapped = self.wrapped.module

    def take_step(self, data: StepData) -> str:
        """One optimiser step; returns the note for the progress display."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.apply(self._accumulate(data), data.images)
        return f"loss {loss}, {self.speed:.1f} images/s, {self.memory() / 2**30:.2f} GiB"

    def apply(self, terms: Mapping[str, float], images: int) -> str:
        """Clip the gradients that are there and take the optimiser's step, or skip it; returns the loss in words.

        Args:
            terms (Mapping): of the loss of the step, for the log.
            images (int): of the step.

        Raises:
            FloatingPointError: loss or gradient were not finite in ten steps in a row.
        """
        rate = self.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("rate_factor", 1.0)
        self.watch.after_backward()
        norms = {
            part: float(nn.utils.clip_grad_norm_(members, self.config.clip_norm))
            for part, members in self.clipped.items()
        }
        # the same on every process: both are sums over all of them
        finite = math.isfinite(terms["loss"]) and all(map(math.isfinite, norms.values()))
        if finite:
            self.optimizer.step()
            if self.hook is not None:
                self.hook.after_step(self.step + 1)
        self.step += 1
        self.images += images
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if finite:
            self.losses = [*self.losses[-9:], terms["loss"]]
        self._log(terms, norms, rate)
        if self.skipped_in_a_row >= min(_MOST_SKIPPED, self.config.steps):
            raise FloatingPointError(
                f"loss or gradient was not finite in {self.skipped_in_a_row} steps in a row, up to step {self.step}; "
                f"last checkpoint: {checkpoints.latest(self.out / 'checkpoints') or 'none'}. "
                "A lower lr or precision fp32 usually helps"
            )
        return f"{terms['loss']:.4f}" if finite else "not finite, step skipped"

    @property
    def speed(self) -> float:
        """Images a second since this start."""
        return (self.images - self._images_before) / max(1e-9, time.monotonic() - self._started)

    def _accumulate(self, data: StepData) -> dict[str, float]:
        """Gradients of the loss of the whole step, and its terms, summed over parts and processes."""
        totals: dict[str, torch.Tensor] = {}
        for number, part in enumerate(data.parts, 1):
            last = number == len(data.parts)
            wrapped = self.wrapped
            alone = wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) and not last else None
            with alone or contextlib.nullcontext():
                terms = loss_terms(self.wrapped, part, data.counts, self.config, self.device, self.objective)
                total = terms["loss"]
                if self.hook is not None and last:
                    # beside the loss, not in it: curves of different methods stay comparable
                    terms["regularizer"] = self.hook.extra_loss() / self.processes.count
                    total = total + terms["regularizer"]
                # DDP takes the mean over processes, the loss of a step is a sum
                (total * self.processes.count).backward()
            for name, term in terms.items():
                totals[name] = totals.get(name, 0.0) + term.detach().double()
        values = torch.stack(list(totals.values())).tolist()
        return dict(zip(totals, self.processes.sum(values, self.device)))

    def _log(self, terms: Mapping[str, float], norms: Mapping[str, float], rate: float) -> None:
        values = {**terms, **{f"gradient_norm_{part}": norm for part, norm in norms.items()}}
        line = {
            **{name: round(value, 6) if math.isfinite(value) else None for name, value in values.items()},
            "lr": rate,
            "skipped": self.skipped,
            "images": self.images,
            "seconds": round(self.seconds, 2),
        }
        for tracker in self.trackers:
            tracker.log(self.step, line)

    @property
    def seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started

    def memory(self) -> int:
        """Most memory so far, as in `TrainResult`."""
        self.peak_memory = max(self.peak_memory, peak_memory(self.device))
        return self.peak_memory

    def save(self) -> Path:
        """Write a checkpoint of this step; every process must call it."""
        state = {
            "settings": self.settings,
            "processes": self.processes.count,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "images": self.images,
            "losses": self.losses,
            "seconds": self.seconds,
            "peak_memory_bytes": self.memory(),
        }
        tensors = {
            f"rng.{rank}.{name}": gathered
            for name, mine in random_state(self.device).items()
            for rank, gathered in enumerate(self.processes.gather(mine, self.device))
        }
        if self.hook is not None:
            tensors |= {f"method.{name}": tensor for name, tensor in self.hook.tensors().items()}
        path = self.out / "checkpoints" / f"step_{self.step}"
        if self.processes.is_first:
            checkpoints.save(path.parent, self.step, self.parameters, self.optimizer, state, tensors, self.snapshot)
        self.processes.wait()
        return path

    def _restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put back the random state of this process and that of the method."""
        mine = f"rng.{self.processes.rank}."
        found = {name: tensors[f"{mine}{name}"] for name in ("cpu", "cuda") if f"{mine}{name}" in tensors}
        set_random_state(found, self.device)
        if "cpu" not in found:
            # fewer processes ran before: this one starts a stream of its own, the same whenever it is tried
            seeds = np.random.SeedSequence([self.config.seed, self.processes.rank])
            torch.manual_seed(int(seeds.generate_state(1)[0]))
        for name, tensor in self.hook.tensors().items() if self.hook is not None else ():
            tensor.copy_(tensors[f"method.{name}"])

    def result(self) -> TrainResult:
        loss = sum(self.losses) / len(self.losses) if self.losses else None
        return TrainResult(self.step, self.skipped, self.seconds, self.memory(), loss)
