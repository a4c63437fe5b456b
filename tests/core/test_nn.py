"""SubspaceLinear and SubspaceConv2d: lifecycle, merging, what they refuse."""

import re

import pytest
import torch
from tolerances import assert_as_exact_as_torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from subspace_ext import SubspaceConv2d, SubspaceLinear
from subspace_ext.ops.subspace_conv2d_ref import subspace_conv2d_ref
from subspace_ext.ops.subspace_linear_ref import subspace_linear_ref


def make_linear(plan="effective", dtype=torch.float32) -> SubspaceLinear:
    layer = SubspaceLinear.from_linear(
        nn.Linear(12, 20, dtype=dtype), torch.randn(20, 4), torch.randn(12, 4), scale=0.5, plan=plan
    )
    nn.init.normal_(layer.c)
    return layer


def make_conv(**settings) -> SubspaceConv2d:
    conv = nn.Conv2d(3, 8, (3, 2), **settings)
    layer = SubspaceConv2d.from_conv(conv, torch.randn(8, 4), torch.randn(18, 4), scale=0.5)
    nn.init.normal_(layer.c)
    return layer


def reference(layer: SubspaceLinear, x):
    return subspace_linear_ref(x, layer.weight, layer.bias, layer.U, layer.c, layer.V, layer.scale)


def test_a_new_layer_is_the_layer_it_replaces():
    linear, conv = nn.Linear(12, 20), nn.Conv2d(3, 8, 3, padding=1)
    x, image = torch.randn(5, 12), torch.randn(2, 3, 9, 7)
    for plan in ("effective", "beside", "auto"):
        layer = SubspaceLinear.from_linear(linear, torch.randn(20, 4), torch.randn(12, 4), 2.0, plan)
        assert torch.equal(layer(x), linear(x))
    assert torch.equal(SubspaceConv2d.from_conv(conv, torch.randn(8, 4), torch.randn(27, 4), 2.0)(image), conv(image))
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["core.c"]
    assert set(layer.state_dict()) == {"base_layer.weight", "base_layer.bias", "core.U", "core.V", "core.c"}
    assert layer.weight.data_ptr() == linear.weight.data_ptr()
    assert "K=4" in repr(layer) and "in_features=12" in repr(layer)


def test_state_dict_of_the_plain_layer_fits():
    layer, plain = make_linear(), nn.Linear(12, 20)
    missing, unexpected = layer.load_state_dict(plain.state_dict(), strict=False)
    assert set(missing) == {"core.U", "core.V", "core.c"} and not unexpected
    assert torch.equal(layer.weight, plain.weight)


def test_a_state_dict_of_version_0_1_is_read():
    first, second = nn.Sequential(make_linear(), nn.GELU()), nn.Sequential(make_linear(), nn.GELU())
    former = {re.sub(r"(base_layer|core)\.", "", name): value for name, value in first.state_dict().items()}
    assert set(former) == {"0.weight", "0.bias", "0.U", "0.V", "0.c"}
    second.load_state_dict(former)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


def test_names_in_a_state_dict_are_those_of_the_parameters():
    """What torch.distributed.checkpoint, averaged models and `functional_call` rely on."""
    layer = make_linear()
    named = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    assert named.keys() == layer.state_dict().keys()
    only_trained = StateDictOptions(ignore_frozen_params=True, strict=False)
    cores = get_model_state_dict(layer, options=only_trained)
    assert {"core.c"} == {name for name in cores if name in dict(layer.named_parameters())}
    other = make_linear()
    set_model_state_dict(other, {"core.c": layer.c.detach() + 1}, options=StateDictOptions(strict=False))
    assert torch.equal(other.c, layer.c + 1)
    with pytest.raises(RuntimeError, match=r"size mismatch for core\.c"):
        layer.load_state_dict({"core.c": torch.zeros(3, 3)}, strict=False)


@pytest.mark.parametrize("plan", ["effective", "beside"])
def test_module_gradients(plan):
    layer, x = make_linear(plan), torch.randn(6, 12, requires_grad=True)
    exact = torch.autograd.grad(reference(layer, x).square().sum(), (x, layer.c))
    ours = torch.autograd.grad(layer(x).square().sum(), (x, layer.c))
    for result, wanted in zip(ours, exact):
        torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"stride": 2, "padding": 1},
        {"dilation": (1, 2), "padding": (0, 2), "bias": False},
        {"padding": "same"},
        {"padding": 1, "padding_mode": "reflect"},
    ],
    ids=str,
)
def test_conv_values_and_gradients(settings):
    layer = make_conv(**settings)
    x = torch.randn(2, 3, 11, 9, requires_grad=True)
    plain = nn.Conv2d(3, 8, (3, 2), **settings)

    def results(dtype):
        c, leaf = layer.c.detach().to(dtype).requires_grad_(), x.detach().to(dtype).requires_grad_()
        update = (layer.U.to(dtype) @ c @ layer.V.to(dtype).t()).view(layer.weight.shape)
        weights = {"weight": layer.weight.to(dtype) + layer.scale * update}
        if layer.bias is not None:
            weights["bias"] = layer.bias.to(dtype)
        y = torch.func.functional_call(plain, weights, leaf)
        return (y, *torch.autograd.grad(y.square().sum(), (leaf, c)))

    y = layer(x)
    ours = (y, *torch.autograd.grad(y.square().sum(), (x, layer.c)))
    for name, result, torchs, exact in zip(("y", "dx", "dc"), ours, results(torch.float32), results(torch.float64)):
        assert_as_exact_as_torch(result, torchs, exact, name)
    torch.testing.assert_close(layer(x[0]), y[0])


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_a_conv_under_autocast_gives_what_a_plain_one_does(mode):
    layer, x = make_conv(padding=1, padding_mode=mode), torch.randn(2, 3, 9, 9)
    with torch.autocast("cpu", torch.bfloat16):
        y, plain = layer(x), layer.base_layer(x)
    nn.init.zeros_(layer.c)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), plain)
    assert y.dtype == plain.dtype == torch.bfloat16


