"""Pre-train vggt-nano from random weights on generic rendered scenes, measure it on held-out scenes, ship its weights.

Two stages, each with its own warm-up and cosine: first cameras, matching and the points of every patch, without the
depth head, which costs half of a step and needs features; then everything (`subspace3d.training.pretraining`).

Everything is resumable: run the same command again after a stop and it continues where it was.
`python scripts/pretrain_nano.py --help` has the settings; `make pretrain-nano` runs it with the committed ones. More
compute: `--device cuda --precision bf16 --images 96 --steps 30000 10000 --scenes 5000`, and on N GPUs the same after
`torchrun --nproc-per-node N` instead of `python`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from subspace3d import settings
from subspace3d.adapters.parameters import trainable_parameters
from subspace3d.backbones import build_vggt
from subspace3d.backbones.pose import decode_pose
from subspace3d.commands.generate import GenerateConfig
from subspace3d.datasets.multiview import MultiViewDataset
from subspace3d.evaluation.alignment import scale_alignment
from subspace3d.evaluation.depth import absolute_relative
from subspace3d.evaluation.pose import relative_pose_errors
from subspace3d.files import atomic_path, save_tensors, write_json
from subspace3d.training.config import TrainConfig
from subspace3d.training.device import Processes, choose_device, joined_processes
from subspace3d.training.loop import train
from subspace3d.training.pretraining import Pretraining, start_able_to_match

SHIPPED = Path(__file__).resolve().parent.parent / "python/subspace3d/backbones/vggt_nano.safetensors"
LARGEST_FILE = 20_000_000
IMAGE_SIZE = 112
STAGES = ("cameras", "everything")
TASKS: tuple[Literal["faces", "bodies", "glass"], ...] = ("faces", "bodies", "glass")


def main() -> None:
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with joined_processes(choose_device(arguments.device)) as processes:
        pretrain(arguments, processes)


def pretrain(arguments: argparse.Namespace, processes: Processes) -> None:
    out = arguments.out
    if processes.is_first:
        render_scenes(out / "scenes", arguments)
    processes.wait()
    dataset = MultiViewDataset(out / "scenes/train", IMAGE_SIZE, augment=arguments.augment, mirror=True)
    torch.manual_seed(arguments.seed)
    model = build_vggt("vggt-nano", weights="random")
    start_able_to_match(model)
    model.enable_checkpointing(False)
    trainer = Pretraining(model)
    stages = {}
    for name, steps, lr in zip(STAGES, arguments.steps, arguments.lr):
        trainer.run_depth_head(name == "everything")
        config = stage_config(arguments, steps, lr)
        with products(arguments.products):
            result = train(
                trainer,
                dataset,
                config,
                out / name,
                groups=decay_matrices_only(trainer, config),
                label=f"pretrain: {name}",
                objective=trainer.objective,
            )
        stages[name] = {"recipe": settings.to_dict(config), "training": asdict(result)}
    if not processes.is_first:
        return
    measured = {name: MultiViewDataset(out / "scenes" / name, IMAGE_SIZE) for name in ("heldout", *TASKS)}
    held_out = {name: measure(model, scenes, frames=4) for name, scenes in measured.items()}
    report = {
        "stages": stages,
        "products": arguments.products,
        "data": {"scenes": len(dataset), "views": arguments.views, "mirror": True, "augment": arguments.augment},
        "held_out": held_out,
    }
    write_json(out / "pretrain.json", report)
    plot_losses([out / name / "metrics.jsonl" for name in STAGES], out / "loss.png")
    draw_examples(model, measured, out / "examples.png")
    export(model, arguments.export, report)
    print(json.dumps(held_out, indent=1))


@contextlib.contextmanager
def products(kind: str) -> Iterator[None]:
    """``bf16``: on the CPU, round the inputs of matrix products to bf16 and add up in fp32, faster where it has AMX.

    Attention then runs as plain products: torch's fused one is slow in this mode.
    """
    if kind == "fp32":
        yield
        return
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/pretrain"), help="run folder")
    parser.add_argument("--scenes", type=int, default=1024, help="training scenes")
    parser.add_argument("--heldout", type=int, default=32, help="held-out scenes, and training scenes of each task")
    parser.add_argument("--views", type=int, default=8, help="images per scene")
    parser.add_argument("--steps", type=int, nargs=2, default=[5500, 1900], help="optimiser steps of the two stages")
    parser.add_argument("--images", type=int, default=12, help="images per step")
    parser.add_argument("--lr", type=float, nargs=2, default=[7e-4, 4e-4], help="peak learning rates of the two stages")
    parser.add_argument("--augment", action="store_true", help="colour jitter, drawn anew for every image")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="autocast type")
    parser.add_argument("--products", choices=["fp32", "bf16"], default="fp32", help="matrix products on the CPU")
    parser.add_argument("--seed", type=int, default=0, help="seed of scenes, weights and batches")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's default")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--export", type=Path, default=SHIPPED, help="weights file to write")
    return parser.parse_args()


def render_scenes(folder: Path, arguments: argparse.Namespace) -> None:
    """Render what is missing of the scenes; the seeds differ, so none is both trained on and measured on."""
    from subspace3d.commands import generate

    common = {"views": arguments.views, "resolution": IMAGE_SIZE, "spp": 16}
    for name, scenes, seed in (("train", arguments.scenes, 0), ("heldout", arguments.heldout, 10_000)):
        seed += arguments.seed
        generic = GenerateConfig(
            out=folder / name, attribute="all", preset="generic", scenes=scenes, name=name, seed=seed, **common
        )
        generate.run(generic)
    for task in TASKS:
        seed = arguments.seed + 20_000
        generate.run(GenerateConfig(out=folder / task, task=task, scenes=arguments.heldout, seed=seed, **common))


def stage_config(arguments: argparse.Namespace, steps: int, lr: float) -> TrainConfig:
    return TrainConfig(
        steps=steps,
        lr=lr,
        weight_decay=0.05,
        warmup=0.03,
        camera_weight=1.0,
        frames=(2, 4),
        images_per_step=arguments.images,
        checkpointing=False,
        precision=arguments.precision,
        save_every=250,
        seed=arguments.seed,
        device=arguments.device,
        threads=arguments.threads,
    )


def decay_matrices_only(model: nn.Module, config: TrainConfig) -> list[dict]:
    """Weight decay on matrices and kernels; none on biases, norms, layer scales and tokens."""
    parameters = trainable_parameters(model)
    decayed = [p for name, p in parameters.items() if p.ndim >= 2 and name.endswith("weight")]
    others = [p for name, p in parameters.items() if not (p.ndim >= 2 and name.endswith("weight"))]
    return [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]


def measure(model: nn.Module, dataset: MultiViewDataset, frames: int) -> dict[str, float]:
    """Abs Rel of the depth and rotation error of the cameras, on the first ``frames`` views of every scene.

    Both the model's and the constant's depth are scaled once per scene by the factor that minimises Abs Rel itself
    (see `scale_alignment`), so the constant compared with is the best one there is for each scene.
    """
    device = next(model.parameters()).device
    model.eval()
    model_errors, constant_errors, rotation_errors = [], [], []
    for index in range(len(dataset)):
        scene = dataset.scene(index)
        images = torch.from_numpy(scene.images[:frames]).permute(0, 3, 1, 2)[None].float() / 255
        with torch.no_grad():
            predictions = model(images.to(device))
        depth = predictions["depth"][0, ..., 0].cpu().numpy().astype(np.float64)
        truth = scene.depths[:frames].astype(np.float64)
        valid = truth > 0
        for predicted, errors in ((depth, model_errors), (np.ones_like(truth), constant_errors)):
            scale = scale_alignment(predicted, truth, valid)
            errors.append(absolute_relative(scale * predicted, truth, valid))
        extrinsics, _ = decode_pose(predictions["pose_enc"].cpu(), (IMAGE_SIZE, IMAGE_SIZE))
        pairs = relative_pose_errors(extrinsics[0].double().numpy(), scene.extrinsics[:frames])
        rotation_errors += pairs.rotation_deg.tolist()
    return {
        "scenes": len(dataset),
        "frames": frames,
        "abs_rel": float(np.mean(model_errors)),
        "abs_rel_constant": float(np.mean(constant_errors)),
        "times_better": float(np.mean(constant_errors) / np.mean(model_errors)),
        "rotation_error_median_deg": float(np.median(rotation_errors)),
    }


def plot_losses(metrics: list[Path], picture: Path) -> None:
    """Every logged term of the stages, one after the other, smoothed over 1 % of them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [json.loads(line) for path in metrics for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line["loss"] is not None]
    images = np.arange(len(lines)) * lines[0]["images"] / 1000
    width = max(1, len(lines) // 100)
    figure, axes = plt.subplots(2, 4, figsize=(14, 6), sharex=True, layout="constrained")
    names = ("rotation", "translation", "fov", "match", "points", "depth_error", "depth_gradient", "lr")
    for axis, name in zip(axes.flat, names):
        values = [line.get(name, np.nan) for line in lines]
        axis.plot(images[width - 1 :], np.convolve(values, np.ones(width) / width, mode="valid"), linewidth=1)
        axis.set_title(name)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("thousand images")
    with atomic_path(picture) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)


