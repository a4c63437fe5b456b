"""One run: cores alone between a basis, heads frozen, the held-out losses along the way. A record each, done once."""

from __future__ import annotations

import contextlib
import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments.directions.bases import Paths, build, load_model
from experiments.directions.plan import Run, Sizes
from experiments.jobs import Context
from experiments.plan import HELD_OUT, VALIDATION
from subspace3d.adapters.methods import apply_method
from subspace3d.adapters.placement import SUBSPACE_SCALE
from subspace3d.datasets.multiview import MultiViewDataset
from subspace3d.files import read_json, write_json
from subspace3d.jobs.pool import run_jobs
from subspace3d.progress import Progress
from subspace3d.training.config import TrainConfig
from subspace3d.training.device import Processes
from subspace3d.training.loop import train
from subspace3d.training.step import draw_step, loss_terms
from subspace3d.training.token_cache import TokenCache

SPLITS = ("test", "generic")
TERMS = ("loss", "depth", "camera", "depth_error", "rotation", "translation")
"""Of the held-out loss: depth and camera apart, and the errors inside them."""


@dataclass(frozen=True)
class _Shared:
    context: Context
    sizes: Sizes
    runs: dict[str, Run]


def run_all(context: Context, sizes: Sizes, runs: Sequence[Run], label: str) -> dict[str, str]:
    """Do what is not done; returns what went wrong, by name."""
    paths = Paths(context.layout)
    named = {f"{run.task}/{run.name}": run for run in runs}
    todo = {name: run for name, run in named.items() if not paths.run(run.task, run.name).is_file()}
    if not todo:
        return {}
    workers = min(context.workers, len(todo))
    with Progress(label, len(named), "run", initial=len(named) - len(todo)) as progress:
        shared = _Shared(context, sizes, todo)
        return run_jobs(list(todo), _set_up, shared, workers, lambda name: progress.advance(note=name))


def _set_up(shared: _Shared, worker: int) -> Callable[[str], object]:
    torch.set_num_threads(1)

    def work(name: str) -> None:
        run = shared.runs[name]
        path = Paths(shared.context.layout).run(run.task, run.name)
        if not path.is_file():
            write_json(path, do(shared.context, shared.sizes, run))

    return work


def do(context: Context, sizes: Sizes, run: Run) -> dict[str, Any]:
    """Tune and measure; the record says ``diverged`` where the loss was not finite, which is an outcome."""
    scale, layout = context.scale, context.layout
    plain = load_model(context)
    basis = build(context, run.task, run.basis, run.K, plain)
    size = scale.tune.image_size or plain.config.image_size
    config = replace(scale.tune, lr=run.rate, seed=run.seed, steps=sizes.steps[-1], device="cpu", threads=1)
    folders = MultiViewDataset(layout.scenes(run.task, "train"), size).folders
    dataset = MultiViewDataset.for_training(folders[: run.scenes or None], size, config)
    held = {split: _held_out(context, run.task, split, size) for split in (*SPLITS, VALIDATION)}
    curve: dict[str, dict[str, dict[str, list[float]]]] = {}
    diverged = None
    model = apply_method(plain, "subspace", basis=basis, heads="frozen")
    with TokenCache(context.tokens, plain.aggregator.patch_embed).attached():
        watch = _Watch(model, held, sizes.steps, curve)
        watch.after_step(0)
        work = Path(tempfile.mkdtemp(prefix="directions-"))
        try:
            train(model, dataset, config, work, resume=False, hook=watch, quiet=True)
        except FloatingPointError as error:
            diverged = str(error)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        validation = None if diverged else statistics.fmean(watch.measure(VALIDATION)["loss"])
    cores = [p.detach().norm() for name, p in model.named_parameters() if name.endswith(".c")]
    weights = [plain.get_submodule(name).get_parameter("base_layer.weight").norm() for name in basis]
    return {
        "run": asdict(run),
        "steps": list(sizes.steps),
        "curve": curve,
        "validation": validation,
        "diverged": diverged,
        # the columns of U and V are orthonormal
        "update_norm": SUBSPACE_SCALE * float(torch.stack(cores).norm()),
        "weight_norm": float(torch.stack(weights).norm()),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


@dataclass(frozen=True)
class _HeldOut:
    scenes: Sequence[MultiViewDataset]  # of one scene each
    config: TrainConfig  # by which one batch has all views of a scene


def _held_out(context: Context, task: str, split: str, size: int) -> _HeldOut:
    """The scenes of a split."""
    scale, layout = context.scale, context.layout
    folders = MultiViewDataset(layout.scenes(task, "generic" if split == "generic" else HELD_OUT), size).folders
    if split != "generic":
        half = len(folders) // 2
        folders = folders[:half] if split == VALIDATION else folders[half:]
    views = scale.views["generic" if split == "generic" else task]
    config = replace(scale.tune, seed=0, frames=(views, views), images_per_step=views, max_images=views, device="cpu")
    return _HeldOut([MultiViewDataset(folder, size) for folder in folders], config)


class _Watch:
    """A method hook that measures the held-out loss after given steps, and changes nothing."""

    def __init__(
        self,
        model: nn.Module,
        held: dict[str, _HeldOut],
        steps: Sequence[int],
        curve: dict[str, dict[str, dict[str, list[float]]]],
    ) -> None:
        self._model, self._held, self._steps, self._curve = model, held, steps, curve

    def extra_loss(self) -> torch.Tensor:
        return torch.zeros(())

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}

    def after_step(self, step: int) -> None:
        if step in (0, *self._steps):
            self._curve[str(step)] = {split: self.measure(split) for split in SPLITS}

    @torch.no_grad()
    def measure(self, split: str) -> dict[str, list[float]]:
        """Every term, scene by scene."""
        held, device = self._held[split], torch.device("cpu")
        found: dict[str, list[float]] = {name: [] for name in TERMS}
        for scene in held.scenes:
            data = draw_step(scene, held.config, 0, Processes())
            (part,) = data.parts
            terms = loss_terms(self._model, part, data.counts, held.config, device)
            for name in TERMS:
                found[name].append(float(terms[name]))
        return found


def read(context: Context, run: Run) -> dict[str, Any] | None:
    """The record of a run, if there is one."""
    path = Paths(context.layout).run(run.task, run.name)
    with contextlib.suppress(FileNotFoundError):
        return read_json(path)
    return None
