"""``subspace3d bench block``: one attention block of VGGT-1B's aggregator, frozen, with PEFT LoRA, with subspaces."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import subspace_ext as se
from subspace3d.backbones.config import named_config
from subspace3d.backbones.layers import Block, Rotation, rotary_table
from subspace3d.bench import harness
from subspace3d.bench.config import BenchConfig
from subspace3d.bench.peers import LIMITS, SCALE
from subspace3d.bench.shapes import TOKENS_PER_VIEW

LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
CHECKED_TOKENS = 64
PATCHES = 37  # along one side of a 518 px image


def run(config: BenchConfig, device: torch.device, precision: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for views in config.views:
        for core in config.cores:
            rows += _case(config, views, core, device, precision)
    print(_table(rows))
    return rows


def make_blocks(core: int, rank: int, device: torch.device, precision: str) -> dict[str, nn.Module]:
    """The same block three times: frozen, with stock PEFT LoRA, and with subspaces of K = `core`."""
    from peft import LoraConfig, get_peft_model

    sizes = named_config("vggt-1b")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    frozen = Block(sizes.embed_dim, sizes.num_heads, sizes.mlp_ratio, sizes.layer_scale, qk_norm=True)
    frozen.to(device, dtype).requires_grad_(False)
    lora: Any = get_peft_model(
        copy.deepcopy(frozen), LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(LINEARS))
    )
    subspace = copy.deepcopy(frozen)
    for name in LINEARS:
        parent, _, child = name.rpartition(".")
        linear: Any = subspace.get_submodule(name)
        u, v = (torch.linalg.qr(torch.randn(size, core, device=device)).Q for size in linear.weight.shape)
        setattr(subspace.get_submodule(parent), child, se.SubspaceLinear.from_linear(linear, u, v, SCALE))
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=1e-3)
        for layer in subspace.modules():
            if isinstance(layer, se.SubspaceLinear):
                layer.c.normal_(std=1e-2)
    return {"frozen": frozen, "lora": lora.base_model.model, "subspace": subspace}


def dense_block(frozen: Block, tuned: nn.Module) -> Block:
    """The block in float64 with the update of every linear added to its weight."""
    dense = copy.deepcopy(frozen).double()
    for name in LINEARS:
        layer: Any = tuned.get_submodule(name)
        linear: Any = dense.get_submodule(name)
        target = linear.weight.data
        if isinstance(layer, se.SubspaceLinear):
            target += layer.scale * layer.U.double() @ layer.c.detach().double() @ layer.V.double().t()
        elif hasattr(layer, "lora_A"):
            a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
            target += layer.scaling["default"] * b.double() @ a.double()
    return dense


def frame_rotation(device: torch.device) -> Rotation:
    """Rotation tables of one frame: five special tokens at (0, 0), patches from (1, 1) on."""
    sizes = named_config("vggt-1b")
    side = torch.arange(1, PATCHES + 1, device=device)
    grid = torch.cartesian_prod(side, side)
    special = grid.new_zeros(TOKENS_PER_VIEW - PATCHES**2, 2)
    return rotary_table(torch.cat((special, grid)), sizes.embed_dim // sizes.num_heads, sizes.rope_base)


class _Runner:
    """Forward and backward of one block on fixed data."""

    def __init__(self, block: nn.Module, views: int, device: torch.device, precision: str) -> None:
        generator = torch.Generator(device).manual_seed(1)
        size = (views, TOKENS_PER_VIEW, named_config("vggt-1b").embed_dim)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.block = block
        self.rotation = frame_rotation(device)
        self.autocast = (device.type, torch.bfloat16, precision == "autocast")
        self.x = torch.randn(size, generator=generator, device=device).to(dtype).requires_grad_()
        self.dy = torch.randn(size, generator=generator, device=device)
        self.leaves = [self.x, *(p for p in block.parameters() if p.requires_grad)]
        self.cores = [layer.c for layer in block.modules() if isinstance(layer, se.SubspaceLinear)]

    def forward(self, checkpointing: bool, tokens: int = TOKENS_PER_VIEW) -> Tensor:
        with torch.no_grad():
            for core in self.cores:
                core.mul_(1)  # as after an optimiser step
        x = self.x[:, :tokens]
        rotation = (self.rotation[0][:tokens], self.rotation[1][:tokens])
        kind, dtype, enabled = self.autocast
        with torch.autocast(kind, dtype, enabled=enabled):
            if checkpointing:
                return checkpoint(self.block, x, rotation, use_reentrant=False)
            return self.block(x, rotation)

    def step(self, checkpointing: bool) -> None:
        y = self.forward(checkpointing)
        y.backward(self.dy.to(y.dtype))
        for leaf in self.leaves:
            leaf.grad = None

    def errors(self, dense: Block) -> dict[str, float]:
        """Relative errors of y and dx on the first tokens of every frame against the dense float64 block."""
        y = self.forward(False, CHECKED_TOKENS)
        dy = self.dy[:, :CHECKED_TOKENS]
        (dx,) = torch.autograd.grad(y, self.x, dy.to(y.dtype))
        x = self.x.detach().double().requires_grad_()
        rotation = tuple(part[:CHECKED_TOKENS].double() for part in self.rotation)
        exact = dense(x[:, :CHECKED_TOKENS], rotation)
        (exact_dx,) = torch.autograd.grad(exact, x, dy.double())
        return {
            name: float((got.double() - want).norm() / want.norm())
            for name, got, want in (("y", y.detach(), exact.detach()), ("dx", dx, exact_dx))
        }


def _case(config: BenchConfig, views: int, core: int, device: torch.device, precision: str) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    tokens = views * TOKENS_PER_VIEW
    blocks = make_blocks(core, config.rank, device, precision)
    frozen = blocks["frozen"]
    assert isinstance(frozen, Block)
    rows: list[dict[str, Any]] = []
    steps: dict[str, harness.Step] = {}
    for name, block in blocks.items():
        runner = _Runner(block, views, device, precision)
        found = runner.errors(dense_block(frozen, block))
        for checkpointing in (False, True):
            row: dict[str, Any] = {
                "benchmark": "block", "peer": name, "views": views, "tokens": tokens, "K": core, "r": config.rank,
                "precision": precision, "checkpointing": checkpointing, "clock": config.clock, "errors": found,
            }  # fmt: skip
            rows.append(row)
            if max(found.values()) > LIMITS[precision]:
                row["excluded"] = f"wrong: {found}"
                continue
            step = functools.partial(runner.step, checkpointing)
            saved = harness.saved_for_backward(
                functools.partial(runner.forward, checkpointing),
                [*block.parameters(), *block.buffers()],
                TOKENS_PER_VIEW,
            )
            row |= {
                "trained": sum(p.numel() for p in block.parameters() if p.requires_grad),
                "saved_bytes": saved.activations,
                "saved_bytes_per_token": saved.activations / tokens,
                "saved_weight_bytes": saved.weights,
                "peak_bytes": harness.peak_bytes(step, device),
            }
            steps[_key(row)] = step
    for checkpointing in (False, True):
        chosen = {key: step for key, step in steps.items() if key.endswith(str(checkpointing))}
        timings = harness.measure(
            chosen, f"frozen {checkpointing}", device, config.rounds_on(device.type), 0.02, config.clock
        )
        for row in rows:
            if _key(row) in timings:
                row |= timings[_key(row)].fields()
    return rows


def _key(row: Mapping[str, Any]) -> str:
    return f"{row['peer']} {row['checkpointing']}"


def _table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        if "seconds" not in row:
            lines.append([row["peer"], row.get("excluded", "not timed")])
            continue
        (lora,) = (
            other
            for other in rows
            if other["peer"] == "lora"
            and all(other[name] == row[name] for name in ("views", "K", "checkpointing", "precision"))
        )
        name = {"frozen": "frozen", "lora": f"PEFT LoRA r={row['r']}", "subspace": f"subspace K={row['K']}"}[
            row["peer"]
        ]
        lines.append(
            [
                name + (", checkpointed" if row["checkpointing"] else ""),
                f"{row['views']}",
                f"{1e3 * row['seconds']:.0f}",
                f"{row['ratio']:.3f}",
                f"{row['ratio_10']:.2f}-{row['ratio_90']:.2f}",
                f"{row['saved_bytes_per_token'] / 1024:.1f}",
                f"{row['saved_bytes'] / lora['saved_bytes']:.2f}",
                harness.mib(row["peak_bytes"]),
            ]
        )
    header = ["", "views", "ms", "/ frozen", "10-90 %", "saved KiB/token", "/ PEFT", "peak MiB"]
    title = (
        f"a frame block of VGGT-1B, {rows[0]['precision']}, forward + backward, folds included, {rows[0]['clock']} time"
    )
    return f"{title}\n{harness.table(header, lines)}"
