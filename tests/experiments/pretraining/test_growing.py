from __future__ import annotations

from pathlib import Path

import pytest
import torch
from training.plane_scenes import write_plane_scenes

from experiments.pretraining.growing import GrowingScenes
from subspace3d.datasets.multiview import MultiViewDataset


def growing(tmp_path: Path, made: list[int], **settings: int) -> GrowingScenes:
    def shard(number: int) -> Path:
        made.append(number)
        return write_plane_scenes(tmp_path / f"shard{number}", scenes=2, views=3, size=28)

    return GrowingScenes(shard, lambda folders: MultiViewDataset(folders, 28), **settings)


def test_shards_come_into_use_at_their_steps_and_are_made_then(tmp_path: Path) -> None:
    made: list[int] = []
    scenes = growing(tmp_path, made, shards=3, first=1, every=10)
    assert [scenes.in_use(step) for step in (0, 9, 10, 19, 20, 1000)] == [1, 1, 2, 2, 3, 3]
    scenes.batch(0, 9, (2, 2), 4)
    assert made == [0] and len(scenes.at(9)) == 2
    scenes.batch(0, 25, (2, 2), 4)
    assert made == [0, 1, 2] and len(scenes.at(25)) == 6


def test_a_step_sees_the_same_whatever_came_before(tmp_path: Path) -> None:
    scenes = growing(tmp_path, [], shards=3, first=1, every=10)
    late = scenes.batch(3, 25, (2, 3), 6)
    early = scenes.batch(3, 5, (2, 3), 6)
    fresh = growing(tmp_path, [], shards=3, first=1, every=10)
    for step, batch in ((5, early), (25, late)):
        again = fresh.batch(3, step, (2, 3), 6)
        assert again["names"] == batch["names"] and torch.equal(again["images"], batch["images"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shards": 2, "first": 3, "every": 1}, r"first must be in \[1, shards 2\], got 3"),
        ({"shards": 2, "first": 1, "every": 0}, "every must be at least 1, got 0"),
    ],
)
def test_bad_numbers_are_named(tmp_path: Path, settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        growing(tmp_path, [], **settings)
