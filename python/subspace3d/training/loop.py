"""The training loop: AdamW, warm-up and cosine, per-part clipping, checkpoints a killed run continues from."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from subspace3d import outputs
from subspace3d.adapters.hooks import MethodHook
from subspace3d.locks import exclusive
from subspace3d.log import logger
from subspace3d.progress import Progress
from subspace3d.training.config import TrainConfig
from subspace3d.training.device import choose_device, joined_processes
from subspace3d.training.interfaces import BatchSource
from subspace3d.training.run import Run, TrainResult, new_optimizer, prepare
from subspace3d.training.step import Objective, StepData, draw_step
from subspace3d.training.stop import stop_requests
from subspace3d.training.trackers import open_trackers


def train(
    model: nn.Module,
    dataset: BatchSource,
    config: TrainConfig,
    out: Path,
    groups: Iterable[dict] | None = None,
    resume: bool = True,
    label: str = "train",
    settings: Mapping[str, Any] | None = None,
    hook: MethodHook | None = None,
    snapshot: Callable[[Path], object] | None = None,
    quiet: bool = False,
    objective: Objective | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    rate: Callable[[int], float] | None = None,
) -> TrainResult:
    """Minimise the backbone's loss, or ``objective``, over the trainable parameters of ``model``, in place.

    Writes ``out/metrics.jsonl`` and ``out/checkpoints/step_N``. A run that was cut off continues from its newest
    checkpoint; on the CPU it then ends in the same bits as one that was not. It may continue on another number of
    processes, with the same results up to rounding. SIGINT and SIGTERM finish the step, save a checkpoint and raise
    SystemExit with 128 + the signal's number.

    The scenes of a step are divided over the processes torchrun started, and each process's share over forward passes
    of at most ``config.max_images`` images; neither changes the gradients by more than rounding.

    Args:
        model (nn.Module): what a backbone built, plain or adapted, or any VGGT; what has ``requires_grad`` is trained.
        dataset (BatchSource): source of the batches.
        config (TrainConfig): length, rates, batch, precision, device.
        out (Path): run folder.
        groups (Iterable[dict]): AdamW parameter groups; none: one group with the configured weight decay. The rate of
            a step is multiplied by a group's ``rate_factor``, if it has one.
        resume (bool): continue from the newest checkpoint below ``out``; otherwise start over.
        label (str): name of the run in the progress display.
        settings (Mapping | None): JSON values a checkpoint must have been made with, besides those of ``config``.
        hook (MethodHook | None): what the tuning method adds to a step, see `method_hook`.
        snapshot (Callable | None): see `checkpoints.save`.
        quiet (bool): no progress display.
        objective (Callable | None): ``(outputs, batch, camera_weight, counts) -> terms`` of what the network returned,
            a scalar ``loss`` among the terms; none: the backbone's own.
        optimizer (Optimizer | None): over the trainable parameters, with the state of AdamW by name; none: AdamW over
            ``groups``.
        rate (Callable | None): learning rate of a step, in place of warm-up and cosine. It does not know the length of
            the run, so a checkpoint continues to any number of steps.

    Raises:
        ValueError: nothing is trainable, the checkpoint belongs to other settings or another model, there are more
            processes than scenes in a step, they do not share ``out``, another process trains in it, or it holds
            anything else than a run.
        FloatingPointError: the loss or a gradient was not finite in ten steps in a row, or in every step of a
            shorter run; the last checkpoint is intact.
        SystemExit: stopped by a signal.
    """
    device = choose_device(config.device)
    parameters = prepare(model, config, device)
    out = outputs.claim(out, outputs.RUN, "out")
    if optimizer is None:
        optimizer = new_optimizer(parameters, config, groups)
    with contextlib.ExitStack() as stack:
        processes = stack.enter_context(joined_processes(device))
        if processes.count > config.images_per_step // config.frames[1]:
            raise ValueError(
                f"images_per_step must be at least processes x most frames ({processes.count} x {config.frames[1]}), "
                f"so that each process has a scene in every step, got {config.images_per_step}"
            )
        if processes.is_first:
            stack.enter_context(exclusive(out))
        stop = stack.enter_context(stop_requests())
        pool = stack.enter_context(ThreadPoolExecutor(1, "batch"))
        run = Run(model, parameters, optimizer, config, out, device, processes, settings, hook, snapshot, objective)
        # before the processes part, see `device._leave`
        stack.callback(run.unwrap)
        if rate is not None:
            run.rate = rate
            del run.settings["steps"], run.settings["warmup"]
        run.start(resume)
        if processes.is_first:
            run.trackers = open_trackers(config.trackers, out, run.step, label, run.settings)
            for tracker in run.trackers:
                stack.callback(tracker.close)
        progress = None
        if processes.is_first and not quiet:
            progress = stack.enter_context(Progress(label, config.steps, initial=run.step))
            if run.step < config.steps:
                logger.info(
                    f"{label}: step {run.step + 1} of {config.steps} begins, {config.images_per_step} images each"
                )

        def draw(step: int) -> Future[StepData] | None:
            return pool.submit(draw_step, dataset, config, step, processes) if step < config.steps else None

        pending = draw(run.step)
        while pending is not None:
            data = pending.result()
            pending = draw(run.step + 1)
            note = run.take_step(data)
            if progress is not None:
                progress.advance(note=note)
            stopping = processes.sum([float(len(stop))], device)[0] > 0
            if run.step % config.save_every == 0 or run.step == config.steps or stopping:
                saved = run.save()
            if stopping:
                if processes.is_first:
                    logger.warning(f"\nstopped after step {run.step}; the same command continues from {saved}")
                raise SystemExit(128 + (stop[0] if stop else 15))
    return run.result()
