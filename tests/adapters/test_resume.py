"""A run of any method that was cut off and continued ends in the same bits as one that was not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapters.models import random_basis, tiny_vggt
from training.plane_scenes import write_plane_scenes

from subspace3d.adapters.hooks import method_hook
from subspace3d.adapters.methods import apply_method
from subspace3d.adapters.parameters import trainable_parameters
from subspace3d.adapters.placement import place
from subspace3d.datasets.multiview import MultiViewDataset
from subspace3d.training.config import TrainConfig
from subspace3d.training.loop import train

CONFIG = TrainConfig(
    steps=9, lr=1e-2, frames=(2, 2), images_per_step=2, image_size=28, save_every=3, device="cpu", threads=1
)


class Cut(Exception):
    pass


class CutOff(MultiViewDataset):
    """Fails when the batch of one step is drawn."""

    last = -1

    def batch(self, seed, step, *rest):
        if step == self.last:
            raise Cut
        return super().batch(seed, step, *rest)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CutOff:
    folder = tmp_path_factory.mktemp("scenes")
    return CutOff(write_plane_scenes(folder, scenes=2, views=2), image_size=28, augment=False)


def _train(method: str, dataset: MultiViewDataset, out: Path) -> dict[str, torch.Tensor]:
    model = tiny_vggt()
    basis = random_basis(model, list(place(model, "subspace").cores), 4) if method == "subspace" else None
    tuned = apply_method(model, method, 2, basis=basis, steps=CONFIG.steps)  # type: ignore[arg-type]
    train(tuned, dataset, CONFIG, out, hook=method_hook(tuned))
    return {name: value.detach().clone() for name, value in trainable_parameters(tuned).items()}


# AdaLoRA cuts for the last time after step 5
@pytest.mark.parametrize(("method", "saved"), [("adalora", 3), ("adalora", 6), ("pissa", 3), ("subspace", 3)])
def test_continued_run(
    method: str, saved: int, dataset: CutOff, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _train(method, dataset, tmp_path / "whole")
    monkeypatch.setattr(dataset, "last", saved + 2)
    with pytest.raises(Cut):
        _train(method, dataset, tmp_path / "cut")
    assert (tmp_path / f"cut/checkpoints/step_{saved}").is_dir()
    monkeypatch.undo()
    continued = _train(method, dataset, tmp_path / "cut")
    assert continued.keys() == whole.keys()
    assert all(torch.equal(continued[name], value) for name, value in whole.items())
