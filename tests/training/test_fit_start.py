"""The start of the cores at the projected gradient, against autograd by the weights, and frozen heads."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from adapters.models import random_basis, tiny_vggt
from training.plane_scenes import write_plane_scenes
from training.tiny import CONFIG

from subspace3d.adapters.methods import apply_method
from subspace3d.adapters.parameters import trainable_parameters
from subspace3d.adapters.placement import SUBSPACE_SCALE, place
from subspace3d.backbones.config import CONFIGS
from subspace3d.commands import finetune
from subspace3d.commands.finetune import FinetuneConfig
from subspace3d.datasets.multiview import MultiViewDataset
from subspace3d.training.device import Processes
from subspace3d.training.fit_start import start_cores, start_cores_at
from subspace3d.training.step import draw_step, loss_terms
from subspace3d.training.tuned import load_tuned

BATCHES = 2


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> MultiViewDataset:
    return MultiViewDataset(write_plane_scenes(tmp_path_factory.mktemp("scenes"), scenes=2, views=3), image_size=28)


def with_cores(K: int = 4) -> torch.nn.Module:
    model = tiny_vggt()
    basis = random_basis(model, list(place(model, "subspace").cores), K)
    return apply_method(model, "subspace", basis=basis, heads="frozen")


def cores_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if name.endswith(".c")}


def mean_loss(model: torch.nn.Module, dataset: MultiViewDataset) -> float:
    total = 0.0
    with torch.no_grad():
        for step in range(BATCHES):
            data = draw_step(dataset, CONFIG, step, Processes())
            total += sum(
                float(loss_terms(model, part, data.counts, CONFIG, torch.device("cpu"))["loss"]) for part in data.parts
            )
    return total / BATCHES


def test_frozen_heads_leave_the_cores_alone() -> None:
    tuned = with_cores()
    assert list(trainable_parameters(tuned)) == list(cores_of(tuned))
    with pytest.raises(ValueError, match="heads must be one of lora, frozen"):
        apply_method(tiny_vggt(), "subspace", basis={"a": (torch.eye(2), torch.eye(2))}, heads="thawed")  # type: ignore[arg-type]


def test_the_start_is_a_step_down_the_projected_gradient(dataset: MultiViewDataset) -> None:
    tuned, plain = with_cores(), tiny_vggt()
    basis = random_basis(plain, list(place(plain, "subspace").cores), 4)
    before = mean_loss(tuned, dataset)
    start = start_cores(tuned, dataset, CONFIG, BATCHES)
    assert start.before == pytest.approx(before, rel=1e-6)
    assert start.after < start.before and start.after == pytest.approx(mean_loss(tuned, dataset), rel=1e-5)
    assert start.tried >= 3 and trainable_parameters(tuned).keys() == cores_of(tuned).keys()

    for step in range(BATCHES):
        data = draw_step(dataset, CONFIG, step, Processes())
        for part in data.parts:
            loss_terms(plain, part, data.counts, CONFIG, torch.device("cpu"))["loss"].backward()
    projected, found = [], []
    update = weights = 0.0
    for name, (u, v) in basis.items():
        weight = plain.get_parameter(f"{name}.weight")
        assert weight.grad is not None
        projected.append((u.T @ weight.grad @ v).flatten())
        core = cores_of(tuned)[f"base_model.model.{name}.subspace_core.default.c"].detach()
        found.append(core.flatten())
        update += float((SUBSPACE_SCALE * u @ core @ v.T).square().sum())
        weights += float(weight.square().sum())
    one, two = torch.cat(projected), torch.cat(found)
    assert float(torch.cosine_similarity(one, two, dim=0)) == pytest.approx(-1, abs=1e-5)
    assert (update / weights) ** 0.5 == pytest.approx(start.size, rel=1e-3)


def test_cores_that_are_not_zero_are_left_alone(dataset: MultiViewDataset) -> None:
    tuned = with_cores()
    start_cores(tuned, dataset, CONFIG, 1)
    with pytest.raises(ValueError, match="cores that are zero"):
        start_cores(tuned, dataset, CONFIG, 1)


def test_a_loss_may_leave_cores_out() -> None:
    tuned = with_cores()
    seen, *others = cores_of(tuned).values()
    start = start_cores_at(tuned, lambda: (seen - 0.01).square().sum())
    assert start.after < start.before and seen.any() and not any(core.any() for core in others)


def test_finetune_records_the_start_and_refuses_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adapters.models import TINY

    monkeypatch.setitem(CONFIGS, "vggt-nano", dataclasses.replace(TINY, name="vggt-nano"))
    train = dataclasses.replace(CONFIG, steps=1, save_every=1, augment=False, check_memory=False)
    scenes = write_plane_scenes(tmp_path / "scenes", scenes=2, views=3)
    config = FinetuneConfig(
        scenes, tmp_path / "run", "psv", weights=Path("random"), core_size=3, heads="frozen", start="fit", train=train
    )
    record = finetune.run(config)
    assert record["start"]["after"] <= record["start"]["before"]
    assert (record["settings"]["heads"], record["settings"]["start"]) == ("frozen", "fit")
    model = load_tuned(tmp_path / "run")
    assert not any("lora_" in name for name, _ in model.named_parameters())
    assert any(core.any() for core in cores_of(model).values())
    with pytest.raises(ValueError, match="start 'fit' there, 'zero' now"):
        finetune.run(dataclasses.replace(config, start="zero"))
    with pytest.raises(ValueError, match="start must be zero for a method without cores"):
        FinetuneConfig(scenes, tmp_path / "run", "lora", start="fit")
