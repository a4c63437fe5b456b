"""What holds for every wrapper of another package: every method, images of any shape, checkpoints of any trainer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from backbones.pipeline import difference, predict
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn

from subspace3d.adapters.low_rank import adapter_factors
from subspace3d.adapters.methods import apply_method
from subspace3d.backbones.build import build_backbone
from subspace3d.backbones.find import backbone_of, find_backbone
from subspace3d.backbones.losses import LossCounts
from subspace3d.backbones.targets import target_modules
from subspace3d.bench import step
from subspace3d.bench.config import BenchConfig
from subspace3d.choices import METHODS, OWN_WEIGHTS
from subspace3d.formats.adapter import fill_lora
from subspace3d.training.tuned import base_of

NAMES = ("pi3", "pi3x", "vggt-omega", "mapanything", "backbones.tiny_da3:backbone")

pytestmark = pytest.mark.usefixtures("other_packages")


def _build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return build_backbone(name, "random")


@pytest.mark.parametrize("method", [method for method in METHODS if method != "none"])
@pytest.mark.parametrize("name", NAMES)
def test_every_method_starts_at_the_base_and_stock_peft_gives_what_was_trained(
    name: str, method: str, tmp_path: Path
) -> None:
    base, model = _build(name), _build(name)
    before = predict(base)
    generator = torch.Generator().manual_seed(2)
    shapes = {module: model.get_submodule(module).weight.shape for module in target_modules(model, "cores")}
    basis = {
        module: tuple(torch.linalg.qr(torch.randn(side, 2, generator=generator))[0] for side in shape)
        for module, shape in shapes.items()
    }
    with_basis = {"basis": basis} if method in ("psv", "subspace") else {}
    tuned = apply_method(model, method, rank=2, **({"steps": 10} if method == "adalora" else with_basis))
    # a convolution plus zeros, and weights put together again from their singular vectors, are rounded anew
    assert difference(predict(tuned), before) <= (1e-6 if method in ("psv", "subspace", "pissa") else 0)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    assert difference(predict(tuned), before) > 1e-5
    if method in OWN_WEIGHTS:
        frozen = [key for key in base.state_dict() if backbone_of(base).is_frozen(key)]
        assert frozen and all(torch.equal(tuned.state_dict()[key], base.state_dict()[key]) for key in frozen)
        return
    fill_lora(tmp_path, adapter_factors(tuned), base_of(tuned), name)
    stock = PeftModel.from_pretrained(base, tmp_path)
    assert difference(predict(stock), predict(tuned)) < 1e-6


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 1, 1), (1, 2, 2), (2, 3, 2), (3, 2, 4)])
@pytest.mark.parametrize("name", [*NAMES, "vggt-nano"])
def test_one_frame_portraits_and_wide_images(name: str, frames: int, height: int, width: int) -> None:
    """Sizes in patches; what protocols of evaluation and `predict` in Python give."""
    backbone = find_backbone(name)
    model = build_backbone(name, None if name == "vggt-nano" else "random")
    size = height * backbone.patch_size, width * backbone.patch_size
    batch = {
        "images": torch.rand(2, frames, 3, *size),
        "depths": torch.rand(2, frames, *size) + 0.5,
        "point_masks": torch.ones(2, frames, *size, dtype=torch.bool),
        "extrinsics": torch.eye(3, 4).repeat(2, frames, 1, 1),
        "intrinsics": torch.tensor([[30.0, 0, size[1] / 2], [0, 30, size[0] / 2], [0, 0, 1]]).repeat(2, frames, 1, 1),
    }
    prediction = backbone.predict(model, batch["images"])
    backbone.loss(prediction, batch, 5.0, LossCounts.of(batch))["loss"].backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients and all(torch.isfinite(gradient).all() for gradient in gradients)
    if prediction.intrinsics is not None:
        centres = prediction.intrinsics[..., :2, 2]
        assert torch.allclose(centres, torch.tensor([size[1] / 2, size[0] / 2]).expand_as(centres))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_a_checkpoint_of_a_trainer_is_unwrapped(name: str, prefix: str, tmp_path: Path) -> None:
    model = _build(name)
    published = model.state_dict()
    if name == "mapanything":
        (tmp_path / "config.json").write_text(json.dumps({"dim": 16}))
        save_file({}, tmp_path / "model.safetensors")
    trained = {key: value.clone() + 1 if value.is_floating_point() else value for key, value in published.items()}
    checkpoint = {"model": {prefix + key: value for key, value in trained.items()}, "prev_epoch": 3}
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    loaded = build_backbone(name, tmp_path / "checkpoint.pt").state_dict()
    assert loaded.keys() == trained.keys() and all(torch.equal(loaded[key], trained[key]) for key in loaded)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_benchmarked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = find_backbone(name)
    monkeypatch.setattr(type(backbone), "image_size", 2 * backbone.patch_size)
    config = BenchConfig(cores=(2,), rank=2, rounds=1, backbone=name)
    rows = step.run(config, torch.device("cpu"), "autocast")
    assert len(rows) == 6 and all("excluded" not in row and row["seconds"] > 0 for row in rows)
    assert {row["backbone"] for row in rows} == {name}
