"""What the runs are made from: scenes, adapters, subspaces. Every step skips what it finds done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from experiments import planted
from experiments.jobs import Context
from experiments.plan import HELD_OUT, VALIDATION, Mined, analyzed
from experiments.scale import Bank, Scale, Task
from subspace3d.commands.adapt import AdaptConfig
from subspace3d.commands.analyze import AnalyzeConfig
from subspace3d.commands.generate import GenerateConfig
from subspace3d.commands.mine import MineConfig

# Root seeds of the scenes: the draws of different kinds have nothing in common.
_ATTRIBUTE_SEED, _TASK_SEED, _VALIDATION_SEED, _GENERIC_SEED, _HELD_OUT_SEED = 0, 1, 2, 3, 4


def render(context: Context, sets: Sequence[Mined]) -> None:
    """Render the tasks, their validation scenes, the generic scenes, and the attribute data sets that ``sets`` need."""
    from subspace3d.commands import generate

    layout, scale, common = context.layout, context.scale, _rendering(context)
    for bank in _banks(scale, sets):
        for attribute in bank.attributes:
            generate.run(
                replace(
                    common,
                    out=layout.attribute_scenes(bank) / attribute,
                    attribute=attribute,
                    views=scale.views["attributes"],
                    trajectory=bank.trajectory,
                    datasets=scale.datasets,
                    scenes=scale.attribute_scenes,
                    seed=_ATTRIBUTE_SEED,
                )
            )
    for task in scale.tasks:
        _render_task(context, task, task, scale.train_scenes, _TASK_SEED)
        _render_task(context, task, f"{task}-{VALIDATION}", scale.validation_scenes, _VALIDATION_SEED)
    generic = layout.scenes("", "generic").parent
    generate.run(
        replace(
            common,
            out=generic,
            attribute="all",
            preset="generic",
            name="generic",
            views=scale.views["generic"],
            scenes=scale.generic_scenes,
            seed=_GENERIC_SEED,
        )
    )


def render_held_out(context: Context, scenes: int) -> None:
    """Render the scenes of every task on which the direction experiment chooses rates and measures."""
    for task in context.scale.tasks:
        _render_task(context, task, f"{task}-{HELD_OUT}", scenes, _HELD_OUT_SEED)


def _rendering(context: Context) -> GenerateConfig:
    return GenerateConfig(
        out=context.layout.task_scenes,
        resolution=context.scale.resolution,
        spp=context.scale.spp,
        workers=context.config.workers,
        **context.config.cluster_options(),
    )


def _render_task(context: Context, task: Task, name: str, scenes: int, seed: int) -> None:
    from subspace3d.commands import generate

    arc = context.scale.bodies_arc if task == "bodies" else 360.0
    views = context.scale.views[task]
    wanted = replace(_rendering(context), task=task, views=views, arc=arc, scenes=scenes, seed=seed)
    generate.run(wanted if name == task else replace(wanted, name=name))


def tune_adapters(context: Context, sets: Sequence[Mined]) -> None:
    """Tune the adapters that ``sets`` are mined from, the bad ones included."""
    from subspace3d.commands import adapt

    layout, scale = context.layout, context.scale
    # the good ones first, which the planted ones are put beside
    wanted = {layout.adapters(mined): mined for mined in sets if mined.source != "random"}
    for out, mined in sorted(wanted.items(), key=lambda item: item[1].planted):
        scenes = layout.attribute_scenes(scale.bank(mined.bank))
        adapters = AdaptConfig(
            scenes=scenes,
            out=out,
            weights=context.config.weights,
            rank=mined.rank,
            gradient_steps=scale.gradient_steps if mined.source == "gradient" else 0,
            workers=context.workers,
            cache_tokens=context.tokens,
            train=scale.adapt,
            **context.config.cluster_options(),
        )
        if not mined.planted:
            adapt.run(adapters)
            continue
        planted.write_wrong_scenes(scenes, layout.wrong_scenes)
        wrong = layout.wrong_adapters(mined)
        adapt.run(replace(adapters, scenes=layout.wrong_scenes, out=wrong))
        planted.gather(layout.adapters(replace(mined, planted=False)), wrong, out)


def mine_subspaces(context: Context, sets: Sequence[Mined]) -> None:
    """Mine every set, and analyze those that `analyzed` names."""
    from subspace3d.commands import analyze, mine

    layout, scale = context.layout, context.scale
    for mined in sets:
        folder, adapters = layout.subspaces(mined), layout.adapters(mined)
        if mined.source == "random":
            _write_random_basis(context, folder / "random.safetensors", mined.k)
            continue
        roots = {attribute: adapters / attribute for attribute in scale.bank(mined.bank).attributes}
        for name, root in ({"all": adapters} if mined.source == "pooled" else roots).items():
            mine.run(MineConfig(adapters=root, out=folder / f"{name}.safetensors", k=mined.k, p=mined.p))
    for name, mined in analyzed(scale).items():
        if mined in sets:
            analyze.run(
                AnalyzeConfig(
                    subspaces=(layout.subspaces(mined),),
                    adapters=(layout.adapters(mined),),
                    out=layout.analysis(name).parent,
                )
            )
    planted.compare(layout, scale, sets)


def _write_random_basis(context: Context, path: Path, K: int) -> None:
    """K random orthonormal directions on each side of every module that gets a core."""
    from subspace3d.adapters.placement import matrix_shape, place
    from subspace3d.backbones.record import load_backbone, record_backbone
    from subspace3d.formats.basis import save_basis

    if path.is_file():
        return
    model = load_backbone(record_backbone("vggt-nano", context.config.weights))
    generator = torch.Generator().manual_seed(0)
    basis = {}
    for name in place(model, "subspace").cores:
        sides = [torch.randn(size, K, generator=generator) for size in matrix_shape(model.get_submodule(name))]
        basis[name] = (torch.linalg.qr(sides[0])[0], torch.linalg.qr(sides[1])[0])
    save_basis(path, basis)


def _banks(scale: Scale, sets: Sequence[Mined]) -> list[Bank]:
    needed = {mined.bank for mined in sets}
    return [bank for bank in scale.banks if bank.name in needed]
