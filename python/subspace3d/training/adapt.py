"""The verb adapt: one stock PEFT LoRA for every data set."""

from __future__ import annotations

import dataclasses
import shutil
import zlib
from pathlib import Path

import numpy as np
import torch

from subspace3d import settings
from subspace3d.adapters.methods import add_lora
from subspace3d.adapters.parameters import count_trainable
from subspace3d.backbones.vggt import VGGT
from subspace3d.configs import AdaptConfig
from subspace3d.datasets.multiview import MultiViewDataset
from subspace3d.datasets.scene_format import find_scenes
from subspace3d.files import atomic_folder, read_json, write_json
from subspace3d.training.backbone import load_backbone, record_backbone
from subspace3d.training.loop import run_settings, train
from subspace3d.training.tuned import save_adapter

RECORD = "adapt.json"


def run(config: AdaptConfig) -> list[Path]:
    """Tune what is missing; returns the adapter folders, in the order of the data sets.

    An adapter that stands is not made again; one that was cut off continues from its checkpoints in OUT/.work.

    Raises:
        ValueError: an adapter in OUT was made with other settings.
        FileNotFoundError: scenes or weights are missing.
    """
    datasets = find_datasets(config.scenes)
    backbone = record_backbone(config.backbone, config.weights, config.train.seed)
    wanted = run_settings(config.train, {"backbone": backbone.identity, "rank": config.rank, "targets": config.targets})
    todo = {name: folder for name, folder in datasets.items() if not _is_done(config.out / name, wanted)}
    if todo:
        settings.save(config.out / "config.yaml", config)
        model = load_backbone(backbone)
        model.enable_checkpointing(config.train.checkpointing)
        for number, (name, folder) in enumerate(todo.items(), len(datasets) - len(todo) + 1):
            label = f"adapt {name} ({number}/{len(datasets)})"
            model = _tune_one(config, model, name, folder, wanted, backbone.identity, label)
    shutil.rmtree(config.out / ".work", ignore_errors=True)
    return [config.out / name for name in datasets]


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
    before = read_json(folder / RECORD)["settings"]
    for name, value in wanted.items():
        if before.get(name) != value:
            raise ValueError(f"out: {folder} was made with {name} {before.get(name)!r}, not {value!r}")
    return True


def _tune_one(
    config: AdaptConfig, model: VGGT, name: str, folder: Path, wanted: dict, base_model: str, label: str
) -> VGGT:
    """Tune and write one adapter; returns the backbone as it was before."""
    image_size = config.train.image_size or model.config.image_size
    dataset = MultiViewDataset.for_training(folder, image_size, config.train)
    # lora_A stays close to its start: with one start for all, the adapters would share a subspace by construction
    start = np.random.SeedSequence([config.train.seed, zlib.crc32(name.encode())]).generate_state(1)[0]
    torch.manual_seed(int(start))
    tuned = add_lora(model, config.rank, config.targets, base_model)
    work = config.out / ".work" / name
    result = train(tuned, dataset, config.train, work, label=label, settings=wanted)
    with atomic_folder(config.out / name) as temporary:
        save_adapter(tuned, temporary)
        write_json(
            temporary / RECORD,
            {
                "scenes": str(folder),
                "trainable": count_trainable(tuned),
                "training": dataclasses.asdict(result),
                "settings": wanted,
            },
        )
        shutil.copy(work / "metrics.jsonl", temporary / "metrics.jsonl")
    shutil.rmtree(work)
    return tuned.unload()  # type: ignore[operator]
