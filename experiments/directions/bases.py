"""The bases: where their directions come from, and the energy of the task's gradient that they hold."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from experiments.directions.plan import Sizes
from experiments.jobs import Context
from experiments.layout import Layout
from experiments.plan import Mined
from experiments.scale import Bank, Scale, Task
from subspace3d.adapters.basis import build_basis
from subspace3d.adapters.placement import matrix_shape, place
from subspace3d.adapters.spectral import leading_directions, singular_basis
from subspace3d.backbones.record import load_backbone, record_backbone
from subspace3d.backbones.vggt import VGGT
from subspace3d.datasets.multiview import MultiViewDataset
from subspace3d.files import load_tensors, save_tensors
from subspace3d.formats.basis import Basis
from subspace3d.mining.fit import inside
from subspace3d.mining.spectra import place as place_of
from subspace3d.training.gradients import summed_gradients

_GRADIENT_SEED = 1000
"""Batches of the gradients that are measured and of the basis `own`: other ones than any training draws."""


@dataclass(frozen=True)
class Paths:
    """Where the direction experiment keeps its files, below the run folder of the experiments."""

    layout: Layout

    @property
    def root(self) -> Path:
        return self.layout.out / "directions"

    def gradients(self, bank: str) -> Path:
        """Gradient adapters: ``<attribute>/<data set>``."""
        return self.layout.out / "adapters" / f"{bank}-gradient-only"

    def subspaces(self, bank: str, source: str) -> Path:
        """Holds ``<attribute>.safetensors``; of the source pooled ``all.safetensors``."""
        return self.root / "subspaces" / bank / source

    def task_gradient(self, task: str) -> Path:
        return self.root / "gradients" / f"{task}.safetensors"

    def energy(self, task: str) -> Path:
        return self.root / "energy" / f"{task}.json"

    def run(self, task: str, name: str) -> Path:
        return self.root / "runs" / task / f"{name}.json"


def prepare(context: Context, sizes: Sizes) -> None:
    """Gradient adapters of every bank, and the subspaces that the bases are made of; what is there stays."""
    from subspace3d.commands import adapt, mine
    from subspace3d.commands.adapt import AdaptConfig
    from subspace3d.commands.mine import MineConfig

    layout, scale, paths = context.layout, context.scale, Paths(context.layout)
    for bank in _banks(scale):
        adapt.run(
            AdaptConfig(
                scenes=layout.attribute_scenes(bank),
                out=paths.gradients(bank.name),
                weights=context.config.weights,
                rank=sizes.gradient_rank,
                gradient_only=True,
                train=scale.adapt,
            )
        )
        largest = max(sizes.main, *sizes.others, *sizes.wide)
        k = -(-largest // len(bank.attributes))
        tuned = layout.adapters(Mined(bank.name, scale.adapter_rank, k))
        gradients = paths.gradients(bank.name)
        for attribute in bank.attributes:
            wanted = {
                "mean": MineConfig(tuned / attribute, Path(), k=k),
                "shared": MineConfig(tuned / attribute, Path(), k=k, model="shared"),
                "gradient": MineConfig(gradients / attribute, Path(), k=k, model="shared"),
                "joined": MineConfig(tuned / attribute, Path(), k=k, join=gradients / attribute),
            }
            for source, config in wanted.items():
                out = paths.subspaces(bank.name, source) / f"{attribute}.safetensors"
                mine.run(replace(config, out=out))
        pooled = paths.subspaces(bank.name, "pooled") / "all.safetensors"
        mine.run(MineConfig(tuned, pooled, k=largest))


def _banks(scale: Scale) -> list[Bank]:
    return [scale.bank(name) for name in dict.fromkeys(scale.tasks.values())]


def build(context: Context, task: Task, basis: str, K: int, model: nn.Module) -> Basis:
    """The basis ``basis`` of `plan.BASES` with K directions for every module that gets a core."""
    paths, bank = Paths(context.layout), context.scale.bank_of(task)
    names = list(place(model, "subspace").cores)

    def mined(source: str, size: int) -> Basis:
        folder = paths.subspaces(bank.name, source)
        files = [folder / f"{name}.safetensors" for name in (("all",) if source == "pooled" else bank.attributes)]
        return build_basis(files, names, K=size, k=-(-size // len(files)))

    if basis == "psv":
        return singular_basis(model, names, K)
    if basis.startswith("random-"):
        return random_basis(model, names, K, int(basis.removeprefix("random-")))
    if basis == "own":
        gradients, _ = load_tensors(paths.task_gradient(task))
        return {name: leading_directions(gradients[name].sum(0), K)[::2] for name in names}
    if basis == "mean-only":
        return mined("pooled", 1)
    if basis == "permuted":
        return permuted(mined("mean", K))
    if basis in ("u-mined", "v-mined"):
        own, other = mined("mean", K), random_basis(model, names, K, 0)
        pairs = {name: (own[name][0], other[name][1]) for name in names}
        return pairs if basis == "u-mined" else {name: (other[name][0], own[name][1]) for name in names}
    return mined(basis, K)


def random_basis(model: nn.Module, names: list[str], K: int, draw: int) -> Basis:
    """K random orthonormal directions on each side of every module; another module or draw has others."""
    basis = {}
    for name in names:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {draw}".encode()))
        sides = [torch.randn(size, K, generator=generator) for size in matrix_shape(model.get_submodule(name))]
        basis[name] = (torch.linalg.qr(sides[0])[0], torch.linalg.qr(sides[1])[0])
    return basis


def permuted(basis: Basis) -> Basis:
    """Each block's directions in the block half the depth further on, of the same family and kind: wrong places."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in basis:
        where = place_of(name)
        groups.setdefault((where.family, where.kind), []).append(name)
    result: Basis = {}
    for members in groups.values():
        members.sort(key=lambda name: place_of(name).layer or 0)
        shift = max(1, len(members) // 2)
        result |= {name: basis[members[(index + shift) % len(members)]] for index, name in enumerate(members)}
    return {name: result[name] for name in basis}


def load_model(context: Context) -> VGGT:
    model = load_backbone(record_backbone("vggt-nano", context.config.weights))
    assert isinstance(model, VGGT)
    return model


def take_gradient(context: Context, task: Task, sizes: Sizes) -> None:
    """The gradient of the task's loss in two halves, ``[2, out, in]`` for every module that gets a core."""
    path = Paths(context.layout).task_gradient(task)
    if path.is_file():
        return
    model = load_model(context)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    config = replace(context.scale.tune, seed=_GRADIENT_SEED, device="cpu")
    size = config.image_size or model.config.image_size
    dataset = MultiViewDataset.for_training(context.layout.scenes(task, "train"), size, config)
    weights = {name: model.get_parameter(f"{name}.weight") for name in place(model, "subspace").cores}
    halves = [range(half, sizes.batches, 2) for half in range(2)]
    save_tensors(path, dict(summed_gradients(model, weights, dataset, config, halves, f"gradient of {task}")))


def energies(gradients: Mapping[str, torch.Tensor], basis: Basis) -> dict[str, float]:
    """Shares of the gradient's energy inside core, U and V, all modules together; a module's K may be its own."""
    total = sum(float(gradients[name].double().square().sum()) for name in basis)
    held = torch.stack([inside(gradients[name], *pair)[:, :, -1].sum(0) for name, pair in basis.items()]).sum(0)
    return dict(zip(("core", "U", "V"), (held / total).tolist()))


def own_energies(gradients: Mapping[str, torch.Tensor], K: int) -> dict[str, float]:
    """The same for leading directions of one half of the batches, measured on the other, both ways."""
    total = sum(float(each.double().square().sum()) for each in gradients.values())
    held = torch.zeros(3, dtype=torch.float64)
    for each in gradients.values():
        for part in range(2):
            u, _, v = leading_directions(each[1 - part], K)
            held += inside(each[part : part + 1], u, v)[0, :, -1]
    return dict(zip(("core", "U", "V"), (held / total).tolist()))
