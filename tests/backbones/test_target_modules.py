"""Target presets on our model, on names alone, and as PEFT reads them."""

import pytest
import torch
from torch import nn

from subspace3d.backbones.targets import target_modules, target_regex
from subspace3d.backbones.vggt import VGGT
from subspace3d.backbones.vggt_targets import EXPRESSIONS


def kinds(model: nn.Module, names: list[str]) -> dict[str, int]:
    modules = [model.get_submodule(name) for name in names]
    return {kind.__name__: sum(type(module) is kind for module in modules) for kind in (nn.Linear, nn.Conv2d)}


@pytest.mark.parametrize(
    ("preset", "linears", "convolutions"), [("aggregator", 192, 0), ("heads", 20, 30), ("all", 212, 30)]
)
def test_presets_of_vggt_1b(big: VGGT, preset: str, linears: int, convolutions: int) -> None:
    names = target_modules(big, preset)
    assert kinds(big, names) == {"Linear": linears, "Conv2d": convolutions}
    assert len(names) == linears + convolutions


def test_all_is_every_linear_and_convolution_outside_the_encoder(big: VGGT) -> None:
    expected = [
        name
        for name, module in big.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and "patch_embed" not in name
    ]
    assert target_modules(big, "all") == expected


def test_names_alone_are_enough_and_other_heads_are_left_out(big: VGGT) -> None:
    names = [name for name, _ in big.named_modules()]
    others = [name.replace("depth_head", "point_head") for name in names if name.startswith("depth_head")]
    others += ["track_head.tracker.fmap_conv", "my.aggregator.frame_blocks.0.attn.qkv", "camera_head.embed_pose.extra"]
    for preset in EXPRESSIONS:
        assert target_modules(names + others, preset) == target_modules(big, preset)


def test_peft_targets_the_same_modules(tiny: VGGT) -> None:
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    expected = target_modules(tiny, "all")
    inject_adapter_in_model(LoraConfig(r=2, target_modules=target_regex("all")), tiny)
    adapted = [name for name, module in tiny.named_modules() if isinstance(module, LoraLayer)]
    assert adapted == expected
    assert target_modules(tiny, "all") == expected
    assert tiny(torch.rand(1, 2, 3, 28, 28))["depth"].shape == (1, 2, 28, 28, 1)


def test_errors(big: VGGT) -> None:
    with pytest.raises(ValueError, match="aggregator, heads, all, got 'decoder'"):
        target_modules(big, "decoder")
    with pytest.raises(ValueError, match=r"'heads' match no module.*camera_head"):
        target_modules(nn.Sequential(nn.Linear(2, 2)), "heads")