def draw_examples(model: nn.Module, measured: dict[str, MultiViewDataset], picture: Path, scenes: int = 2) -> None:
    """First view of a few scenes of every kind: image, true depth, predicted depth in the colours of the true one."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(measured), 3 * scenes, figsize=(2 * 3 * scenes, 2.1 * len(measured)))
    figure.subplots_adjust(left=0.03, right=0.998, bottom=0.005, top=0.95, wspace=0.03, hspace=0.03)
    for row, (name, dataset) in zip(axes, measured.items()):
        row[0].set_ylabel(name)
        for index, (image, true, predicted) in enumerate(zip(row[::3], row[1::3], row[2::3])):
            scene = dataset.scene(index)
            images = torch.from_numpy(scene.images[:4]).permute(0, 3, 1, 2)[None].float() / 255
            with torch.no_grad():
                depth = model(images.to(next(model.parameters()).device))["depth"][0, 0, ..., 0].cpu().numpy()
            truth = np.where(scene.depths[0] > 0, scene.depths[0], np.nan)
            scale = scale_alignment(
                depth[None].astype(np.float64), scene.depths[:1].astype(np.float64), truth[None] > 0
            )
            low, high = np.nanpercentile(truth, (2, 98))
            image.imshow(scene.images[0])
            true.imshow(truth, cmap="turbo_r", vmin=low, vmax=high)
            predicted.imshow(np.where(np.isnan(truth), np.nan, scale * depth), cmap="turbo_r", vmin=low, vmax=high)
    for axis, title in zip(axes[0], ("image", "true depth", "predicted depth") * scenes):
        axis.set_title(title, fontsize=10)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    with atomic_path(picture) as temporary:
        figure.savefig(temporary, dpi=80)
    plt.close(figure)


def export(model: nn.Module, path: Path, report: dict) -> None:
    """Write the weights as fp16 with the recipe and the held-out figures in the header.

    Raises:
        ValueError: the file would be larger than a package should carry.
    """
    tensors = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if size > LARGEST_FILE:
        raise ValueError(f"weights must take at most {LARGEST_FILE} bytes as fp16, got {size}")
    save_tensors(path, tensors, {"format": "subspace3d-backbone", "version": 1, "backbone": "vggt-nano", **report})


if __name__ == "__main__":
    main()
