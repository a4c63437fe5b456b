"""Images a second of several adapters trained together, beside as many runs one after another and two at a time.

python benchmarks/together.py [--adapters 4] [--images-per-step 4 16] [--image-size 112] [--rounds 5] [--out FOLDER]

Optimiser steps of vggt-nano with LoRA on all targets, as `adapt` takes them (loss, clipping, AdamW), on images that are
in memory. All ways take turns, round after round; the fastest round of each counts, because whatever else runs on the
machine only makes a round slower. Process time on one thread says what an image costs. Wall time is taken on two
cores: one process of two threads, or two processes of one thread each. Before anything is timed, the gradients of the
two ways must agree.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# read by OpenMP when torch is imported: threads that wait for one whose core is busy elsewhere shall not spin
os.environ["OMP_WAIT_POLICY"] = "passive"
import torch
from torch import nn

from subspace3d.adapters.methods import add_lora
from subspace3d.adapters.multi_lora import joined, share_weights
from subspace3d.adapters.parameters import trainable_parameters
from subspace3d.adapters.placement import select_modules
from subspace3d.backbones.find import find_backbone
from subspace3d.bench import harness
from subspace3d.training.config import TrainConfig
from subspace3d.training.device import Processes
from subspace3d.training.run import Run, new_optimizer, prepare, random_state
from subspace3d.training.step import draw_step, set_modes
from subspace3d.training.together import JointStep, Member

BACKBONE, RANK, FRAMES = "vggt-nano", 16, 2


@dataclasses.dataclass(frozen=True)
class Noise:
    """Batches of one seed: images of noise of a wall at depth 1, seen from cameras side by side."""

    seed: int
    size: int

    def batch(self, seed: int, step: int, frames: tuple[int, int], images_per_step: int) -> dict[str, Any]:
        scenes, count = images_per_step // frames[1], frames[1]
        generator = torch.Generator().manual_seed(self.seed)
        extrinsics = torch.eye(3, 4).repeat(scenes, count, 1, 1)
        extrinsics[..., 0, 3] = torch.linspace(0, 0.3, count)
        intrinsics = torch.eye(3).repeat(scenes, count, 1, 1)
        intrinsics[..., 0, 0] = intrinsics[..., 1, 1] = self.size
        intrinsics[..., :2, 2] = self.size / 2
        return {
            "images": torch.rand(scenes, count, 3, self.size, self.size, generator=generator),
            "depths": torch.ones(scenes, count, self.size, self.size),
            "point_masks": torch.ones(scenes, count, self.size, self.size, dtype=torch.bool),
            "extrinsics": extrinsics,
            "intrinsics": intrinsics,
        }


class Runs:
    """Adapters on one network and the runs that train them, none of which is saved."""

    def __init__(self, network: nn.Module, numbers: range, config: TrainConfig, folder: Path) -> None:
        self.members, self.runs, self.data = [], {}, {}
        for index, number in enumerate(numbers):
            torch.manual_seed(number)
            tuned = add_lora(share_weights(network, select_modules(network, "all")), RANK, "all")
            device = torch.device("cpu")
            parameters = prepare(tuned, config, device)
            name, dataset = f"{number}", Noise(number, config.image_size)
            self.members.append(Member(name, tuned, dataset, folder, {}, lambda path: None, random_state(device)))
            optimizer = new_optimizer(parameters, config)
            self.runs[index] = Run(tuned, parameters, optimizer, config, folder, device, Processes(), {})
            self.data[index] = draw_step(dataset, config, 0, Processes())

    def one_after_another(self) -> None:
        for index, run in self.runs.items():
            run.take_step(self.data[index])

    def together(self, step: JointStep) -> None:
        terms = step.gradients(self.data)
        for index, run in self.runs.items():
            run.apply(terms[index], self.data[index].images)

    def gradients(self) -> torch.Tensor:
        values = [p for member in self.members for p in trainable_parameters(member.model).values()]
        return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in values])


def main() -> None:
    arguments = parse_arguments()
    rows = []
    for images in arguments.images_per_step:
        rows.append(measure(arguments.adapters, images, arguments.image_size, arguments.rounds))
        print(json.dumps(rows[-1]), flush=True)
    if arguments.out:
        print(harness.append_rows(arguments.out, rows))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=4, help="an even number")
    parser.add_argument("--images-per-step", type=int, nargs="*", default=[4, 16], help="of each adapter")
    parser.add_argument("--image-size", type=int, default=112)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="append the rows to DEVICE.jsonl in this folder")
    return parser.parse_args()


def settings(images: int, size: int) -> TrainConfig:
    return TrainConfig(
        lr=1e-4, frames=(FRAMES, FRAMES), images_per_step=images, image_size=size, device="cpu", steps=10**6,
        checkpointing=False,
    )  # fmt: skip


def load() -> nn.Module:
    return find_backbone(BACKBONE).build()


def measure(adapters: int, images: int, size: int, rounds: int) -> dict[str, Any]:
    config = settings(images, size)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        alone, half = Runs(load(), range(adapters), config, folder), Runs(load(), range(adapters // 2), config, folder)
        network = load()
        joint = Runs(network, range(adapters), config, folder)
        partner, process = start_partner(range(adapters // 2, adapters), config, folder)
        try:
            with joined(network, [member.model for member in joint.members]) as chosen:
                set_modes(network)
                step = JointStep(network, joint.members, config, chosen)
                check_equal(alone, joint, step)
                ways = {
                    "one after another": alone.one_after_another,
                    "together": lambda: joint.together(step),
                    "two at a time": lambda: two_at_a_time(half, partner),
                }
                process_time = least(ways, ("one after another", "together"), time.process_time, 1, rounds)
                wall = least(ways, tuple(ways), time.perf_counter, 2, rounds)
        finally:
            partner.close()
            process.join()
    total = adapters * images
    return {
        "benchmark": "together", "backbone": BACKBONE, "adapters": adapters, "r": RANK, "images_per_step": images,
        "frames": FRAMES, "image_size": size, "rounds": rounds, "cores_of_wall_time": 2,
        "images_per_core_second": {way: round(total / seconds, 3) for way, seconds in process_time.items()},
        "images_per_second": {way: round(total / seconds, 3) for way, seconds in wall.items()},
        **harness.provenance(torch.device("cpu")),
    }  # fmt: skip


def check_equal(alone: Runs, joint: Runs, step: JointStep) -> None:
    """Raise unless both ways give one gradient: float32 sums in another order, relative to the largest entry."""
    alone.one_after_another()
    joint.together(step)
    expected, found = alone.gradients(), joint.gradients()
    error = float((found - expected).abs().max() / expected.abs().max())
    if not error < 2e-5:
        raise SystemExit(f"gradients of adapters trained together differ by {error:.1e} of the largest")


def least(
    ways: dict[str, Callable[[], None]], wanted: tuple[str, ...], now: Callable[[], float], threads: int, rounds: int
) -> dict[str, float]:
    """Seconds of the fastest round of each way, after one that does not count."""
    found = dict.fromkeys(wanted, float("inf"))
    for number in range(rounds + 1):
        for way in wanted:
            torch.set_num_threads(1 if way == "two at a time" else threads)
            started = now()
            ways[way]()
            if number:
                found[way] = min(found[way], now() - started)
    return found


def two_at_a_time(half: Runs, partner: Connection) -> None:
    partner.send("go")
    half.one_after_another()
    partner.recv()


def start_partner(numbers: range, config: TrainConfig, folder: Path) -> tuple[Connection, Any]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, numbers, config, folder))
    process.start()
    theirs.close()
    ours.recv()
    return ours, process


def serve(connection: Connection, numbers: range, config: TrainConfig, folder: Path) -> None:
    torch.set_num_threads(1)
    runs = Runs(load(), numbers, config, folder)
    connection.send("ready")
    while True:
        try:
            connection.recv()
        except EOFError:
            sys.exit()
        runs.one_after_another()
        connection.send("done")


if __name__ == "__main__":
    main()
