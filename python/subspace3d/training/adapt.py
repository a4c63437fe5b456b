"""The verb adapt: one stock PEFT LoRA for every data set, tuned or made of its gradient, each an independent job."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from subspace3d import settings
from subspace3d.adapters.methods import add_lora
from subspace3d.adapters.parameters import count_trainable
from subspace3d.adapters.placement import select_modules
from subspace3d.backbones.record import BackboneRecord, load_backbone, record_backbone
from subspace3d.backbones.targets import target_regex
from subspace3d.backbones.vggt import VGGT
from subspace3d.configs import AdaptConfig
from subspace3d.datasets.multiview import MultiViewDataset
from subspace3d.files import atomic_folder, read_record, write_json
from subspace3d.formats.adapter import fill_lora
from subspace3d.formats.scene import find_scenes
from subspace3d.jobs.cluster import Cluster, absolute, joined_cluster
from subspace3d.jobs.pool import run_here, run_jobs
from subspace3d.jobs.work import exit_on_failures
from subspace3d.progress import Progress
from subspace3d.training.device import choose_device
from subspace3d.training.gradient_adapter import gradient_adapter
from subspace3d.training.gradient_start import start_at_gradient
from subspace3d.training.loop import run_settings, train
from subspace3d.training.memory import check_memory
from subspace3d.training.token_cache import TokenCache
from subspace3d.training.tuned import save_adapter

RECORD = "adapt.json"
# settings of a training that a gradient at the base weights does not depend on
_OPTIMISER = ("steps", "lr", "weight_decay", "warmup", "clip_norm")


@dataclasses.dataclass(frozen=True)
class _Grid:
    """What the jobs of one call share."""

    config: AdaptConfig
    backbone: BackboneRecord
    wanted: dict
    folders: dict[str, Path]
    threads: int = 0
    """CPU threads where the settings name none; 0: torch's default."""
    sharing: int = 1
    """Jobs on one device."""
    quiet: bool = False


def run(config: AdaptConfig) -> list[Path]:
    """Tune what is missing; returns the adapter folders, in the order of the data sets.

    An adapter that stands is not made again; one that was cut off continues from its checkpoints in OUT/.work. A data
    set that fails does not keep the others from being tuned; all failures are listed at the end.

    Raises:
        ValueError: an adapter in OUT was made with other settings, settings that suit no data set, or no cluster.
        FileNotFoundError: scenes or weights are missing.
        SystemExit: with 1 if some adapters could not be tuned.
    """
    if config.ray:
        config = absolute(config, "scenes", "out", "cache_tokens")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("workers: adapt starts its own processes (--workers), so it must not run under torchrun")
    target_regex(config.targets)
    datasets = find_datasets(config.scenes)
    backbone = record_backbone(config.backbone, config.weights, config.train.seed)
    wanted = _wanted(config, backbone)
    todo = [name for name in datasets if not _is_done(config.out / name, wanted)]
    if todo:
        settings.save(config.out / "config.yaml", config)
        with joined_cluster(config, on_cpu=config.train.device == "cpu") as cluster:
            failures = _tune_all(_Grid(config, backbone, wanted, datasets), todo, cluster)
        exit_on_failures("adapt", "adapters", failures, len(datasets), config.out)
    shutil.rmtree(config.out / ".work", ignore_errors=True)
    return [config.out / name for name in datasets]


def _wanted(config: AdaptConfig, backbone: BackboneRecord) -> dict:
    """The settings an adapter depends on."""
    wanted = run_settings(
        config.train,
        {
            "backbone": backbone.identity,
            "rank": config.rank,
            "targets": config.targets,
            "gradient_steps": config.batches if config.gradient_only else config.gradient_steps,
        },
    )
    if config.gradient_only:
        wanted = {name: value for name, value in wanted.items() if name not in _OPTIMISER} | {"source": "gradient"}
    return wanted


def find_datasets(scenes: Path) -> dict[str, Path]:
    """Data sets at or below ``scenes``: relative path -> folder. A data set is a folder that holds scene folders."""
    folders = sorted({scene.parent for scene in find_scenes(scenes)})
    # a folder that is itself a data set has no relative path to name it by
    return {
        scenes.resolve().name if folder == scenes else str(folder.relative_to(scenes)): folder for folder in folders
    }


def _is_done(folder: Path, wanted: dict) -> bool:
    if not (folder / RECORD).is_file():
        return False
    before = read_record(folder / RECORD).get("settings")
    if not isinstance(before, dict):
        raise ValueError(f"{folder / RECORD} must hold the settings the adapter was made with")
    # of tuned adapters the records do not name the source
    for name, value in {"source": None, **wanted}.items():
        if before.get(name) != value:
            raise ValueError(f"out: {folder} was made with {name} {before.get(name)!r}, not {value!r}")
    return True


def _default_workers(device: str) -> int:
    return max(1, torch.cuda.device_count()) if device in ("auto", "cuda") else 1


