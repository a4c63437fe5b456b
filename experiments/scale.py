"""How much of everything the experiments do. All decisions that cost time stand here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from subspace3d.choices import ATTRIBUTES, Attribute
from subspace3d.training.config import TrainConfig

Task = Literal["faces", "bodies", "glass"]


@dataclass(frozen=True)
class Bank:
    """The attribute data sets of one kind of camera path, from whose adapters subspaces are mined."""

    name: str
    trajectory: Literal["wide", "walk"]
    attributes: tuple[Attribute, ...]


@dataclass(frozen=True)
class Scale:
    """Sizes of one run of the experiments."""

    name: str
    banks: tuple[Bank, ...]
    tasks: dict[Task, str]  # task -> the bank its subspaces come from
    ablated: Task  # the task of Tables 4 and 5 and of the ablations
    datasets: int  # per attribute and bank
    attribute_scenes: int  # per data set
    train_scenes: int  # per task; each of its two tests has a fifth of it
    validation_scenes: int
    generic_scenes: int
    bodies_arc: float  # degrees of the ring of cameras around bodies
    views: dict[str, int]  # of every scene of a task, of the attribute data sets and of the generic scenes
    resolution: int
    spp: int
    adapter_rank: int  # of the adapters that are mined, and of the LoRA beside cores on the heads
    high_rank: int  # of the adapters that Table 5 mines instead
    ranks: tuple[int, ...]  # LoRA and PiSSA
    adalora_ranks: tuple[int, ...]
    ks: tuple[int, ...]  # directions per attribute
    rates: tuple[float, ...]  # the grid of learning rates, the same for every method
    head_rate: float  # of the LoRA beside cores on the heads, whatever the rate of the cores
    finalists: int  # the best rates of the first seed, which all seeds decide between
    gradient_steps: int  # of adapters that start at the gradient
    adapt: TrainConfig
    tune: TrainConfig
    rows: tuple[str, ...] = ()  # only these; empty: all

    def bank(self, name: str) -> Bank:
        return next(bank for bank in self.banks if bank.name == name)

    def bank_of(self, task: Task) -> Bank:
        return self.bank(self.tasks[task])

    def test_scenes(self, split: str) -> int:
        """Scenes of a split that is measured: a test split of a task has a fifth of the training scenes."""
        sizes = {"validation": self.validation_scenes, "generic": self.generic_scenes}
        return sizes.get(split, max(1, self.train_scenes // 5))


OBJECT = Bank("object", "wide", ATTRIBUTES)
MICRO = Bank("micro", "walk", ("texture", "geometry"))

_NANO_TUNE = TrainConfig(
    steps=90, frames=(2, 4), images_per_step=8, save_every=45, checkpointing=False, check_memory=False
)
NANO = Scale(
    name="nano",
    banks=(OBJECT, MICRO),
    tasks={"faces": "micro", "bodies": "object", "glass": "object"},
    ablated="bodies",
    datasets=5,
    attribute_scenes=12,
    train_scenes=30,
    validation_scenes=5,
    generic_scenes=6,
    bodies_arc=120.0,  # of bodies, vggt-nano cannot tell the cameras of a wider one
    views={"attributes": 6, "faces": 4, "bodies": 6, "glass": 4, "generic": 4},
    resolution=112,
    spp=16,
    adapter_rank=4,
    high_rank=16,
    ranks=(4, 16, 64),
    adalora_ranks=(4, 16),
    ks=(4, 8, 16),
    rates=(3e-4, 1e-3, 3e-3, 1e-2),
    head_rate=1e-3,
    finalists=2,
    gradient_steps=8,
    adapt=replace(_NANO_TUNE, lr=1e-3),
    tune=_NANO_TUNE,
)
_SMOKE_TUNE = TrainConfig(
    steps=3,  # the least that AdaLoRA's schedule takes
    frames=(2, 2),
    images_per_step=2,
    image_size=28,
    save_every=3,
    checkpointing=False,
    check_memory=False,
)
SMOKE = Scale(
    name="smoke",
    banks=(Bank("object", "wide", ("texture", "camera")),),
    tasks={"bodies": "object"},
    ablated="bodies",
    datasets=2,
    attribute_scenes=1,
    train_scenes=1,
    validation_scenes=1,
    generic_scenes=1,
    bodies_arc=120.0,
    views={"attributes": 2, "bodies": 2, "generic": 2},
    resolution=56,
    spp=1,
    adapter_rank=2,
    high_rank=4,
    ranks=(2, 4),
    adalora_ranks=(2,),
    ks=(1, 2),
    rates=(1e-4, 1e-3),
    head_rate=1e-3,
    finalists=2,
    gradient_steps=1,
    adapt=replace(_SMOKE_TUNE, steps=2, save_every=2, lr=1e-3),
    tune=_SMOKE_TUNE,
)
SCALES = {scale.name: scale for scale in (NANO, SMOKE)}
