"""Rows, runs and their order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from experiment_results import FAMILIES

from experiments.plan import all_rows, analyzed, budget, final_rate_runs, mined_sets, rate_runs, table_rows, table_runs
from experiments.scale import NANO, SCALES
from experiments.settings import EXPERIMENTS
from experiments.tables import budget_table
from subspace3d.backbones.config import named_config

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_every_family_finds_its_rate_on_one_row_of_each_task(scale):
    for task in scale.tasks:
        rows = table_rows(scale, "tasks", task)
        assert sorted(row.family for row in rows if row.finds_rate) == sorted(FAMILIES)
        assert len({row.name for row in rows}) == len(rows)
    runs = rate_runs(scale, EXPERIMENTS)
    assert (
        len(runs) == len(scale.tasks) * len(FAMILIES) * len(scale.rates) == len({(run.task, run.name) for run in runs})
    )


def test_rows_of_one_name_are_one_row():
    for scale in SCALES.values():
        for task in scale.tasks:
            rows: dict[str, set] = {}
            for experiment in EXPERIMENTS:
                for row in table_rows(scale, experiment, task):
                    computed = (row.family, row.method, row.rank, row.K, row.mined, row.attributes, row.targets)
                    rows.setdefault(row.name, set()).add(computed)
            assert all(len(variants) == 1 for variants in rows.values())


def test_only_some_rows_are_run_and_every_family_of_theirs_finds_its_rate():
    scale = replace(NANO, rows=("lora-4", "psv-32", "subspace-8"))
    chosen = {task: dict.fromkeys(FAMILIES, 1e-3) for task in scale.tasks}
    names = [(run.task, run.row.name) for run in table_runs(scale, ["tasks"], 1, chosen)]
    shared = [(task, name) for task in scale.tasks for name in ("lora-4", "subspace-8")]
    assert sorted(names) == sorted([*shared, ("bodies", "psv-32"), ("glass", "psv-32")])
    grid = {(run.task, run.row.name) for run in rate_runs(scale, ["tasks"])}
    assert (
        ("faces", "lora-16") in grid and ("bodies", "psv-32") in grid and not any("pissa" in name for _, name in grid)
    )


def test_compared_rows_have_equal_size():
    rows = table_rows(NANO, "psv", "bodies")
    psv = [row.K for row in rows if row.method == "psv"]
    mined = [row.mined.k * len(NANO.bank_of("bodies").attributes) for row in rows if row.mined]
    assert psv == mined == [16, 32, 64]
    whole, control, *without = table_rows(NANO, "attributes", "bodies")
    assert control.K == 24 and control.mined == whole.mined
    assert [len(row.attributes) * row.mined.k for row in without] == [24] * 4
    assert {name for row in without for name in row.attributes} == {"texture", "geometry", "camera", "lighting"}


def test_directions_of_all_sources_have_equal_size():
    *rows, heads = table_rows(NANO, "source", "bodies")
    assert heads.targets == "heads" and heads.mined is None
    assert [row.mined.source for row in rows] == [*["attributes"] * 3, *["gradient"] * 3, "pooled", "random"]
    assert [row.mined.k for row in rows] == [4, 8, 16, 4, 8, 16, 32, 32]
    assert len({row.mined.folder for row in rows}) == len(rows)


def test_cores_and_subspaces_fit_the_model_and_the_adapters():
    for mined in mined_sets(NANO, EXPERIMENTS):
        if mined.source != "random":
            adapters = NANO.datasets * (len(NANO.bank(mined.bank).attributes) if mined.source == "pooled" else 1)
            assert mined.k <= adapters * mined.rank
    assert max(row.K for row in all_rows(NANO, EXPERIMENTS, "bodies")) <= named_config("vggt-nano").embed_dim


def test_seeds_come_one_after_the_other_and_a_family_without_a_rate_is_left_out():
    chosen = {task: dict.fromkeys(FAMILIES, 1e-3) for task in NANO.tasks}
    runs = table_runs(NANO, EXPERIMENTS, 3, chosen)
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    assert len(runs) == 174 == len({(run.task, run.name) for run in runs})
    del chosen["glass"]["pissa"]
    fewer = table_runs(NANO, EXPERIMENTS, 3, chosen)
    assert len(runs) - len(fewer) == 9
    assert all(run.row.method != "pissa" for run in fewer if run.task == "glass")


def test_finalists_are_run_with_the_seeds_that_the_grid_has_not():
    grid = rate_runs(NANO, ["psv"])
    runs = final_rate_runs(grid, 3, {"bodies": {"psv": (1e-3, 3e-3), "subspace": ()}})
    assert {run.name for run in runs} == {f"psv-32_lr{rate}_s{seed}" for rate in ("0.001", "0.003") for seed in (1, 2)}
    assert final_rate_runs(grid, 1, {"bodies": {"psv": (1e-3, 3e-3)}}) == []


def test_a_part_needs_less():
    assert {mined.folder for mined in mined_sets(NANO, ["psv"])} == {"object-r4/k4", "object-r4/k8", "object-r4/k16"}
    assert {run.row.family for run in rate_runs(NANO, ["psv"])} == {"psv", "subspace"}
    assert {run.task for run in rate_runs(NANO, ["psv"])} == {"bodies"}
    seconds = {name: sum(cost.seconds for cost in budget(NANO, [name], 3)) for name in EXPERIMENTS}
    assert all(0 < value < sum(cost.seconds for cost in budget(NANO, EXPERIMENTS, 3)) for value in seconds.values())


def test_the_documented_plan_is_the_plan():
    assert budget_table(budget(NANO, EXPERIMENTS, 3)) in (DOCS / "experiments.md").read_text(encoding="utf-8")


def test_the_ablated_task_can_be_left_out():
    faces = replace(NANO, tasks={"faces": "micro"})
    assert set(analyzed(faces)) == {"object", "micro"} and set(analyzed(NANO)) == {"object", "micro", "object-gradient"}
