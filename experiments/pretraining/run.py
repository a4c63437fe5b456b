"""Pre-train vggt-nano from random weights on generic rendered scenes, measure it on held-out scenes, write its weights.

One long run at a constant rate, which a second, short run brings down to zero from any checkpoint of it
(`subspace3d.training.schedule`). The scenes are rendered while it trains: one more shard every so many steps. Losses:
`experiments.pretraining.matching`.

Everything is resumable: run the same command again after a stop and it continues where it was, also with more
``--steps``. ``--branch`` leaves the long run alone: it cools down from its newest checkpoint, measures and exports.
`python -m experiments.pretraining --help` has the settings; `make pretrain-nano` runs it with the committed ones. More
compute: `--device cuda --precision bf16 --images 96`, and on N GPUs, or N cores with `--threads 1`, the same after
`torchrun --nproc-per-node N` in place of `python`. ``--initial`` goes on from weights that were exported before, on new
scenes with ``--scene-seed``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from experiments.pretraining.growing import GrowingScenes
from experiments.pretraining.matching import Pretraining, start_able_to_match
from experiments.pretraining.measure import measure
from experiments.pretraining.muon import Muon, muon_groups
from experiments.pretraining.pictures import draw_examples, plot_losses
from subspace3d import settings
from subspace3d.adapters.parameters import trainable_parameters
from subspace3d.backbones.config import CONFIGS
from subspace3d.backbones.vggt import VGGT
from subspace3d.backbones.weights import load_weights
from subspace3d.commands.generate import GenerateConfig
from subspace3d.datasets.multiview import MultiViewDataset
from subspace3d.files import load_header, save_tensors, sha256, write_json
from subspace3d.training import checkpoints
from subspace3d.training.config import TrainConfig
from subspace3d.training.device import Processes, choose_device, joined_processes
from subspace3d.training.loop import train
from subspace3d.training.run import TrainResult
from subspace3d.training.schedule import constant_rate, cooldown_rate

LARGEST_FILE = 20_000_000
SHAPE = CONFIGS["vggt-nano"]
IMAGE_SIZE = SHAPE.image_size
MATCHING_BLOCKS = (1, 2, 3)
SHARD_SCENES = 250
ROOMS_EVERY = 10  # shards
ROOM_SCENES = 50  # in a shard of rooms, which are so much harder than objects that more of them would lead the training
HELD_OUT_SEED = 1_000_000  # far from the shards', which are their numbers
TASKS: tuple[Literal["faces", "bodies", "glass"], ...] = ("faces", "bodies", "glass")
VIEWS_MEASURED = {"heldout": 4, "circles": 8, "faces": 4, "bodies": 4, "glass": 4}


def main() -> None:
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with joined_processes(choose_device(arguments.device)) as processes:
        pretrain(arguments, processes)


def pretrain(arguments: argparse.Namespace, processes: Processes) -> None:
    torch.manual_seed(arguments.seed)
    model = VGGT(SHAPE)
    earlier = load_initial(model, arguments.initial)
    initial_hash = sha256(arguments.initial) if arguments.initial else None
    model.enable_checkpointing(False)
    trainer = Pretraining(model, MATCHING_BLOCKS)

    shard = partial(render_shard, arguments) if processes.is_first else partial(wait_for_shard, arguments)
    scenes = GrowingScenes(shard, open_scenes, arguments.shards, arguments.first, arguments.every)
    long_run = arguments.out / "long"
    if not arguments.branch:
        rate = partial(constant_rate, peak=arguments.lr, rising=arguments.warmup)
        run(
            trainer, scenes, run_config(arguments, arguments.steps), long_run, rate, "pretrain", processes, initial_hash
        )
    before, folder = branch(long_run, arguments, processes)
    start = before["step"]
    rate = partial(cooldown_rate, start=start, steps=arguments.cooldown, peak=arguments.lr)
    config = run_config(arguments, start + arguments.cooldown)
    result = run(trainer, scenes, config, folder, rate, "cooldown", processes, initial_hash)
    if not processes.is_first:
        return
    render_held_out(arguments)
    measured = {name: MultiViewDataset(arguments.out / "scenes" / name, IMAGE_SIZE) for name in VIEWS_MEASURED}
    held_out = {name: measure(model, measured[name], frames) for name, frames in VIEWS_MEASURED.items()}
    recipe = settings.to_dict(config)
    report = {
        "stages": {
            **earlier["stages"],
            next_stage(earlier["stages"], "constant rate"): {
                "recipe": recipe,
                "training": {"steps": start, "skipped": before["skipped"], "seconds": before["seconds"]},
            },
            next_stage(earlier["stages"], "cooldown"): {
                "recipe": recipe,
                "training": {
                    "steps": arguments.cooldown,
                    "skipped": result.skipped - before["skipped"],
                    "seconds": result.seconds - before["seconds"],
                },
            },
        },
        "shape": asdict(SHAPE),
        "data": {
            "scenes": earlier["data"]["scenes"] + len(scenes.at(config.steps - 1)),
            "views": arguments.views,
            "mirror": True,
        },
        "held_out": held_out,
    }
    write_json(folder / "pretrain.json", report)
    plot_losses([long_run / "metrics.jsonl", folder / "metrics.jsonl"], start, folder / "loss.png")
    draw_examples(model, measured, folder / "examples.png")
    export(model, arguments.export or folder / "vggt_nano.safetensors", report)
    print(json.dumps(held_out, indent=1))


def load_initial(model: VGGT, path: Path | None) -> dict[str, Any]:
    """Give the model its first values: those of a file, or random ones. Returns what was done for them so far."""
    if path is None:
        start_able_to_match(model)
        return {"stages": {}, "data": {"scenes": 0}}
    load_weights(model, path)
    return load_header(path)


def next_stage(stages: Mapping[str, Any], name: str) -> str:
    """``name``, or ``name`` with a number where stages of that name came before."""
    count = sum(stage.startswith(name) for stage in stages)
    return f"{name} {count + 1}" if count else name


def run(
    trainer: Pretraining,
    scenes: GrowingScenes,
    config: TrainConfig,
    out: Path,
    rate: Any,
    label: str,
    processes: Processes,
    initial: str | None = None,
) -> TrainResult:
    """One stage. ``initial`` names the weights it started from, so that no other run is continued by mistake."""
    optimizer = Muon(muon_groups(trainable_parameters(trainer), config.weight_decay), config.lr, processes)
    return train(
        trainer,
        scenes,
        config,
        out,
        label=label,
        settings={"shape": asdict(SHAPE), "shards": [scenes.shards, scenes.first, scenes.every], "initial": initial},
        objective=trainer.objective,
        optimizer=optimizer,
        rate=rate,
    )


def branch(long_run: Path, arguments: argparse.Namespace, processes: Processes) -> tuple[dict[str, Any], Path]:
    """Counters at the newest checkpoint of the long run, and the folder of the cooldown, with a copy of it.

    Raises:
        FileNotFoundError: the long run has no checkpoint.
    """
    newest = checkpoints.latest(long_run / "checkpoints")
    if newest is None:
        raise FileNotFoundError(f"the long run has no checkpoint yet below {long_run}")
    before = checkpoints.read_state(newest, ("step", "skipped", "seconds"))
    folder = arguments.out / f"cooldown_{before['step']}_{arguments.cooldown}"
    if processes.is_first and checkpoints.latest(folder / "checkpoints") is None:
        temporary = folder / "checkpoints" / f".{newest.name}.tmp"
        shutil.copytree(newest, temporary, dirs_exist_ok=True)
        temporary.rename(folder / "checkpoints" / newest.name)
    processes.wait()
    return before, folder


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/pretrain"), help="run folder")
    parser.add_argument("--initial", type=Path, help="weights to start from, as exported before; none: random")
    parser.add_argument("--scene-seed", type=int, default=0, help="seed of the first shard; others are after it")
    parser.add_argument(
        "--shards", type=int, default=40, help=f"shards of {SHARD_SCENES} training scenes, or {ROOM_SCENES} rooms"
    )
    parser.add_argument("--first", type=int, default=2, help="shards in use at the start")
    parser.add_argument("--every", type=int, default=600, help="steps from one shard to the next")
    parser.add_argument("--heldout", type=int, default=32, help="held-out scenes, and training scenes of each task")
    parser.add_argument("--views", type=int, default=8, help="images per scene")
    parser.add_argument("--steps", type=int, default=60_000, help="optimiser steps of the long run")
    parser.add_argument("--warmup", type=int, default=500, help="of them, in which the rate rises")
    parser.add_argument("--cooldown", type=int, default=6000, help="steps in which the rate falls to zero")
    parser.add_argument("--branch", action="store_true", help="cool down from the newest checkpoint, train no further")
    parser.add_argument("--images", type=int, default=12, help="images per step")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of the long run")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="autocast type")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batches")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's default")
    parser.add_argument("--workers", type=int, default=0, help="processes that render; 0: one per core")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--export", type=Path, help="weights file to write; none: into the folder of the cooldown")
    return parser.parse_args()


def render_shard(arguments: argparse.Namespace, number: int) -> Path:
    """Render shard ``number`` unless it is there: by turns arcs of 60 to 360 and of 60 to 120 degrees, or rooms.

    Four samples per pixel and a denoiser take half the time of 16 samples and are nearer to the converged image.
    """
    from subspace3d.commands import generate

    folder = shard_folder(arguments, number)
    if is_whole(arguments, number):
        return folder
    room = has_rooms(number)
    generate.run(
        GenerateConfig(
            out=folder.parent,
            name=folder.name.removesuffix("_00"),
            attribute="all",
            preset="generic",
            regime="room" if room else "object",
            span=(60.0, 120.0) if room or number % 2 else (60.0, 360.0),
            scenes=shard_scenes(number),
            views=arguments.views,
            resolution=IMAGE_SIZE,
            spp=4,
            denoise=True,
            seed=arguments.scene_seed + number,
            workers=arguments.workers,
        )
    )
    return folder


def wait_for_shard(arguments: argparse.Namespace, number: int) -> Path:
    """The folder of a shard once another process has rendered it.

    Batches are drawn while the gradients of a step are exchanged, so this looks for the files: a second exchange at the
    same time could be taken for the first.
    """
    folder = shard_folder(arguments, number)
    while not is_whole(arguments, number):
        time.sleep(1)
    return folder


def has_rooms(number: int) -> bool:
    return number % ROOMS_EVERY == ROOMS_EVERY // 2


def shard_scenes(number: int) -> int:
    return ROOM_SCENES if has_rooms(number) else SHARD_SCENES


def is_whole(arguments: argparse.Namespace, number: int) -> bool:
    return len(list(shard_folder(arguments, number).glob("scene_*/scene.json"))) == shard_scenes(number)


def shard_folder(arguments: argparse.Namespace, number: int) -> Path:
    return arguments.out / f"scenes/train/shard{number:03d}_00"


def open_scenes(folders: list[Path]) -> MultiViewDataset:
    return MultiViewDataset(folders, IMAGE_SIZE, mirror=True, cache_bytes=1 << 31)


def render_held_out(arguments: argparse.Namespace) -> None:
    """Render what is missing of the scenes to measure on: new generic ones, full circles, the three tasks."""
    from subspace3d.commands import generate

    common = {
        "scenes": arguments.heldout,
        "views": arguments.views,
        "resolution": IMAGE_SIZE,
        "spp": 16,
        "workers": arguments.workers,
    }
    folder = arguments.out / "scenes"
    for number, (name, span) in enumerate({"heldout": (60.0, 120.0), "circles": (360.0, 360.0)}.items()):
        generate.run(
            GenerateConfig(
                out=folder / name, name=name, attribute="all", preset="generic", span=span,
                seed=HELD_OUT_SEED + number, **common
            )
        )  # fmt: skip
    for task in TASKS:
        generate.run(GenerateConfig(out=folder / task, task=task, seed=2 * HELD_OUT_SEED, **common))


def run_config(arguments: argparse.Namespace, steps: int) -> TrainConfig:
    return TrainConfig(
        steps=steps,
        lr=arguments.lr,
        weight_decay=0.05,
        camera_weight=1.0,
        frames=(2, 6),
        images_per_step=arguments.images,
        checkpointing=False,
        precision=arguments.precision,
        save_every=50,
        seed=arguments.seed,
        device=arguments.device,
        threads=arguments.threads,
    )


def export(model: nn.Module, path: Path, report: dict) -> None:
    """Write the weights as fp16 with the recipe and the held-out figures in the header.

    Raises:
        ValueError: the file would be larger than a package should carry.
    """
    tensors = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if size > LARGEST_FILE:
        raise ValueError(f"weights must take at most {LARGEST_FILE} bytes as fp16, got {size}")
    save_tensors(path, tensors, {"format": "subspace3d-backbone", "version": 1, "backbone": SHAPE.name, **report})
