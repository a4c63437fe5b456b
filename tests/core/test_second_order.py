"""Gradients of gradients: right where the operations are plain, refused in words where they are fused."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad
from torch.nn.functional import linear

from subspace_ext import SubspaceConv2d, SubspaceLinear, subspace_linear
from subspace_ext.ops.lora import lora_conv2d, lora_linear

GEOMETRY = ((1, 1), (1, 1), (1, 1))


def make_linear(plan="effective") -> SubspaceLinear:
    layer = SubspaceLinear.from_linear(nn.Linear(6, 9), torch.randn(9, 3), torch.randn(6, 3), 0.5, plan)
    nn.init.normal_(layer.c)
    return layer


def make_conv() -> SubspaceConv2d:
    layer = SubspaceConv2d.from_conv(nn.Conv2d(3, 8, 3, padding=1), torch.randn(8, 4), torch.randn(27, 4))
    nn.init.normal_(layer.c)
    return layer


def hooked(layer: nn.Module) -> nn.Module:
    layer.base_layer.register_forward_hook(lambda module, arguments, result: result)
    return layer


def op(x):
    c = torch.randn(3, 3, requires_grad=True)
    return subspace_linear(x, torch.randn(9, 6), None, torch.randn(9, 3), c, torch.randn(6, 3))


def of_lora(x):
    a, b = torch.randn(2, 6, requires_grad=True), torch.randn(9, 2, requires_grad=True)
    return lora_linear(x, torch.randn(9, 6), None, a, b, 1.0)


def of_conv_lora(x):
    a, b = torch.randn(2, 3, 3, 3, requires_grad=True), torch.randn(8, 2, 1, 1, requires_grad=True)
    return lora_conv2d(x, torch.randn(8, 3, 3, 3), None, a, b, 1.0, GEOMETRY)


CASES = {
    "effective": (make_linear, (5, 6)),
    "beside": (lambda: make_linear("beside"), (5, 6)),
    "hooked": (lambda: hooked(make_linear()), (5, 6)),
    "op": (lambda: op, (5, 6)),
    "conv": (make_conv, (2, 3, 5, 5)),
    "lora": (lambda: of_lora, (5, 6)),
    "conv_lora": (lambda: of_conv_lora, (2, 3, 5, 5)),
}


@pytest.mark.parametrize("square", [True, False], ids=["loss_curved", "loss_linear"])
@pytest.mark.parametrize("case", CASES)
def test_a_second_derivative_is_refused_in_words(case, square):
    make, shape = CASES[case]
    function, x = make(), torch.randn(shape, requires_grad=True)
    y = function(x)
    (first,) = torch.autograd.grad((y * y if square else y).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"create_graph=True.*torch\.func"):
        first.square().sum().backward()


def test_one_derivative_may_be_asked_for_with_a_graph():
    layer, x = make_linear(), torch.randn(5, 6)
    layer(x).square().sum().backward(create_graph=True)
    kept = layer.c.grad.clone()
    layer.c.grad = None
    layer(x).square().sum().backward()
    assert torch.equal(kept, layer.c.grad)


@pytest.mark.parametrize("plan", ["effective", "beside"])
def test_compiled_without_autograd_of_its_own_and_under_torch_func(plan):
    torch._dynamo.reset()
    layer, x = make_linear(plan).double(), torch.randn(5, 6, dtype=torch.float64, requires_grad=True)

    def penalty(function, c):
        (first,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), c)[0]

    def plain(x, c=layer.c):
        return linear(x, layer.weight + layer.scale * layer.U @ c @ layer.V.t(), layer.bias)

    wanted = penalty(plain, layer.c)
    torch.testing.assert_close(penalty(torch.compile(layer, backend="eager"), layer.c), wanted)

    def inner(c):
        return grad(lambda x: functional_call(layer, {"core.c": c}, (x,)).square().sum())(x.detach()).square().sum()

    torch.testing.assert_close(grad(inner)(layer.c.detach()), wanted)
