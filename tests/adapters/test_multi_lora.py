"""Several LoRAs on one network: each sample goes through its own, and the base is shared."""

from __future__ import annotations

import copy

import pytest
import torch
from adapters.models import tiny_vggt
from tolerances import assert_as_exact_as_torch
from torch import nn

from subspace3d.adapters.methods import add_lora
from subspace3d.adapters.multi_lora import MultiLora, add_updates, add_updates_ref, joined, share_weights
from subspace3d.adapters.placement import select_modules


def _inputs(adapters: int, samples: int, *inner: int, out: int = 7, into: int = 5, rank: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(samples)
    shapes = [(adapters * samples, *inner, out), (adapters * samples, *inner, into), (adapters, rank, into)]
    return [torch.randn(shape, generator=generator) for shape in (*shapes, (adapters, out, rank))]


def _with_gradients(function, inputs: list[torch.Tensor], dtype: torch.dtype, weight: torch.Tensor):
    leaves = [each.to(dtype).requires_grad_() for each in inputs]
    result = function(*leaves, 1.7)
    return [result.detach(), *torch.autograd.grad(result, leaves, weight.to(dtype))]


@pytest.mark.parametrize("shape", [(1, 4, 6), (3, 1, 5), (4, 3), (3, 2, 11, 2), (2, 0, 4), (2, 3, 0)])
def test_updates_and_their_gradients_are_those_of_single_adapters(shape: tuple[int, ...]) -> None:
    inputs = _inputs(*shape)
    weight = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))
    exact = _with_gradients(add_updates_ref, inputs, torch.float64, weight)
    ours, torchs = (_with_gradients(f, inputs, torch.float32, weight) for f in (add_updates, add_updates_ref))
    for name, mine, single, wanted in zip(("y", "result", "x", "A", "B"), ours, torchs, exact):
        assert_as_exact_as_torch(mine, single, wanted, name)


def test_inputs_need_not_be_contiguous() -> None:
    result, x, a, b = _inputs(2, 3, 4)
    bent = [each.transpose(-1, -2).contiguous().transpose(-1, -2) for each in (result, x, a, b)]
    assert not bent[1].is_contiguous()
    torch.testing.assert_close(add_updates(*bent, 2.0), add_updates(result, x, a, b, 2.0), rtol=0, atol=0)


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float64])
def test_the_frozen_layer_may_have_another_type(base: torch.dtype) -> None:
    result, x, a, b = _inputs(2, 3, 4)
    ours, wanted = (function(result.to(base), x, a, b, 2.0) for function in (add_updates, add_updates_ref))
    assert ours.dtype == wanted.dtype
    torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("function", [add_updates, add_updates_ref])
def test_shares_must_be_equal(function) -> None:
    result, x, a, b = _inputs(3, 2)
    with pytest.raises(ValueError, match=r"x must have one or more equal shares for 3 adapters, got shape \(5, 5\)"):
        function(result[:5], x[:5], a, b, 1.0)


def _tuned(model: nn.Module, count: int) -> list[nn.Module]:
    tuned = []
    for index in range(count):
        torch.manual_seed(index)
        tuned.append(add_lora(share_weights(model, select_modules(model, "all")), 2, "all"))
        for name, parameter in tuned[-1].named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.3)
    return tuned


def test_every_scene_goes_through_its_own_adapter() -> None:
    model = tiny_vggt()
    tuned = _tuned(model, 3)
    images = torch.rand(6, 2, 3, 28, 28, generator=torch.Generator().manual_seed(2))
    modules = dict(model.named_modules())
    with torch.no_grad():
        base = model(images)
        alone = [each.eval()(share) for each, share in zip(tuned, images.chunk(3))]
        exact = [copy.deepcopy(each).double()(share.double()) for each, share in zip(tuned, images.chunk(3))]
        with joined(model, tuned) as chosen:
            together = model(images)
            chosen[:] = [2, 0]
            swapped = model(torch.cat([images[4:], images[:2]]))
    for key in ("pose_enc", "depth", "depth_conf"):
        assert_as_exact_as_torch(together[key], *(torch.cat([each[key] for each in of]) for of in (alone, exact)), key)
        pair = (torch.cat([of[2][key], of[0][key]]) for of in (alone, exact))
        assert_as_exact_as_torch(swapped[key], *pair, key)
        assert not torch.allclose(together[key], base[key], atol=1e-3)
    # afterwards it is the plain network
    assert all(module is modules[name] for name, module in model.named_modules())
    assert not any("forward" in module.__dict__ for module in model.modules())
    with torch.no_grad():
        torch.testing.assert_close(model(images)["depth"], base["depth"], rtol=0, atol=0)


def test_copies_share_every_tensor_and_leave_the_original_alone() -> None:
    model = tiny_vggt()
    names = [name for name, _ in model.named_modules()]
    tensors = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    (tuned,) = _tuned(model, 1)
    found = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor.data_ptr()
        for name, tensor in tuned.state_dict().items()
        if "lora_" not in name
    }
    assert found == tensors
    assert [name for name, _ in model.named_modules()] == names
    assert tuned.get_submodule("base_model.model.aggregator.patch_embed") is model.aggregator.patch_embed


def test_only_plain_loras_of_one_scaling_are_joined() -> None:
    model = tiny_vggt()
    layers = [
        add_lora(share_weights(model, select_modules(model, "all")), 2, "all").get_submodule(
            "base_model.model.aggregator.frame_blocks.0.mlp.fc1"
        )
        for _ in range(2)
    ]
    joint, base = MultiLora(layers, [0, 1]), layers[0].get_base_layer()
    assert joint.weight is base.weight and joint.bias is base.bias and joint.in_features == base.in_features
    layers[1].scaling["default"] = 3.0
    with pytest.raises(ValueError, match=r"layers must be plain LoRAs of one scaling without dropout, got .*2.0, 3.0"):
        MultiLora(layers, [0, 1])
