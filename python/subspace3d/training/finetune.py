"""The verb finetune: one backbone, one method, one folder of scenes."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import shutil
from pathlib import Path
from typing import Any

import torch

from subspace3d import __version__, settings
from subspace3d.adapters.basis import load_basis, select_files
from subspace3d.adapters.hooks import method_hook
from subspace3d.adapters.methods import apply_method
from subspace3d.adapters.parameters import count_trainable
from subspace3d.adapters.placement import place
from subspace3d.adapters.spectral import singular_basis
from subspace3d.backbones.record import load_backbone, record_backbone
from subspace3d.backbones.vggt import VGGT
from subspace3d.configs import GRADIENT_BATCHES, FinetuneConfig
from subspace3d.datasets.multiview import MultiViewDataset
from subspace3d.files import sha256
from subspace3d.formats.basis import Basis
from subspace3d.formats.run import read_tuned
from subspace3d.training.device import Processes, choose_device, device_name, joined_processes
from subspace3d.training.fit_start import start_cores
from subspace3d.training.loop import run_settings, train
from subspace3d.training.memory import check_memory
from subspace3d.training.token_cache import TokenCache
from subspace3d.training.tuned import save_adapter, save_tuned

# Methods whose checkpoints hold the adapter as PEFT writes it: those for which that is a small file of its own.
SNAPSHOTS = ("lora", "adalora")
# what runs did whose records do not say it
_WITHOUT_A_CHOICE = {"heads": "lora", "start": "zero"}


def run(config: FinetuneConfig) -> dict[str, Any]:
    """Tune and write OUT/tuned; returns tuned.json. A finished run is not done again, a cut-off one is continued.

    Under torchrun every process calls it; the first of them writes.

    Raises:
        ValueError: OUT holds a run with other settings, or settings that do not fit the backbone or the subspaces.
        FileNotFoundError: scenes, weights or subspaces are missing.
    """
    with joined_processes(choose_device(config.train.device)) as processes:
        return _run(config, processes)


def _run(config: FinetuneConfig, processes: Processes) -> dict[str, Any]:
    subspaces: list[Path] = []
    if config.method == "subspace":
        if not config.subspaces:
            raise ValueError("subspaces must name at least one subspace file or a folder of them, got none")
        subspaces = list(select_files(config.subspaces, config.attributes).values())
    backbone = record_backbone(config.backbone, config.weights, config.train.seed)
    identity = {
        "method": config.method,
        "backbone": backbone.identity,
        "rank": config.rank,
        "targets": config.targets,
        "K": config.K,
        "k": config.k,
        "head_cores": config.head_cores,
        "heads": config.heads,
        "start": config.start,
        "basis": [{"path": str(path), "sha256": sha256(path)} for path in subspaces],
        "scenes": str(config.scenes),
    }
    wanted = run_settings(config.train, identity)
    if config.resume == "never" and processes.is_first:
        shutil.rmtree(config.out / "tuned", ignore_errors=True)
    processes.wait()
    if (config.out / "tuned" / "tuned.json").is_file():
        record = read_tuned(config.out)
        before = {**_WITHOUT_A_CHOICE, **record["settings"]}
        differing = [name for name, value in wanted.items() if before.get(name) != value]
        if differing:
            raise ValueError(
                f"out: {config.out} holds a finished run with another {differing[0]} "
                f"({before.get(differing[0])!r} instead of {wanted[differing[0]]!r})"
            )
        return record

    vggt = load_backbone(backbone)
    image_size = config.train.image_size or vggt.config.image_size
    dataset = MultiViewDataset.for_training(config.scenes, image_size, config.train)
    basis = _basis(config, subspaces, vggt)
    vggt.enable_checkpointing(config.train.checkpointing)
    torch.manual_seed(config.train.seed)
    vggt.to(choose_device(config.train.device))
    model = apply_method(
        vggt,
        config.method,
        config.rank,
        config.targets,
        basis,
        backbone.identity,
        steps=config.train.steps,
        heads=config.heads,
    )
    if processes.is_first:
        settings.save(config.out / "config.yaml", config)
    result = start = None
    if config.method != "none":
        if processes.is_first:
            sharing = 1 if choose_device(config.train.device).type == "cuda" else processes.count
            check_memory(model, config.train, image_size, processes.count, sharing)
        processes.wait()
        with _token_cache(config, vggt):
            if config.start == "fit":
                start = start_cores(model, dataset, config.train, GRADIENT_BATCHES, "start of the cores")
            result = train(
                model,
                dataset,
                config.train,
                config.out,
                resume=config.resume == "auto",
                label=config.method,
                settings=identity,
                hook=method_hook(model),
                snapshot=(lambda folder: save_adapter(model, folder)) if config.method in SNAPSHOTS else None,
            )
    if not processes.is_first:
        processes.wait()
        return read_tuned(config.out)
    save_tuned(
        config.out,
        model,
        config.method,
        backbone,
        basis,
        {
            "rank": config.rank,
            "K": max((u.shape[1] for u, _ in basis.values()), default=0) if basis else 0,
            "basis": identity["basis"],
            "trainable": count_trainable(model),
            "training": dataclasses.asdict(result) if result else None,
            "start": dataclasses.asdict(start) if start else None,
            "environment": {
                "subspace3d": __version__,
                "torch": torch.__version__,
                "device": device_name(config.train.device),
                "finished": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            },
            "settings": wanted,
        },
    )
    processes.wait()
    return read_tuned(config.out)


def _token_cache(config: FinetuneConfig, vggt: VGGT) -> contextlib.AbstractContextManager:
    if config.cache_tokens is None:
        return contextlib.nullcontext()
    return TokenCache(config.cache_tokens, vggt.aggregator.patch_embed, config.cache_gigabytes).attached()


def _basis(config: FinetuneConfig, subspaces: list[Path], vggt: VGGT) -> Basis | None:
    if config.method == "subspace":
        return load_basis(subspaces, vggt, config.K, config.k, config.head_cores)
    if config.method == "psv":
        return singular_basis(vggt, place(vggt, "psv", head_cores=config.head_cores).cores, config.K)
    return None
