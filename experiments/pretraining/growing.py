"""A data set that grows while a model trains on it: shards of scenes come into use at given steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from subspace3d.datasets.multiview import MultiViewDataset


class GrowingScenes:
    """Batches from the first n of ``shards`` shards, ``n = first + step // every``: what a step sees is its number's.

    Args:
        shard (Callable): makes shard k or finds it made, and returns its folder.
        open_scenes (Callable): the data set of a list of folders.
        shards (int): most shards.
        first (int): shards in use at step 0.
        every (int): steps from one shard to the next.

    Raises:
        ValueError: a number is out of its range.
    """

    def __init__(
        self,
        shard: Callable[[int], Path],
        open_scenes: Callable[[list[Path]], MultiViewDataset],
        shards: int,
        first: int,
        every: int,
    ) -> None:
        if not 1 <= first <= shards:
            raise ValueError(f"first must be in [1, shards {shards}], got {first}")
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.shard, self.open_scenes = shard, open_scenes
        self.shards, self.first, self.every = shards, first, every
        self._folders: list[Path] = []
        self._scenes: MultiViewDataset | None = None

    def in_use(self, step: int) -> int:
        """Shards that the batch of a step may come from."""
        return min(self.shards, self.first + step // self.every)

    def at(self, step: int) -> MultiViewDataset:
        """The scenes in use at a step; makes those that are missing, which can take long."""
        wanted = self.in_use(step)
        if self._scenes is None or len(self._folders) != wanted:
            self._folders = self._folders[:wanted]
            while len(self._folders) < wanted:
                self._folders.append(self.shard(len(self._folders)))
            self._scenes = self.open_scenes(list(self._folders))
        return self._scenes

    def batch(self, seed: int, step: int, frames: tuple[int, int], images_per_step: int) -> dict[str, Any]:
        """See `subspace3d.training.interfaces.BatchSource`."""
        return self.at(step).batch(seed, step, frames, images_per_step)
