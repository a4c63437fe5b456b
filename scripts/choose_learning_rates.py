"""Choose the demo's learning rates: tune every method at every rate, measure on validation scenes, print the table.

python scripts/choose_learning_rates.py --run runs/demo

Needs a finished demo run, whose scenes and subspaces it uses; the validation scenes are rendered with a seed of their
own, so the demo's test scenes play no part in the choice.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from subspace3d.configs import EvaluateConfig, FinetuneConfig, GenerateConfig
from subspace3d.evaluation import evaluate
from subspace3d.pipeline import LEARNING_RATES, NANO
from subspace3d.scenes import generate
from subspace3d.training import finetune


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder of a finished demo run")
    parser.add_argument("--methods", nargs="+", default=list(LEARNING_RATES), choices=list(LEARNING_RATES))
    parser.add_argument("--factors", type=float, nargs="+", default=[0.3, 1, 3], help="times the demo's rate")
    arguments = parser.parse_args()
    out = arguments.run / "learning_rates"
    scenes = arguments.run / "scenes" / "target"
    validation = GenerateConfig(
        out=scenes,
        attribute="all",
        name="validation",
        scenes=NANO.test_scenes,
        views=NANO.views,
        resolution=NANO.resolution,
        spp=NANO.spp,
        seed=3,
    )
    generate.run(validation)
    tuned = []
    for method in arguments.methods:
        for factor in arguments.factors:
            rate = LEARNING_RATES[method] * factor
            folder = out / f"{method}-{rate:.0e}"
            finetune.run(
                FinetuneConfig(
                    scenes=scenes / "train_00",
                    out=folder,
                    method=method,
                    subspaces=(arguments.run / "subspaces",) if method == "subspace" else (),
                    rank=NANO.rank,
                    train=replace(NANO.tune, lr=rate),
                )
            )
            tuned.append(folder)
    evaluate.run(
        EvaluateConfig(scenes=scenes / "validation_00", out=out, tuned=tuple(tuned), frames=NANO.views, images=0)
    )


if __name__ == "__main__":
    main()
