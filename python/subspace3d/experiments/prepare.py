"""What the runs are made from: scenes, adapters, subspaces. Every step skips what it finds done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from subspace3d.configs import AdaptConfig, AnalyzeConfig, GenerateConfig, MineConfig
from subspace3d.experiments import planted
from subspace3d.experiments.jobs import Context
from subspace3d.experiments.plan import VALIDATION, Mined
from subspace3d.experiments.scale import Bank, Scale

# Root seeds of the scenes: the draws of different kinds have nothing in common.
_ATTRIBUTE_SEED, _TASK_SEED, _VALIDATION_SEED, _GENERIC_SEED = 0, 1, 2, 3


def render(context: Context, sets: Sequence[Mined]) -> None:
    """Render the tasks, their validation scenes, the generic scenes, and the attribute data sets that ``sets`` need."""
    from subspace3d.scenes import generate

    layout, scale = context.layout, context.scale
    common = GenerateConfig(
        out=layout.task_scenes,
        resolution=scale.resolution,
        spp=scale.spp,
        workers=context.config.workers,
        **context.config.cluster_options(),
    )
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
        arc = scale.bodies_arc if task == "bodies" else 360.0
        views = scale.views[task]
        wanted = replace(common, task=task, views=views, arc=arc, scenes=scale.train_scenes, seed=_TASK_SEED)
        generate.run(wanted)
        name = f"{task}-{VALIDATION}"
        generate.run(replace(wanted, name=name, scenes=scale.validation_scenes, seed=_VALIDATION_SEED))
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


def tune_adapters(context: Context, sets: Sequence[Mined]) -> None:
    """Tune the adapters that ``sets`` are mined from, the bad ones included."""
    from subspace3d.training import adapt

    layout, scale = context.layout, context.scale
    for bank in _banks(scale, sets):
        for rank in sorted({mined.rank for mined in sets if mined.bank == bank.name}):
            adapters = AdaptConfig(
                scenes=layout.attribute_scenes(bank),
                out=layout.adapters(bank.name, rank),
                weights=context.config.weights,
                rank=rank,
                workers=context.workers,
                cache_tokens=context.tokens,
                train=scale.adapt,
                **context.config.cluster_options(),
            )
            adapt.run(adapters)
            if not any(mined.planted for mined in sets if (mined.bank, mined.rank) == (bank.name, rank)):
                continue
            planted.write_wrong_scenes(layout.attribute_scenes(bank), layout.wrong_scenes)
            wrong = layout.wrong_adapters(bank.name, rank)
            adapt.run(replace(adapters, scenes=layout.wrong_scenes, out=wrong))
            planted.gather(adapters.out, wrong, layout.planted_adapters(bank.name, rank))


def mine_subspaces(context: Context, sets: Sequence[Mined]) -> None:
    """Mine every set, and analyze the usual ones of each bank at their middle k."""
    from subspace3d.mining import analyze, mine

    layout, scale = context.layout, context.scale
    for mined in sets:
        adapters = layout.planted_adapters if mined.planted else layout.adapters
        for attribute in next(bank for bank in scale.banks if bank.name == mined.bank).attributes:
            mine.run(
                MineConfig(
                    adapters=adapters(mined.bank, mined.rank) / attribute,
                    out=layout.subspaces(mined) / f"{attribute}.safetensors",
                    k=mined.k,
                    p=mined.p,
                )
            )
    for bank in _banks(scale, sets):
        usual = Mined(bank.name, scale.adapter_rank, scale.ks[len(scale.ks) // 2])
        if usual in sets:
            analyze.run(
                AnalyzeConfig(
                    subspaces=(layout.subspaces(usual),),
                    adapters=(layout.adapters(bank.name, scale.adapter_rank),),
                    out=layout.out / "analysis" / bank.name,
                )
            )
    planted.compare(layout, scale, sets)


def _banks(scale: Scale, sets: Sequence[Mined]) -> list[Bank]:
    needed = {mined.bank for mined in sets}
    return [bank for bank in scale.banks if bank.name in needed]