def test_conv_op_equals_its_reference():
    layer, x = make_conv(padding=1), torch.randn(2, 3, 7, 6)
    geometry = ((1, 1), (1, 1), (1, 1))
    wanted = subspace_conv2d_ref(x, layer.weight, layer.bias, layer.U, layer.c, layer.V, layer.scale, geometry)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-4)


def test_conv_gradcheck_and_saved_tensors():
    layer = make_conv(stride=2, padding=1).double()
    x = torch.randn(1, 3, 7, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, c: torch.func.functional_call(layer.eval(), {"core.c": c}, x), (x, layer.c)
    )
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        layer(x)
    assert tuple(x.shape) not in saved


@pytest.mark.parametrize("make", [make_linear, make_conv])
def test_merge_and_unmerge(make):
    layer = make()
    x = torch.randn(5, 12) if make is make_linear else torch.randn(2, 3, 9, 9)
    before, weight = layer(x), layer.weight.clone()
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.merge()
    assert layer.merged and not torch.equal(layer.weight, weight)
    assert torch.equal(layer.weight, layer.merged_weight())
    torch.testing.assert_close(layer(x), before)
    layer.merge()
    assert all(torch.equal(tensor, state[name]) for name, tensor in layer.state_dict().items())
    with pytest.raises(ValueError, match="must be unmerged"):
        layer.load_state_dict(state)
    layer.unmerge()
    assert torch.equal(layer.weight, weight) and not layer.merged
    assert torch.equal(layer(x), before)


def test_merging_leaves_the_original_layer_alone():
    linear = nn.Linear(12, 20)
    weight = linear.weight.detach().clone()
    layer = SubspaceLinear.from_linear(linear, torch.randn(20, 4), torch.randn(12, 4))
    nn.init.ones_(layer.c)
    layer.merge()
    assert torch.equal(linear.weight, weight)


def test_merging_refuses_a_core_that_is_not_finite():
    layer = make_linear()
    with torch.no_grad():
        layer.c[0, 0] = float("inf")
    weight = layer.weight.clone()
    with pytest.raises(ValueError, match="merged weight must be finite"):
        layer.merge()
    assert torch.equal(layer.weight, weight)


def test_layers_made_in_inference_mode():
    with torch.inference_mode():
        layer, x = make_linear(), torch.randn(40, 12)
        torch.testing.assert_close(layer(x), reference(layer, x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("plan", ["effective", "beside", "auto"])
def test_module_compiles_to_one_graph(plan):
    layer, x = make_linear(plan), torch.randn(40, 12)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    with torch.no_grad():
        layer.c.add_(1.0)
    torch.testing.assert_close(compiled(x), reference(layer, x), rtol=1e-5, atol=1e-4)


def test_conv_compiles_to_one_graph():
    layer, x = make_conv(), torch.randn(2, 3, 9, 9)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_bad_layers_are_refused():
    U, V = torch.randn(20, 4), torch.randn(12, 4)
    with pytest.raises(ValueError, match=r"linear must be a torch\.nn.Linear, got Conv2d"):
        SubspaceLinear.from_linear(nn.Conv2d(3, 4, 3), U, V)
    with pytest.raises(ValueError, match=r"transposed.*got ConvTranspose2d"):
        SubspaceConv2d.from_conv(nn.ConvTranspose2d(3, 8, 3), torch.randn(8, 4), torch.randn(27, 4))
    with pytest.raises(ValueError, match="groups=1, got groups=2"):
        SubspaceConv2d.from_conv(nn.Conv2d(4, 8, 3, groups=2), torch.randn(8, 4), torch.randn(18, 4))
    with pytest.raises(ValueError, match=r"V must be \[in, K\] = \[27, 4\]"):
        SubspaceConv2d.from_conv(nn.Conv2d(3, 8, 3), torch.randn(8, 4), torch.randn(28, 4))
    with pytest.raises(ValueError, match=r"U must be \[out, K\] with out = 20"):
        SubspaceLinear.from_linear(nn.Linear(12, 20), V, V)
    with pytest.raises(ValueError, match="plan must be one of"):
        SubspaceLinear.from_linear(nn.Linear(12, 20), U, V, plan="fast")
    with pytest.raises(ValueError, match="with in = 12"):
        make_linear()(torch.randn(3, 11))
    with pytest.raises(ValueError, match="with Cin = 3"):
        make_conv()(torch.randn(1, 4, 9, 9))
