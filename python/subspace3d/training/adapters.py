"""One stock PEFT LoRA for every data set, tuned or made of its gradient, each an independent job."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from subspace3d import outputs, records
from subspace3d.adapters.methods import add_lora
from subspace3d.adapters.multi_lora import share_weights
from subspace3d.adapters.parameters import count_trainable
from subspace3d.adapters.placement import select_modules
from subspace3d.backbones.find import backbone_of
from subspace3d.backbones.model_card import write_card
from subspace3d.backbones.record import BackboneRecord, load_backbone
from subspace3d.datasets.multiview import MultiViewDataset
from subspace3d.files import atomic_folder, discard, read_record, write_json
from subspace3d.formats.adapter import fill_lora
from subspace3d.formats.run import AdaptRecord
from subspace3d.formats.scene import find_scenes
from subspace3d.jobs.cluster import Cluster
from subspace3d.jobs.pool import run_here, run_jobs
from subspace3d.jobs.work import PartsFailed
from subspace3d.log import logger
from subspace3d.machine import usable_cores
from subspace3d.progress import Progress
from subspace3d.training import checkpoints
from subspace3d.training.config import TrainConfig
from subspace3d.training.device import choose_device
from subspace3d.training.gradient_adapter import gradient_adapter
from subspace3d.training.gradient_start import start_at_gradient
from subspace3d.training.gradients import GIGABYTES
from subspace3d.training.loop import train
from subspace3d.training.memory import check_memory
from subspace3d.training.run import TrainResult, random_state, remove_run
from subspace3d.training.together import Member, train_together
from subspace3d.training.token_cache import TokenCache
from subspace3d.training.tuned import save_adapter

RECORD = "adapt.json"


@dataclasses.dataclass(frozen=True)
class AdapterJobs:
    """What the jobs of one call share.

    Attributes:
        out: adapters are written below it, at the relative paths that name the data sets.
        backbone: the weights that are tuned.
        datasets: name of a data set -> its folder.
        wanted: what every adapter's record holds as its settings.
        rank: LoRA rank r; lora_alpha is 2 r.
        targets: preset of target modules.
        gradient_steps: lora_A starts at the gradient of so many steps, or with gradient_only is made of it; 0: random.
        train: how each is tuned.
        gradient_only: nothing is tuned, see `gradient_adapter`.
        gradient_gigabytes: most host memory for gradients then.
        cache_tokens: folder of the image encoder's tokens, or None.
        cache_gigabytes: most that is kept there.
        overwrite: replace adapters that were made with other settings.
        threads: CPU threads where ``train`` names none; 0: torch's default.
        sharing: jobs on one device.
        together: most adapters that one job tunes at a time, see `train_together`.
        groups: name of a job -> the data sets it tunes an adapter for, in turn or together; the first one names it.
        quiet: show no progress of single adapters.
    """

    out: Path
    backbone: BackboneRecord
    datasets: dict[str, Path]
    wanted: dict
    rank: int
    targets: str
    gradient_steps: int
    train: TrainConfig
    gradient_only: bool = False
    gradient_gigabytes: float = GIGABYTES
    cache_tokens: Path | None = None
    cache_gigabytes: float = 20.0
    overwrite: bool = False
    threads: int = 0
    sharing: int = 1
    together: int = 1
    groups: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    quiet: bool = False


def find_datasets(scenes: Path) -> dict[str, Path]:
    """Data sets at or below ``scenes``: relative path -> folder. A data set is a folder that holds scene folders."""
    folders = sorted({scene.parent for scene in find_scenes(scenes)})
    # a folder that is itself a data set has no relative path to name it by
    return {
        scenes.resolve().name if folder == scenes else folder.relative_to(scenes).as_posix(): folder
        for folder in folders
    }


def check_targets(out: Path, todo: list[str], datasets: dict[str, Path]) -> None:
    """Refuse, before any of them is tuned, adapters whose place is taken by something else."""
    inputs = [("scenes", folder) for folder in datasets.values()]
    for name in todo:
        outputs.claim(out / name, outputs.ADAPTED, "out", inputs)
        if (out / name / RECORD).is_file():
            logger.warning(f"adapt --overwrite replaces {out / name}")
    work = out / ".work"
    if not (out / "config.yaml").is_file() and os.path.lexists(work):
        raise ValueError(f"out: {work} must be the working folder of adapt, but {out} has no config.yaml of it")


def remove_work(work: Path, name: str) -> None:
    """Delete what the training of one adapter left, and the folders above it that are then empty."""
    folder = work / name
    if not folder.is_dir():
        return
    remove_run(folder)
    if (folder / "wandb").is_dir():
        discard(folder / "wandb")
    with contextlib.suppress(OSError):
        for path in (folder, *folder.parents):
            path.rmdir()
            if path == work:
                break


def is_done(folder: Path, wanted: dict, overwrite: bool = False) -> bool:
    """Whether the adapter in ``folder`` is there, made with the settings ``wanted``.

    Raises:
        ValueError: it was made with others, which ``overwrite`` does not let replace.
    """
    if not (folder / RECORD).is_file():
        return False
    before = read_record(folder / RECORD, AdaptRecord)["settings"]
    if overwrite:
        return not records.differing(before, wanted)
    records.check_same(folder, before, wanted, "--overwrite replaces it")
    return True


def _default_workers(device: str) -> int:
    return max(1, torch.cuda.device_count()) if device in ("auto", "cuda") else 1


def tune_adapters(jobs: AdapterJobs, todo: list[str], workers: int, cluster: Cluster | None) -> dict[str, str]:
    """Tune the adapters of these data sets here, in processes of this machine or on a cluster; returns failures."""
    jobs = dataclasses.replace(jobs, groups=_groups(todo, jobs.together))
    failures = _run_groups(jobs, len(jobs.datasets) - len(todo), workers, cluster)
    for first, names in jobs.groups.items():
        if first in failures:
            # a job that died took all of its adapters with it
            left = (name for name in names if not is_done(jobs.out / name, jobs.wanted, jobs.overwrite))
            failures |= {name: failures.get(name, failures[first]) for name in left}
    return failures


def _groups(names: list[str], together: int) -> dict[str, list[str]]:
    """As few groups of at most ``together`` as there can be, of nearly one size, by their first name."""
    count = -(-len(names) // together)
    cuts = [len(names) * i // count for i in range(count + 1)]
    return {names[start]: names[start:end] for start, end in itertools.pairwise(cuts)}


def _run_groups(jobs: AdapterJobs, done: int, workers: int, cluster: Cluster | None) -> dict[str, str]:
    train_config, names = jobs.train, list(jobs.groups)
    workers = min(workers or _default_workers(train_config.device), len(names))
    if cluster is None and workers == 1:
        return run_here(names, _set_up, jobs)
    if cluster is not None:
        if train_config.device == "auto":
            train_config = dataclasses.replace(train_config, device=cluster.device)
        sharing = max(1, round(1 / cluster.gpus)) if cluster.gpus else 1
        jobs = dataclasses.replace(jobs, train=train_config, threads=cluster.cpus, sharing=sharing, quiet=True)
    else:
        on_gpus = train_config.device in ("auto", "cuda") and torch.cuda.is_available()
        sharing = -(-workers // (torch.cuda.device_count() if on_gpus else 1))
        threads = max(1, usable_cores() // workers)
        jobs = dataclasses.replace(jobs, threads=threads, sharing=sharing, quiet=True)
    with Progress("adapt", len(jobs.datasets), "adapter", initial=done) as progress:

        def ended(name: str) -> None:
            progress.advance(len(jobs.groups[name]), note=", ".join(jobs.groups[name]))

        return run_jobs(names, _set_up, jobs, workers, ended, cluster=cluster)


def _set_up(jobs: AdapterJobs, worker: int) -> Callable[[str], object]:
    """Load the backbone; returns the function that tunes the adapters of one group of data sets on it."""
    train_config = jobs.train
    if train_config.device in ("auto", "cuda") and torch.cuda.is_available():
        device = f"cuda:{worker % torch.cuda.device_count()}"
        train_config = dataclasses.replace(train_config, device=device)
    elif not train_config.threads:
        train_config = dataclasses.replace(train_config, threads=jobs.threads)
    jobs = dataclasses.replace(jobs, train=train_config)
    model = load_backbone(jobs.backbone).to(choose_device(train_config.device))
    described = backbone_of(model)
    described.checkpointing(model, train_config.checkpointing)
    tuned = add_lora(model, jobs.rank, jobs.targets)
    if worker == 0:
        image_size = described.checked_size(train_config.image_size, train_config.frames)
        most = max(map(len, jobs.groups.values()))
        check_memory(tuned, train_config, image_size, sharing=jobs.sharing, together=most)
    model = tuned.unload()  # type: ignore[operator]
    cache = None
    if jobs.cache_tokens is not None:
        cache = TokenCache.of_backbone(jobs.cache_tokens, model, jobs.cache_gigabytes)

    def work(first: str) -> None:
        nonlocal model
        # some may be there, by a process that died before it could say so
        names = [name for name in jobs.groups[first] if not is_done(jobs.out / name, jobs.wanted, jobs.overwrite)]
        with contextlib.nullcontext() if cache is None else cache.attached():
            if len(names) > 1:
                _tune_together(jobs, model, names)
                return
            for name in names:
                if jobs.gradient_only:
                    _take_gradient(jobs, model, name, _label(jobs, name, "gradient"))
                else:
                    model = _tune_one(jobs, model, name)

    return work


def _label(jobs: AdapterJobs, name: str, verb: str = "adapt") -> str:
    return f"{verb} {name} ({list(jobs.datasets).index(name) + 1}/{len(jobs.datasets)})"


def _dataset(jobs: AdapterJobs, model: nn.Module, folder: Path) -> MultiViewDataset:
    backbone = backbone_of(model)
    size = backbone.checked_size(jobs.train.image_size, jobs.train.frames)
    return MultiViewDataset.for_training(folder, size, jobs.train, backbone.patch_size).require_cameras()


def _fits(work: Path, wanted: dict) -> bool:
    """Whether training that was cut off here was going on with these settings."""
    newest = checkpoints.latest(work / "checkpoints")
    return newest is None or checkpoints.read_state(newest, ("settings",))["settings"] == wanted


def _take_gradient(jobs: AdapterJobs, model: nn.Module, name: str, label: str) -> None:
    """Write the gradient adapter of one data set."""
    folder = jobs.datasets[name]
    dataset = _dataset(jobs, model, folder)
    made = gradient_adapter(
        model,
        select_modules(model, jobs.targets),
        dataset,
        jobs.train,
        jobs.gradient_steps,
        jobs.rank,
        None if jobs.quiet else label,
        jobs.gradient_gigabytes,
    )
    if made.energy_kept is None:
        raise ValueError(f"{folder} must have a gradient: the loss of its {jobs.gradient_steps} batches has none")
    about = {
        "source": "gradient",
        "batches": jobs.gradient_steps,
        "norm": made.norm,
        "energy_kept": round(made.energy_kept, 6),
    }
    origin = {"backbone": jobs.backbone.to_dict()}
    with atomic_folder(outputs.claim(jobs.out / name, outputs.ADAPTED, "out")) as temporary:
        fill_lora(temporary, made.factors, model, jobs.backbone.identity, about)
        write_card(temporary, jobs.backbone.identity, jobs.backbone.licence)
        write_json(temporary / RECORD, {"scenes": str(folder), **origin, **about, "settings": jobs.wanted})


def _tune_one(jobs: AdapterJobs, model: nn.Module, name: str) -> nn.Module:
    """Tune and write one adapter; returns the backbone as it was before."""
    dataset = _dataset(jobs, model, jobs.datasets[name])
    tuned = _started(jobs, model, name, dataset)
    result = train(
        tuned,
        dataset,
        jobs.train,
        _work_folder(jobs, name),
        label=_label(jobs, name),
        settings=jobs.wanted,
        snapshot=functools.partial(save_adapter, tuned),
        quiet=jobs.quiet,
    )
    _write(jobs, name, tuned, result)
    return tuned.unload()  # type: ignore[operator]


def _tune_together(jobs: AdapterJobs, model: nn.Module, names: list[str]) -> None:
    """Tune several adapters at a time and write them; the backbone is afterwards as it was before.

    Raises:
        PartsFailed: with what went wrong, by name; the others are written.
    """
    members, failures = {}, {}
    for name in names:
        try:
            dataset = _dataset(jobs, model, jobs.datasets[name])
            tuned = _started(jobs, share_weights(model, select_modules(model, jobs.targets)), name, dataset)
        except Exception as error:
            failures[name] = error
            continue
        members[name] = Member(
            name,
            tuned,
            dataset,
            _work_folder(jobs, name),
            jobs.wanted,
            functools.partial(save_adapter, tuned),
            random_state(next(model.parameters()).device),
        )
    label = f"adapt {names[0]} and {len(names) - 1} more"
    results, failed = train_together(model, list(members.values()), jobs.train, label, jobs.quiet)
    failures |= failed
    for name, result in results.items():
        try:
            _write(jobs, name, members[name].model, result)
        except Exception as error:
            failures[name] = error
    if failures:
        raise PartsFailed(failures)


def _work_folder(jobs: AdapterJobs, name: str) -> Path:
    return jobs.out / ".work" / name


def _started(jobs: AdapterJobs, model: nn.Module, name: str, dataset: MultiViewDataset) -> nn.Module:
    """The adapter of one data set as its training begins, around ``model``; a run of other settings is removed."""
    # lora_A stays close to its start: with one start for all, the adapters would share a subspace by construction
    start = np.random.SeedSequence([jobs.train.seed, zlib.crc32(name.encode())]).generate_state(1)[0]
    torch.manual_seed(int(start))
    tuned = add_lora(model, jobs.rank, jobs.targets, jobs.backbone.identity)
    if jobs.gradient_steps:
        start_at_gradient(tuned, dataset, jobs.train, jobs.gradient_steps, _label(jobs, name), jobs.quiet)
    work = _work_folder(jobs, name)
    if jobs.overwrite and not _fits(work, jobs.wanted):
        remove_run(work)
    return tuned


def _write(jobs: AdapterJobs, name: str, tuned: nn.Module, result: TrainResult) -> None:
    """Write an adapter that is trained, and remove what its training left."""
    work = _work_folder(jobs, name)
    with atomic_folder(outputs.claim(jobs.out / name, outputs.ADAPTED, "out")) as temporary:
        save_adapter(tuned, temporary)
        write_card(temporary, jobs.backbone.identity, jobs.backbone.licence)
        write_json(
            temporary / RECORD,
            {
                "scenes": str(jobs.datasets[name]),
                "backbone": jobs.backbone.to_dict(),
                "trainable": count_trainable(tuned),
                "training": dataclasses.asdict(result),
                "settings": jobs.wanted,
            },
        )
        shutil.copy(work / "metrics.jsonl", temporary / "metrics.jsonl")
        if (work / "tensorboard").is_dir():
            shutil.copytree(work / "tensorboard", temporary / "tensorboard")
    remove_work(jobs.out / ".work", name)
