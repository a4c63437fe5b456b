"""``subspace3d bench step``: a whole training step with adapters off, with PEFT LoRA, and with subspaces.

All three train the same LoRA on the heads and the first parameter that is not frozen (VGGT's camera token), so that
every backward pass runs through all blocks; they differ in what the linears of those carry: nothing, LoRA, or cores.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import subspace_ext as se
from subspace3d.adapters.methods import add_lora, apply_method
from subspace3d.backbones.find import backbone_of, find_backbone
from subspace3d.backbones.losses import CAMERA_WEIGHT, LossCounts
from subspace3d.backbones.targets import target_modules
from subspace3d.bench import harness
from subspace3d.bench.config import BenchConfig
from subspace3d.training.normalization import normalize_scenes

SAME_LOSS = 2e-2
"""All adapters start at zero, so the three losses are one; bfloat16 may move them by this much."""


def run(config: BenchConfig, device: torch.device, precision: str) -> list[dict[str, Any]]:
    name = config.backbone
    if name == "auto":
        name = "vggt-1b" if device.type == "cuda" else "vggt-nano"
    rows: list[dict[str, Any]] = []
    for views in config.views:
        for core in config.cores:
            rows += _case(config, name, views, core, device, precision)
    print(_table(rows))
    return rows


def make_models(name: str, core: int, rank: int) -> dict[str, nn.Module]:
    """The model three times, with one set of random weights."""
    backbone = find_backbone(name)
    base = backbone.build("random")
    first = next(name for name, _ in base.named_parameters() if not backbone.is_frozen(name))
    models: dict[str, nn.Module] = {}
    for method in ("off", "lora", "subspace"):
        model = copy.deepcopy(base)
        token = model.get_parameter(first)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        if method == "subspace":
            tuned = apply_method(model, "subspace", rank=rank, basis=_random_basis(model, core))
        else:
            tuned = add_lora(model, rank, "all" if method == "lora" else "heads")
        token.requires_grad_(True)
        models[method] = tuned.train()
    return models


def _random_basis(model: nn.Module, core: int) -> dict[str, tuple[Tensor, Tensor]]:
    basis = {}
    for name in target_modules(model, "cores"):
        linear: Any = model.get_submodule(name)
        out_features, in_features = linear.weight.shape
        size = min(core, out_features, in_features)
        u, v = (torch.linalg.qr(torch.randn(rows, size)).Q for rows in (out_features, in_features))
        basis[name] = (u, v)
    return basis


def make_batch(views: int, size: int, device: torch.device) -> dict[str, Tensor]:
    """One scene of random images before a wavy wall two units away, cameras a little apart."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(1, views, 3, size, size, generator=generator)
    depths = 2 + 0.2 * torch.rand(1, views, size, size, generator=generator)
    extrinsics = torch.eye(4)[:3].repeat(1, views, 1, 1)
    extrinsics[..., 3] = 0.1 * torch.randn(1, views, 3, generator=generator)
    intrinsics = torch.tensor([[size, 0, size / 2], [0, size, size / 2], [0, 0, 1]]).float()
    batch = {
        "images": images,
        "depths": depths,
        "point_masks": torch.ones(1, views, size, size, dtype=torch.bool),
        "extrinsics": extrinsics,
        "intrinsics": intrinsics.repeat(1, views, 1, 1),
    }
    normalised, scale = normalize_scenes({key: value.to(device) for key, value in batch.items()})
    return {**normalised, "scene_scale": scale}


class _Trainer:
    def __init__(self, model: nn.Module, batch: dict[str, Tensor], precision: str) -> None:
        self.model, self.batch, self.backbone = model, batch, backbone_of(model)
        self.autocast = (batch["images"].device.type, torch.bfloat16, precision == "autocast")
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-6)

    def loss(self) -> Tensor:
        kind, dtype, enabled = self.autocast
        with torch.autocast(kind, dtype, enabled=enabled):
            prediction = self.backbone.predict(self.model, self.batch["images"])
        return self.backbone.loss(prediction, self.batch, CAMERA_WEIGHT, LossCounts.of(self.batch))["loss"]

    def step(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def _case(
    config: BenchConfig, name: str, views: int, core: int, device: torch.device, precision: str
) -> list[dict[str, Any]]:
    if precision == "bf16":
        raise ValueError("precision must be fp32 or autocast for the benchmark step, got 'bf16'")
    torch.manual_seed(0)
    models = make_models(name, core, config.rank)
    rows: list[dict[str, Any]] = []
    backbone = find_backbone(name)
    size = backbone.image_size
    for checkpointing in (False, True):
        trainers = {}
        for method, model in models.items():
            model.to(device)
            if hasattr(se, "group_folds"):
                se.group_folds(model)
            backbone.checkpointing(model, checkpointing)
            trainers[method] = _Trainer(model, make_batch(views, size, device), precision)
        losses = {method: float(trainer.loss().detach()) for method, trainer in trainers.items()}
        tokens = views * ((size // backbone.patch_size) ** 2 + backbone.special_tokens)
        for method, trainer in trainers.items():
            model = models[method]
            row: dict[str, Any] = {
                "benchmark": "step", "peer": method, "backbone": name, "views": views, "tokens": tokens, "K": core,
                "r": config.rank, "precision": precision, "checkpointing": checkpointing, "clock": config.clock,
                "trained": sum(p.numel() for p in trainer.trained), "loss": losses[method],
            }  # fmt: skip
            rows.append(row)
            # the adapters start at zero only in the first case; afterwards a few steps have moved them
            if not checkpointing and abs(losses[method] - losses["off"]) > SAME_LOSS * abs(losses["off"]):
                row["excluded"] = f"wrong: loss {losses[method]} instead of {losses['off']}"
                continue
            saved = harness.saved_for_backward(trainer.loss, [*model.parameters(), *model.buffers()], 1)
            row |= {"saved_bytes": saved.activations, "peak_bytes": harness.peak_bytes(trainer.step, device)}
        steps = {row["peer"]: trainers[row["peer"]].step for row in rows[-3:] if "excluded" not in row}
        timings = harness.measure(steps, "off", device, config.rounds_on(device.type), 0.0, config.clock)
        for row in rows[-3:]:
            if row["peer"] in timings:
                row |= timings[row["peer"]].fields()
                row["tokens_per_second"] = tokens / row["seconds"]
    return rows


def _table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        if "seconds" not in row:
            lines.append([row["peer"], row.get("excluded", "not timed")])
            continue
        titles = {"off": "adapters off", "lora": f"PEFT LoRA r={row['r']}", "subspace": f"subspace K={row['K']}"}
        lines.append(
            [
                titles[row["peer"]] + (", checkpointed" if row["checkpointing"] else ""),
                f"{row['views']}",
                f"{1e3 * row['seconds']:.0f}",
                f"{row['ratio']:.3f}",
                f"{row['ratio_10']:.2f}-{row['ratio_90']:.2f}",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['trained']:,}",
                harness.mib(row["saved_bytes"]),
                harness.mib(row["peak_bytes"]),
            ]
        )
    header = ["", "views", "ms", "/ off", "10-90 %", "tokens/s", "trained", "saved MiB", "peak MiB"]
    first = rows[0]
    title = (
        f"training step of {first['backbone']}, {first['precision']}: forward, backward, AdamW, {first['clock']} time"
    )
    return f"{title}\n{harness.table(header, lines)}"
