"""A small run folder like the one the demo leaves: planted adapters really mined and analyzed, made-up results."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
from evaluation.analytic_scene import ball_and_wall
from mining.synthetic_adapters import orthonormal, write_adapter

from subspace3d.choices import ATTRIBUTES
from subspace3d.commands import analyze, mine
from subspace3d.commands.analyze import AnalyzeConfig
from subspace3d.commands.mine import MineConfig
from subspace3d.evaluation import pictures
from subspace3d.evaluation.alignment import Similarity
from subspace3d.evaluation.scene_metrics import Views
from subspace3d.evaluation.table import METRICS, mean_over_scenes
from subspace3d.files import write_json

WIDTH = 48
RANK = 4
KINDS = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
METHODS = {"base": 1.0, "full": 0.55, "lora": 0.6, "subspace": 0.5}
VIEWS = 4
# from the world in which the made-up predictions live to the true one
ALIGNMENT = Similarity(2.5, np.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]), np.array([0.5, -1.0, 2.0]))


TRAINABLE = {"full": 9_812_345, "lora": 254_912, "subspace": 61_440}


def write_adapters(root: Path, attributes: tuple[str, ...], layers: int, datasets: int = 4) -> None:
    """Adapters whose updates share a subspace that is clearer in deep layers; the last data set of each is off."""
    rng = np.random.default_rng(7)
    for attribute in attributes:
        shared: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for dataset in range(datasets):
            modules = {}
            for blocks in ("frame_blocks", "global_blocks"):
                for layer in range(layers):
                    for kind, (out, in_) in KINDS.items():
                        name = f"aggregator.{blocks}.{layer}.{kind}"
                        sizes = out * WIDTH, in_ * WIDTH
                        if name not in shared:
                            shared[name] = orthonormal(rng, sizes[0], RANK), orthonormal(rng, sizes[1], RANK)
                        left, right = shared[name]
                        noise = 0.9 * math.exp(-0.5 * layer) + (0.8 if dataset == datasets - 1 else 0.04)
                        scale = (0.5 + 0.2 * layer) * np.exp(-0.35 * np.arange(RANK))
                        lora_b = scale * (left + noise * rng.standard_normal(left.shape) / math.sqrt(sizes[0]))
                        lora_a = right.T + noise * rng.standard_normal(right.T.shape) / math.sqrt(sizes[1])
                        modules[name] = torch.from_numpy(lora_b).float(), torch.from_numpy(lora_a).float()
            write_adapter(root / attribute / f"{attribute}_{dataset:02d}", modules, base_model_name_or_path="vggt-nano")


def predicted_views(true: Views, factor: float) -> Views:
    """The true views seen from the world before `ALIGNMENT`, with waves of relative size ``factor`` in their depths."""
    count, height, width = true.depths.shape
    rows, columns = np.mgrid[0:height, 0:width] / height
    depths = true.depths * (1 + factor * np.sin(9 * rows + 5 * columns)) / ALIGNMENT.scale
    rotations = true.extrinsics[:, :, :3] @ ALIGNMENT.rotation
    moved = true.extrinsics[:, :, :3] @ ALIGNMENT.translation + true.extrinsics[:, :, 3]
    extrinsics = np.concatenate([rotations, moved[:, :, None] / ALIGNMENT.scale], axis=2)
    confidence = np.tile(1 + rows, (count, 1, 1))  # surer further down
    return Views(depths, true.intrinsics, extrinsics, confidence=confidence)


def write_results(out: Path, scenes: list[str]) -> None:
    """results.json and what the evaluation keeps of its scenes; errors scale with `METHODS`."""
    rng = np.random.default_rng(3)
    methods: dict[str, dict] = {name: {"per_scene": {}, "failed": {}, "details": {}} for name in METHODS}
    shown = []
    for index, scene in enumerate(scenes):
        hardness = rng.uniform(0.7, 1.3)
        images, true = ball_and_wall(VIEWS, shift=0.1 * index)
        folder = f"pictures/{scene}"
        pictures.save(out / folder / "true.safetensors", pictures.shown_truth(images, true))
        entry: dict = {"scene": scene, "true": f"{folder}/true.safetensors", "methods": {}}
        for name, factor in METHODS.items():
            kept = pictures.shown_prediction(predicted_views(true, 0.2 * factor), ALIGNMENT.scale, ALIGNMENT)
            entry["methods"][name] = f"{folder}/{name}.safetensors"
            pictures.save(out / entry["methods"][name], kept)
            error = 0.2 * factor * hardness * rng.uniform(0.9, 1.1)
            methods[name]["per_scene"][scene] = {
                metric: error * (20 if spec.unit == "deg" else 1) if spec.lower_is_better else 1 - error
                for metric, spec in METRICS.items()
            }
            methods[name]["details"][scene] = {"inference_seconds": 0.25, "frames": VIEWS}
        shown.append(entry)
    for name, method in methods.items():
        method["mean"] = mean_over_scenes(method["per_scene"])
        method["trainable_parameters"] = {"base": 0, **TRAINABLE}[name]
    methods["lora"]["failed"]["scene<9>"] = "the prediction must be finite"
    metrics = {
        name: {"label": m.label, "lower_is_better": m.lower_is_better, "unit": m.unit, "main": m.main}
        for name, m in METRICS.items()
    }
    write_json(
        out / "results.json",
        {
            "format": "subspace3d-results",
            "version": 1,
            "scenes": scenes,
            "skipped": [{"scene": "empty", "reason": "at least 3 pixels must have true depth, got 0 of 12544"}],
            "protocol": {"frames": None, "icp": {"threshold": 0.1}},
            "metrics": metrics,
            "methods": methods,
            "pictures": shown,
        },
    )


def write_training(out: Path, method: str, trainable: int) -> None:
    rng = np.random.default_rng(5)
    out.mkdir(parents=True)
    with open(out / "metrics.jsonl", "w", encoding="utf-8") as file:
        for step in range(1, 121):
            loss = 0.8 * METHODS[method] + math.exp(-step / 25) + 0.08 * rng.standard_normal()
            file.write(json.dumps({"step": step, "loss": round(loss, 5), "lr": 1e-4}) + "\n")
    record = {
        "format": "subspace3d-tuned",
        "version": 2,
        "method": method,
        "backbone": {"name": "vggt-nano", "weights": "shipped", "sha256": "", "seed": 0},
        "trainable": {"aggregator": trainable, "total": trainable},
        "training": {"steps": 120, "seconds": 71.4, "peak_memory_bytes": 1_610_612_736},
        "settings": {"method": method, "lr": 1e-3, "frames": [2, 4], "seed": 0},
        "environment": {"subspace3d": "0.1.0", "torch": "2.13.0", "device": "a <small> machine"},
        "files": {"model.safetensors": "0123456789abcdef" * 4},
    }
    write_json(out / "tuned" / "tuned.json", record)


def write_run(run: Path, attributes: tuple[str, ...] = ATTRIBUTES, layers: int = 6, scenes: int = 6) -> Path:
    """RUN/{adapters,subspaces,analysis,tuned,evaluation} and config.yaml."""
    write_adapters(run / "adapters", attributes, layers)
    for attribute in attributes:
        mine.run(MineConfig(run / "adapters" / attribute, run / "subspaces" / f"{attribute}.safetensors", k=RANK))
    analyze.run(AnalyzeConfig(run / "analysis", (run / "subspaces",), adapters=(run / "adapters",)))
    # a scene name with markup in it, which the page must show and not obey
    write_results(run / "evaluation", ["scene<b>&0", *(f"scene_{index:04d}" for index in range(1, scenes))])
    for method, trainable in TRAINABLE.items():
        write_training(run / "tuned" / method, method, trainable)
    (run / "config.yaml").write_text("smoke: false\nseed: 0\nprovenance:\n  command: subspace3d demo\n")
    return run
