"""`experiments.few`: what is run, and the table of means over seeds."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.few import FewExperiment, jobs, table


def test_seeds_come_one_after_the_other_and_one_image_has_no_views_to_compare(tmp_path: Path) -> None:
    found = jobs(FewExperiment(tmp_path, tasks=("glass",), images=(3, 1), methods=("bias", "lora"), seeds=2))
    assert [(job.seed, job.images, job.teacher, job.method) for job in found] == [
        (seed, images, teacher, method)
        for seed in (0, 1)
        for images, teachers in ((1, ["depth"]), (3, ["depth", "views"]))
        for teacher in teachers
        for method in ("bias", "lora")
    ]
    assert len({job.name for job in found}) == len(found)


def test_more_seeds_than_scenes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seeds must be 1 to 10"):
        FewExperiment(tmp_path, seeds=11)


def test_the_table_has_means_over_seeds_and_a_dash_where_nothing_was_measured() -> None:
    def row(seed: int, after: float) -> dict[str, object]:
        few = {"teacher": "views", "before": {"loss_generic": 1.0}, "after": {"loss_generic": after}, "seconds": 10.0}
        test = {"abs_rel": 0.5, "rotation_error_deg": 3.0}
        given = {"task": "glass", "images": 3, "seed": seed, "method": "bias", "trained": 1000}
        return {**given, "few": few, "test_before": test, "test_after": {**test, "abs_rel": after}}

    lines = table([row(0, 0.1), row(1, 0.2)]).splitlines()
    assert lines[2] == (
        "| glass | 3 | views | bias | 1,000 | - | 0.500 -> 0.150 | 3.0 -> 3.0 | 1.00 -> 0.15 | 10 | 2 |"
    )
    assert len(lines) == 3
