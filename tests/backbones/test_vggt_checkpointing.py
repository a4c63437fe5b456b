"""Activation checkpointing: the same gradients, and a real recomputation also in evaluation mode."""

from collections import Counter

import pytest
import torch

from subspace3d.backbones.vggt import VGGT


def count_calls(model: VGGT) -> Counter:
    """Forward calls of every block and of the depth head's last stage, from now on."""
    calls: Counter = Counter()
    names = [name for name, _ in model.named_modules() if name.endswith(".mlp") and "camera" not in name]
    for name in (*names, "depth_head.scratch"):
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    return calls


def loss(model: VGGT, images: torch.Tensor) -> torch.Tensor:
    result = model(images)
    return result["depth"].sum() + result["depth_conf"].mean() + sum(p.square().sum() for p in result["pose_enc_list"])


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_gradients_do_not_change(tiny: VGGT, mode: bool) -> None:
    tiny.train(mode)
    images = torch.rand(2, 2, 3, 28, 28)
    gradients = []
    for enabled in (False, True):
        tiny.enable_checkpointing(enabled)
        tiny.zero_grad()
        loss(tiny, images).backward()
        gradients.append({name: p.grad.clone() for name, p in tiny.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, plain in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], plain, msg=name)


def test_blocks_are_recomputed_in_evaluation_mode(tiny: VGGT) -> None:
    tiny.eval().enable_checkpointing()
    calls = count_calls(tiny)
    loss(tiny, torch.rand(1, 2, 3, 28, 28)).backward()
    assert len(calls) == 2 + 4 + 4 + 1
    assert set(calls.values()) == {2}


def test_frozen_blocks_with_one_adapted_layer_are_recomputed(tiny: VGGT) -> None:
    tiny.requires_grad_(False).eval().enable_checkpointing()
    tiny.get_parameter("aggregator.frame_blocks.1.attn.qkv.weight").requires_grad_(True)
    calls = count_calls(tiny)
    loss(tiny, torch.rand(1, 2, 3, 28, 28)).backward()
    recomputed = {name for name, count in calls.items() if count == 2}
    assert "aggregator.global_blocks.0.mlp" not in recomputed
    assert {"aggregator.frame_blocks.1.mlp", "aggregator.global_blocks.1.mlp", "depth_head.scratch"} <= recomputed
    assert not any("patch_embed" in name for name in recomputed)


def test_nothing_is_recomputed_without_a_backward_pass(tiny: VGGT) -> None:
    tiny.enable_checkpointing()
    calls = count_calls(tiny)
    with torch.no_grad():
        tiny(torch.rand(1, 2, 3, 28, 28))
    tiny.requires_grad_(False)
    tiny(torch.rand(1, 2, 3, 28, 28))
    assert set(calls.values()) == {2}
    assert tiny(torch.rand(1, 2, 3, 28, 28))["depth"].grad_fn is None
