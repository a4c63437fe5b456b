"""A LoRA's start at the gradient, against singular vectors of the gradients that autograd gives a plain model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from adapters.models import images, outputs, tiny_vggt
from peft.tuners.lora import LoraLayer
from training.plane_scenes import write_plane_scenes
from training.tiny import CONFIG, tiny_model

from subspace3d.adapters.parameters import trainable_parameters
from subspace3d.datasets.multiview import MultiViewDataset
from subspace3d.training.device import joined_processes
from subspace3d.training.gradient_start import start_at_gradient
from subspace3d.training.step import draw_step, loss_terms

STEPS = 2
PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> MultiViewDataset:
    folder = tmp_path_factory.mktemp("scenes")
    return MultiViewDataset(write_plane_scenes(folder, scenes=2, views=3), image_size=28)


def lora_layers(model: torch.nn.Module) -> dict[str, LoraLayer]:
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    return {name.removeprefix(PREFIX): layer for name, layer in layers.items()}


def test_rows_are_the_leading_input_directions_of_the_gradient(dataset: MultiViewDataset) -> None:
    tuned = tiny_model()
    random = {name: layer.lora_A["default"].weight.clone() for name, layer in lora_layers(tuned).items()}
    trainable = list(trainable_parameters(tuned))
    before = outputs(tuned, images())
    start_at_gradient(tuned, dataset, CONFIG, STEPS)
    torch.testing.assert_close(outputs(tuned, images()), before, rtol=0, atol=0)
    assert list(trainable_parameters(tuned)) == trainable
    assert all(parameter.grad is None for parameter in tuned.parameters())

    plain = tiny_vggt()
    with joined_processes(torch.device("cpu")) as processes:
        for step in range(STEPS):
            data = draw_step(dataset, CONFIG, step, processes)
            for part in data.parts:
                loss_terms(plain, part, data.counts, CONFIG, torch.device("cpu"))["loss"].backward()
    changed = 0
    for name, layer in lora_layers(tuned).items():
        weight = plain.get_submodule(name).weight
        a = layer.lora_A["default"].weight.flatten(1).double()
        if weight.grad is None or not weight.grad.any():
            assert torch.equal(a.float(), random[name].flatten(1))
            continue
        gradient = weight.grad.flatten(1).double()
        k = min(2, *gradient.shape)
        values = torch.linalg.svdvals(gradient)
        torch.testing.assert_close(3 * a[:k] @ a[:k].T, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-5)
        # as much of the gradient as its k leading directions hold, whichever of equal ones were taken
        held = 3 * (gradient @ a[:k].T).square().sum()
        torch.testing.assert_close(held, values[:k].square().sum(), rtol=1e-4, atol=0)
        changed += 1
    assert changed > 0.8 * len(random)


def test_parts_of_a_step_give_the_same_start(dataset: MultiViewDataset) -> None:
    config = dataclasses.replace(CONFIG, frames=(2, 2), images_per_step=4)
    starts = []
    for most in (0, 2):
        tuned = tiny_model()
        start_at_gradient(tuned, dataset, dataclasses.replace(config, max_images=most), STEPS, quiet=True)
        starts.append({name: layer.lora_A["default"].weight for name, layer in lora_layers(tuned).items()})
    for name, whole in starts[0].items():
        torch.testing.assert_close(starts[1][name], whole, rtol=1e-3, atol=1e-3)


def test_gradient_that_is_not_finite_is_named(dataset: MultiViewDataset, tmp_path: Path) -> None:
    tuned = tiny_model()
    with torch.no_grad():
        tuned.get_submodule(f"{PREFIX}camera_head.embed_pose").base_layer.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"the gradient of .* must be finite in the first 2 steps"):
        start_at_gradient(tuned, dataset, CONFIG, STEPS, quiet=True)
    assert all("lora_" in name for name in trainable_parameters(tuned))