def _tune_all(grid: _Grid, todo: list[str], cluster: Cluster | None) -> dict[str, str]:
    """Tune the adapters of these data sets here, in processes of this machine or on a cluster; returns failures."""
    train_config = grid.config.train
    workers = min(grid.config.workers or _default_workers(train_config.device), len(todo))
    if cluster is None and workers == 1:
        return run_here(todo, _set_up, grid)
    if cluster is not None:
        if train_config.device == "auto":
            train_config = dataclasses.replace(train_config, device=cluster.device)
        config = dataclasses.replace(grid.config, train=train_config)
        sharing = max(1, round(1 / cluster.gpus)) if cluster.gpus else 1
        grid = dataclasses.replace(grid, config=config, threads=cluster.cpus, sharing=sharing, quiet=True)
    else:
        on_gpus = train_config.device in ("auto", "cuda") and torch.cuda.is_available()
        sharing = -(-workers // (torch.cuda.device_count() if on_gpus else 1))
        threads = max(1, (os.cpu_count() or 1) // workers)
        grid = dataclasses.replace(grid, threads=threads, sharing=sharing, quiet=True)
    done = len(grid.folders) - len(todo)
    with Progress("adapt", len(grid.folders), "adapter", initial=done) as progress:
        return run_jobs(todo, _set_up, grid, workers, lambda name: progress.advance(note=name), cluster=cluster)


def _set_up(grid: _Grid, worker: int) -> Callable[[str], object]:
    """Load the backbone; returns the function that tunes the adapter of one data set on it."""
    train_config = grid.config.train
    if train_config.device in ("auto", "cuda") and torch.cuda.is_available():
        device = f"cuda:{worker % torch.cuda.device_count()}"
        train_config = dataclasses.replace(train_config, device=device)
    elif not train_config.threads:
        train_config = dataclasses.replace(train_config, threads=grid.threads)
    config = dataclasses.replace(grid.config, train=train_config)
    model = load_backbone(grid.backbone).to(choose_device(train_config.device))
    model.enable_checkpointing(train_config.checkpointing)
    tuned = add_lora(model, config.rank, config.targets)
    if worker == 0:
        image_size = train_config.image_size or model.config.image_size
        check_memory(tuned, train_config, image_size, sharing=grid.sharing)
    model = tuned.unload()  # type: ignore[operator]
    cache = None
    if config.cache_tokens is not None:
        cache = TokenCache(config.cache_tokens, model.aggregator.patch_embed, config.cache_gigabytes)

    def work(name: str) -> None:
        nonlocal model
        if _is_done(config.out / name, grid.wanted):
            return  # by a process that died before it could say so
        number = list(grid.folders).index(name) + 1
        with contextlib.nullcontext() if cache is None else cache.attached():
            if config.gradient_only:
                _take_gradient(config, model, name, grid, f"gradient {name} ({number}/{len(grid.folders)})")
                return
            model = _tune_one(config, model, name, grid, f"adapt {name} ({number}/{len(grid.folders)})")

    return work


def _take_gradient(config: AdaptConfig, model: VGGT, name: str, grid: _Grid, label: str) -> None:
    """Write the gradient adapter of one data set."""
    folder = grid.folders[name]
    dataset = MultiViewDataset.for_training(folder, config.train.image_size or model.config.image_size, config.train)
    made = gradient_adapter(
        model,
        select_modules(model, config.targets),
        dataset,
        config.train,
        config.batches,
        config.rank,
        None if grid.quiet else label,
        config.gradient_gigabytes,
    )
    if made.energy_kept is None:
        raise ValueError(f"{folder} must have a gradient: the loss of its {config.batches} batches has none")
    about = {
        "source": "gradient",
        "batches": config.batches,
        "norm": made.norm,
        "energy_kept": round(made.energy_kept, 6),
    }
    with atomic_folder(config.out / name) as temporary:
        fill_lora(temporary, made.factors, model, grid.backbone.identity, about)
        write_json(temporary / RECORD, {"scenes": str(folder), **about, "settings": grid.wanted})


def _tune_one(config: AdaptConfig, model: VGGT, name: str, grid: _Grid, label: str) -> VGGT:
    """Tune and write one adapter; returns the backbone as it was before."""
    folder = grid.folders[name]
    image_size = config.train.image_size or model.config.image_size
    dataset = MultiViewDataset.for_training(folder, image_size, config.train)
    # lora_A stays close to its start: with one start for all, the adapters would share a subspace by construction
    start = np.random.SeedSequence([config.train.seed, zlib.crc32(name.encode())]).generate_state(1)[0]
    torch.manual_seed(int(start))
    tuned = add_lora(model, config.rank, config.targets, grid.backbone.identity)
    if config.gradient_steps:
        start_at_gradient(tuned, dataset, config.train, config.gradient_steps, label, grid.quiet)
    work = config.out / ".work" / name
    result = train(
        tuned,
        dataset,
        config.train,
        work,
        label=label,
        settings=grid.wanted,
        snapshot=lambda path: save_adapter(tuned, path),
        quiet=grid.quiet,
    )
    with atomic_folder(config.out / name) as temporary:
        save_adapter(tuned, temporary)
        write_json(
            temporary / RECORD,
            {
                "scenes": str(folder),
                "trainable": count_trainable(tuned),
                "training": dataclasses.asdict(result),
                "settings": grid.wanted,
            },
        )
        shutil.copy(work / "metrics.jsonl", temporary / "metrics.jsonl")
        if (work / "tensorboard").is_dir():
            shutil.copytree(work / "tensorboard", temporary / "tensorboard")
    shutil.rmtree(work)
    return tuned.unload()  # type: ignore[operator]
