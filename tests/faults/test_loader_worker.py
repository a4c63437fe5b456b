"""A data-loader worker that dies: torch names it, and the batches go on from any step."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader
from training.plane_scenes import write_plane_scenes

from subspace3d.datasets.multiview import MultiViewBatchSampler, MultiViewDataset, collate


class DiesAt(MultiViewDataset):
    """Its worker is killed when it draws from the scene called ``fatal``, once."""

    marker: Path

    def __getitem__(self, request):  # type: ignore[no-untyped-def]
        if not self.marker.exists() and torch.utils.data.get_worker_info() is not None:
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(request)


def _batches(dataset: MultiViewDataset, start: int, workers: int):
    sampler = MultiViewBatchSampler(dataset, seed=0, frames=(2, 2), images_per_step=2, steps=4, start=start)
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=workers)


def test_the_batches_after_a_dead_worker_are_those_of_an_undisturbed_run(tmp_path: Path) -> None:
    write_plane_scenes(tmp_path / "scenes", scenes=2, views=3)
    dataset = DiesAt(tmp_path / "scenes", 28)
    dataset.marker = tmp_path / "died"
    expected = [batch["images"] for batch in _batches(dataset, 0, 0)]
    with pytest.raises(RuntimeError, match="worker"):
        list(_batches(dataset, 0, 1))
    again = [batch["images"] for batch in _batches(dataset, 2, 1)]
    assert all(torch.equal(a, b) for a, b in zip(expected[2:], again, strict=True))
