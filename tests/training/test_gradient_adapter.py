"""Gradient adapters and the sums they are made of, against the gradients that autograd gives a plain model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from adapters.models import TINY, tiny_vggt
from torch import nn
from training.plane_scenes import write_plane_scenes
from training.tiny import CONFIG

from subspace3d.adapters.placement import select_modules
from subspace3d.backbones import vggt
from subspace3d.backbones.config import CONFIGS
from subspace3d.commands import adapt, mine
from subspace3d.commands.adapt import AdaptConfig
from subspace3d.commands.mine import MineConfig
from subspace3d.datasets.multiview import MultiViewDataset
from subspace3d.formats.adapter import read_adapter
from subspace3d.formats.subspace import load_subspace
from subspace3d.training.device import joined_processes
from subspace3d.training.gradient_adapter import gradient_adapter
from subspace3d.training.gradients import count_passes, summed_gradients
from subspace3d.training.step import draw_step, loss_terms

# sums of float32 gradients in another order
ROUNDING = {"rtol": 1e-4, "atol": 1e-7}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> MultiViewDataset:
    folder = tmp_path_factory.mktemp("scenes")
    return MultiViewDataset(write_plane_scenes(folder, scenes=2, views=3), image_size=28)


def autograd(dataset: MultiViewDataset, names: list[str], steps: range) -> dict[str, torch.Tensor]:
    model = tiny_vggt()
    with joined_processes(torch.device("cpu")) as processes:
        for step in steps:
            data = draw_step(dataset, CONFIG, step, processes)
            for part in data.parts:
                loss_terms(model, part, data.counts, CONFIG, torch.device("cpu"))["loss"].backward()
    weights = {name: model.get_parameter(f"{name}.weight") for name in names}
    return {name: torch.zeros_like(w) if w.grad is None else w.grad for name, w in weights.items()}


def weights_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: model.get_parameter(f"{name}.weight") for name in select_modules(model, "all")}


def test_sums_by_part_equal_autograd_in_one_pass_and_in_many(dataset: MultiViewDataset) -> None:
    model = tiny_vggt()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.camera_head.embed_pose.weight.requires_grad_(True)
    weights = weights_of(model)
    expected = [autograd(dataset, list(weights), steps) for steps in (range(2), range(1, 3))]
    largest = max(weight.numel() for weight in weights.values())
    for gigabytes, least in ((1.0, 1), (2 * 4e-9 * largest, 3)):
        assert count_passes(weights, 2, gigabytes) >= least
        sums = dict(summed_gradients(model, weights, dataset, CONFIG, (range(2), range(1, 3)), None, gigabytes))
        assert list(sums) == list(weights)
        for name, parts in sums.items():
            assert parts.shape == (2, *weights[name].shape)
            for part, wanted in zip(parts, expected):
                torch.testing.assert_close(part, wanted[name], **ROUNDING)
    # what was trainable is so again, and nothing else
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["camera_head.embed_pose.weight"]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_adapter_is_the_leading_part_of_the_negative_gradient(dataset: MultiViewDataset) -> None:
    model, rank = tiny_vggt(), 2
    names = select_modules(model, "all")
    made = gradient_adapter(model, names, dataset, CONFIG, batches=2, rank=rank)
    expected = {name: g.flatten(1).double() for name, g in autograd(dataset, names, range(2)).items()}
    norm = sum(float(g.square().sum()) for g in expected.values()) ** 0.5
    assert made.norm == pytest.approx(norm, rel=1e-5)
    kept = 0.0
    convolutions = 0
    for name, gradient in expected.items():
        b, a = (side.double() for side in made.factors[name])
        u, s, vh = torch.linalg.svd(-gradient / norm, full_matrices=False)
        k = min(rank, *gradient.shape)
        assert b.shape == (len(gradient), k)
        best = (u[:, :k] * s[:k]) @ vh[:k]
        torch.testing.assert_close(b @ a, best, rtol=0, atol=2e-5 * float(s[0]) + 1e-9)
        # both sides share the size
        torch.testing.assert_close(b.norm(), a.norm(), rtol=1e-4, atol=1e-9)
        kept += float(s[:k].square().sum())
        convolutions += isinstance(model.get_submodule(name), nn.Conv2d)
    assert made.energy_kept == pytest.approx(kept, rel=1e-4)
    assert 0 < made.energy_kept < 1 and convolutions > 0


def test_the_gradient_of_a_weight_with_several_holders_is_no_module_s(dataset: MultiViewDataset) -> None:
    model = tiny_vggt()
    first, second = "aggregator.frame_blocks.0.attn.proj", "aggregator.frame_blocks.1.attn.proj"
    model.get_submodule(second).weight = model.get_parameter(f"{first}.weight")
    with pytest.raises(
        ValueError, match=rf"must leave out {second}: its weight has several holders \({first}, {second}\)"
    ):
        gradient_adapter(model, [second], dataset, CONFIG, batches=1, rank=1)


def test_a_gradient_that_is_not_finite_is_named(dataset: MultiViewDataset) -> None:
    model = tiny_vggt()
    with torch.no_grad():
        model.camera_head.embed_pose.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"the gradient of .* must be finite"):
        gradient_adapter(model, select_modules(model, "all"), dataset, CONFIG, batches=1, rank=1)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_threads_asked_for_are_used(dataset: MultiViewDataset) -> None:
    model, before = tiny_vggt(), torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        config = dataclasses.replace(CONFIG, threads=before)
        list(summed_gradients(model, weights_of(model), dataset, config, ((0,),)))
        assert torch.get_num_threads() == before
    finally:
        torch.set_num_threads(before)


def test_parts_without_steps_are_refused(dataset: MultiViewDataset) -> None:
    model = tiny_vggt()
    with pytest.raises(ValueError, match="parts must each have at least one step"):
        next(summed_gradients(model, weights_of(model), dataset, CONFIG, (range(0),)))
    with pytest.raises(ValueError, match="weights must name at least one module"):
        next(summed_gradients(model, {}, dataset, CONFIG, (range(1),)))


@pytest.fixture
def tiny_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONFIGS, "vggt-nano", dataclasses.replace(TINY, name="vggt-nano"))


def adapt_config(tmp_path: Path, **changes: object) -> AdaptConfig:
    train = dataclasses.replace(CONFIG, augment=False, check_memory=False)
    settings = {"rank": 2, "gradient_only": True, "gradient_steps": 2, "weights": Path("random"), "train": train}
    return AdaptConfig(tmp_path / "scenes", tmp_path / "gradients", **{**settings, **changes})  # type: ignore[arg-type]


def test_adapt_writes_folders_that_peft_and_mine_take(tmp_path: Path, tiny_backbone: None) -> None:
    from peft import PeftModel

    for number in range(2):
        write_plane_scenes(tmp_path / "scenes" / f"texture_{number}", scenes=2, views=3, seed=number)
    config = adapt_config(tmp_path)
    folders = adapt.run(config)
    assert [folder.name for folder in folders] == ["texture_0", "texture_1"]
    adapter = read_adapter(folders[0])
    assert adapter.source == "gradient" and adapter.base_model == "vggt-nano@random-0"
    record = json.loads((folders[0] / "adapt.json").read_text())
    assert (record["source"], record["batches"]) == ("gradient", 2)
    size = sum(float((b.double() @ a.double()).square().sum()) for b, a in adapter.modules.values())
    assert size == pytest.approx(record["energy_kept"], rel=1e-4)
    # a step along it lowers the loss that it is the gradient of
    torch.manual_seed(0)
    model = vggt.VGGT(TINY).eval()
    data = MultiViewDataset(tmp_path / "scenes" / "texture_0", 28)
    before = total_loss(model, data)
    tuned = PeftModel.from_pretrained(model, str(folders[0]), torch_device="cpu").eval()
    for layer in tuned.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("default", 1e-4)
    change = total_loss(tuned, data) - before
    # to first order the change is -step norm energy_kept
    assert change == pytest.approx(-1e-4 * record["norm"] * record["energy_kept"], rel=0.1)

    # nothing is made again, other settings are refused, a rate is no setting of a gradient
    stamp = (folders[0] / "adapter_model.safetensors").stat().st_mtime_ns
    adapt.run(dataclasses.replace(config, train=dataclasses.replace(config.train, lr=1.0)))
    assert (folders[0] / "adapter_model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="gradient_steps 2 there, 3 now"):
        adapt.run(dataclasses.replace(config, gradient_steps=3))
    with pytest.raises(ValueError, match="source 'gradient' there, None now"):
        adapt.run(dataclasses.replace(config, gradient_only=False))

    path = mine.run(MineConfig(tmp_path / "gradients", tmp_path / "texture.safetensors", k=2))
    module = load_subspace(path).modules["aggregator.frame_blocks.0.attn.qkv"]
    assert module.u.shape[1] == 2 and module.singular_values[0] > 0


def total_loss(model: nn.Module, dataset: MultiViewDataset) -> float:
    total = 0.0
    config = dataclasses.replace(CONFIG, augment=False)
    with joined_processes(torch.device("cpu")) as processes, torch.no_grad():
        for step in range(2):
            data = draw_step(dataset, config, step, processes)
            for part in data.parts:
                total += float(loss_terms(model, part, data.counts, config, torch.device("cpu"))["loss"])
    return total
