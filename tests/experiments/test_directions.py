"""The direction experiment: its plan, its bases, what the records say; and all of it at smoke scale."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters.models import random_basis, tiny_vggt

from experiments.directions import bases, page
from experiments.directions.plan import (
    BASES,
    CONTROLS,
    RATE_SEED,
    SIZES,
    Cell,
    Run,
    Sizes,
    cells,
    core_hours,
    final_runs,
    rate_runs,
)
from experiments.directions.results import (
    answers,
    area,
    best_rate,
    final,
    forgetting_at,
    order_by_energy,
)
from experiments.directions.settings import DirectionsConfig
from experiments.scale import NANO
from subspace3d.adapters.placement import place
from subspace3d.adapters.spectral import leading_directions
from subspace3d.mining.spectra import place as place_of

NANO_SIZES = SIZES["nano"]
STEPS = (5, 10)
SMOKED = ("random-0", "psv", "mean", "gradient", "own", "permuted", "mean-only")


def record(
    run: Run, losses: tuple[float, ...], generic: tuple[float, ...] = (), scenes: int = 2, **changes: Any
) -> dict[str, Any]:
    """Of a run with held-out losses at steps 0, 5 and 10, whose scenes differ from the mean by up to 0.1."""
    points = zip((0, *STEPS), losses, generic or losses)
    away = [0.2 * index / (scenes - 1) - 0.1 for index in range(scenes)]

    def terms(loss: float) -> dict[str, list[float]]:
        return {"loss": [loss + d for d in away], "depth": [loss / 2 + d for d in away], "camera": [loss / 10] * scenes}

    curve = {str(step): {"test": terms(loss), "generic": terms(other)} for step, loss, other in points}
    base = {"run": asdict(run), "steps": list(STEPS), "curve": curve, "validation": losses[-1], "diverged": None}
    return {**base, "update_norm": 1.0, "weight_norm": 50.0, "trained": 64, **changes}


def test_the_plan_has_every_basis_at_the_main_size_with_all_seeds() -> None:
    chosen = cells(NANO, NANO_SIZES)
    assert {cell.basis for cell in chosen if cell.task == "glass" and cell.K in (8, 1)} == set(BASES)
    assert {cell.basis for cell in chosen if cell.K == 4} == set(BASES) - set(CONTROLS)
    # wide sizes on the ablated task alone
    assert {cell.task for cell in chosen if cell.K == 32} == {NANO.ablated}
    grid = rate_runs(chosen, NANO_SIZES)
    # draws of random directions share a rate
    assert not any(run.basis in ("random-1", "random-2") for run in grid) and {run.seed for run in grid} == {RATE_SEED}
    rates = {cell.finder: 1e-2 for cell in chosen}
    runs = final_runs(NANO, chosen, NANO_SIZES, 3, rates)
    seeds = {run.seed for run in runs if (run.task, run.basis, run.K, run.scenes) == ("glass", "random-2", 8, 0)}
    assert seeds == set(range(3))
    assert {run.seed for run in runs if run.K == 16 and not run.scenes} == {0, 1}
    assert {run.scenes for run in runs if run.basis == "gradient" and run.task == NANO.ablated} == {0, 1, 3, 10}
    # of one seed all before the next
    whole = [run.seed for run in runs if not run.scenes]
    assert whole == sorted(whole)
    assert len({(run.task, run.name) for run in runs}) == len(runs)
    assert final_runs(NANO, chosen, NANO_SIZES, 3, {}) == []
    assert 3 < core_hours(NANO, chosen, NANO_SIZES, 3) < 8


def test_unknown_bases_are_named() -> None:
    with pytest.raises(ValueError, match=r"bases must be among random-0, .*, got 'typo'"):
        DirectionsConfig(bases=("typo",))


def test_permuted_bases_stand_in_another_block_of_the_same_kind() -> None:
    model = tiny_vggt()
    basis = random_basis(model, list(place(model, "subspace").cores), 3)
    turned = bases.permuted(basis)
    assert turned.keys() == basis.keys()
    for name, (u, v) in turned.items():
        (source,) = [other for other, pair in basis.items() if pair[0] is u and pair[1] is v]
        here, there = place_of(name), place_of(source)
        assert source != name and (here.family, here.kind) == (there.family, there.kind)


def test_random_bases_are_orthonormal_and_differ_by_draw_and_module() -> None:
    model = tiny_vggt()
    names = list(place(model, "subspace").cores)
    one, two = bases.random_basis(model, names, 4, 0), bases.random_basis(model, names, 4, 1)
    same = [name for name in names if one[name][0].shape == one[names[0]][0].shape]
    for u, v in one.values():
        torch.testing.assert_close(u.T @ u, torch.eye(4), rtol=0, atol=1e-5)
        torch.testing.assert_close(v.T @ v, torch.eye(4), rtol=0, atol=1e-5)
    assert not torch.allclose(one[names[0]][0], two[names[0]][0])
    assert not torch.allclose(one[same[0]][0], one[same[1]][0])


def test_energies_by_hand() -> None:
    g = torch.zeros(2, 3, 2)
    g[0, 0, 0], g[1, 0, 0], g[1, 2, 1] = 3.0, 1.0, 2.0
    basis = {"a": (torch.eye(3)[:, :1], torch.eye(2)[:, :1])}
    # 9 + 1 of 14 in the corner; U alone has the first row, V alone the first column
    assert bases.energies({"a": g}, basis) == pytest.approx({"core": 10 / 14, "U": 10 / 14, "V": 10 / 14})
    # the first half points at the corner, where the other has 1 of its 5; the other at the last entry, where it has 0
    assert bases.own_energies({"a": g}, 1) == pytest.approx({"core": 1 / 14, "U": 1 / 14, "V": 1 / 14})
    assert leading_directions(g[1], 1)[0][2].abs() == pytest.approx(1)


def test_numbers_of_a_record_by_hand() -> None:
    run = Run("glass", "mean", 8, 1e-2, 0)
    made = record(run, (2.0, 1.5, 1.0), (0.5, 0.7, 0.9))
    assert final(made) == pytest.approx(1.0) and final(made, "depth") == pytest.approx(0.5)
    assert area(made) == pytest.approx((1.75 * 5 + 1.25 * 5) / 10)
    # 1.25 is reached in the middle of the last stretch
    assert forgetting_at(made, 1.25) == pytest.approx(0.8)
    assert forgetting_at(made, 2.5) == pytest.approx(0.5) and forgetting_at(made, 0.5) is None
    lost = record(run, (2.0, 1.5), diverged="NaN", validation=None)
    assert final(lost) == math.inf == area(lost) and forgetting_at(lost, 2.0) is None
    assert best_rate({1e-3: made, 1e-2: record(run, (2.0, 1.5, 0.9)), 3e-2: lost}) == 1e-2
    assert best_rate({1e-3: lost}) is None


def made_records(scenes: int) -> dict[Cell, Mapping[int, Mapping[str, Any]]]:
    """Eight bases, three seeds, whose losses fall in the order of the list, the same way in every scene."""
    order = ["random-0", "permuted", "u-mined", "mean", "shared", "psv", "gradient", "own"]
    found = {}
    for place_, basis in enumerate(order):
        runs = {seed: Run("glass", basis, 8, 1e-2, seed) for seed in range(3)}
        end = 1.0 - 0.05 * place_
        found[Cell("glass", basis, 8)] = {
            seed: record(run, (1.5, 1.3, end + 0.01 * seed + 0.001 * ((seed * 7 + place_) % 5)), scenes=scenes)
            for seed, run in runs.items()
        }
    return found


def test_questions_are_answered_scene_by_scene_with_holm_over_all() -> None:
    sizes = Sizes(8, (), (), (1e-2,), STEPS, (), 2, 2, 2)
    found = {answer.question.text: answer for answer in answers(made_records(6), sizes, ["glass"]) if not answer.task}
    assert "joining both sources is better than gradients alone" not in found
    answer = found["mined directions are better than random ones"]
    assert answer.pairs.mean == pytest.approx(-0.15, abs=0.005) and answer.pairs.p == 2 / 64
    assert answer.depth.mean == pytest.approx(answer.pairs.mean / 2)
    # six scenes are not enough for Holm over so many questions
    assert answer.adjusted == pytest.approx(len(found) * 2 / 64) and answer.verdict == "points to it"
    assert found["mined directions are better than the singular vectors of the weights"].verdict == "points against it"
    everything = answers(made_records(10), sizes, ["glass"])
    many = {answer.question.text: answer for answer in everything if not answer.task}
    assert len(everything) == 2 * len(many)
    assert many["mined directions are better than random ones"].verdict == "holds"
    assert many["mined directions are better than the singular vectors of the weights"].verdict == "contradicted"


TERMS = ("loss", "depth", "camera")


def test_energy_orders_the_bases_where_it_does() -> None:
    made = made_records(2)
    rising = {f"{cell.basis} 8": {"core": 0.01 * place_} for place_, cell in enumerate(made)}
    falling = {name: {"core": 1 - share["core"]} for name, share in rising.items()}
    assert order_by_energy(made, {"glass": rising}, 8, 10)["glass"] == (pytest.approx(dict.fromkeys(TERMS, 1.0)), 8)
    assert order_by_energy(made, {"glass": falling}, 8, 10)["glass"] == (pytest.approx(dict.fromkeys(TERMS, -1.0)), 8)


def test_the_page_has_verdicts_tables_and_what_is_missing() -> None:
    sizes = Sizes(8, (), (), (1e-2,), STEPS, (1,), 2, 2, 2)
    made = made_records(6)
    energies = {"glass": {f"{cell.basis} 8": {"core": 0.01 * i, "U": 0.1, "V": 0.2} for i, cell in enumerate(made)}}
    few = {("mean", 1): {0: record(Run("glass", "mean", 8, 1e-2, 0, 1), (1.5, 1.45, 1.4))}}
    text = page.render(made, {3e-2: made}, energies, few, sizes, ["glass"])
    assert "| mined directions are better than random ones | 6 | -0.15" in text
    assert "6 scenes are too few" in text and "| transparent objects | mined directions are better" in text
    for rate in ("its own", "0.03"):
        assert f"| transparent objects | {rate} | 8 | 1.00 | 1.00 | 1.00 | holds |" in text
    assert "### Few scenes" in text and "1.400" in text
    assert f"| {BASES['random-0']} | 0 / 0.1 / 0.2 |" in text and BASES["pooled"] not in text
    assert "has not been run" in page.render({}, {}, {}, {}, sizes, ["glass"])
    assert "too few" not in page.render(made_records(12), {}, energies, {}, sizes, ["glass"])


@pytest.mark.slow
def test_smoke_scale_ends_in_a_page_and_resumes(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "experiments.directions", "--scale", "smoke", "--workers", "1", "--seeds", "1"]
    command += ["--out", str(tmp_path / "run"), "--bases", *SMOKED]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first: dict[Path, int] = {}
    for start in range(2):
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root, env=environment)
        assert done.returncode == 0, done.stderr
        text = (tmp_path / "run" / "directions" / "directions.md").read_text()
        assert "Smoke scale: the numbers mean nothing" in text
        assert all(f"| {BASES[name]} |" in text for name in SMOKED)
        stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("run/directions/runs/*/*.json")}
        first = stamps if start == 0 else first
    assert stamps == first


def test_a_pair_is_a_scene_and_its_value_the_mean_of_the_seeds_both_have() -> None:
    def run(basis: str, seed: int, scenes: list[float]) -> dict[str, Any]:
        made = record(Run("glass", basis, 8, 1e-2, seed), (1.0, 1.0, 1.0))
        made["curve"]["10"]["test"] = dict.fromkeys(TERMS, scenes)
        return made

    made = {
        Cell("glass", "mean", 8): {0: run("mean", 0, [1.0, 2.0]), 1: run("mean", 1, [3.0, 2.0])},
        Cell("glass", "random-0", 8): {
            0: run("random-0", 0, [2.0, 4.0]), 1: run("random-0", 1, [2.0, 8.0]), 2: run("random-0", 2, [90.0, 90.0])
        },
    }  # fmt: skip
    sizes = Sizes(8, (), (), (1e-2,), STEPS, (), 2, 2, 2)
    answer = answers(made, sizes, ["glass"])[0]
    # 2 - 2 and 2 - 6
    assert answer.pairs.count == 2 and answer.pairs.mean == pytest.approx(-2.0)
