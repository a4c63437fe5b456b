"""subspace_linear: values, gradients, what it saves, how it is registered, what it refuses."""

import pytest
import torch
from tolerances import assert_as_exact_as_torch, relative_error
from torch import Tensor
from torch.nn.functional import linear

from subspace_ext import subspace_linear
from subspace_ext.ops.effective_weight import effective_weight
from subspace_ext.ops.subspace_linear import choose_effective
from subspace_ext.ops.subspace_linear_ref import subspace_linear_ref

SCALE = 0.7


def make(tokens=(37,), in_size=24, out_size=40, rank=8, dtype=torch.float32, bias=True) -> list[Tensor | None]:
    """[x, w, bias, U, c, V] with an update of about the size of the weight; x and c want gradients."""
    x = torch.randn(*tokens, in_size, dtype=dtype)
    w = torch.randn(out_size, in_size, dtype=dtype) * in_size**-0.5
    U = torch.linalg.qr(torch.randn(out_size, rank, dtype=torch.float64)).Q.to(dtype)
    V = torch.linalg.qr(torch.randn(in_size, rank, dtype=torch.float64)).Q.to(dtype)
    c = torch.randn(rank, rank, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return [
        x.requires_grad_(),
        w,
        torch.randn(out_size, dtype=dtype) if bias else None,
        U,
        c.requires_grad_(),
        V,
    ]


def copies(tensors, dtype=None):
    """Fresh leaves with the same values, in `dtype` where given."""
    return [
        None if t is None else t.detach().clone().to(dtype or t.dtype).requires_grad_(t.requires_grad) for t in tensors
    ]


def gradients(function, arguments, dy, **options):
    """(y, dx, dc) of function(*arguments, SCALE)."""
    y = function(*arguments, SCALE, **options)
    return (y, *torch.autograd.grad(y, (arguments[0], arguments[4]), dy.to(y.dtype)))


def eager_low_rank(x, w, bias, U, c, V, scale):
    """The chain as a user would write it, in the dtype of x."""
    return linear(x, w, bias) + scale * (((x @ V) @ c.to(x.dtype).t()) @ U.t())


@pytest.mark.parametrize("plan", ["effective", "beside"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize(
    ("tokens", "in_size", "out_size", "rank"),
    [((37,), 24, 40, 8), ((2, 3, 5), 17, 9, 3), ((1,), 7, 5, 1), ((), 6, 8, 2), ((65,), 64, 64, 32)],
    ids=["T37", "T2x3x5_odd", "T1_K1", "no_leading_axis", "T65_K32"],
)
def test_values_and_gradients(plan, dtype, bias, tokens, in_size, out_size, rank):
    arguments = make(tokens, in_size, out_size, rank, dtype, bias)
    dy = torch.randn(*tokens, out_size, dtype=dtype)
    ours = gradients(subspace_linear, copies(arguments), dy, plan=plan)
    torchs = gradients(eager_low_rank, copies(arguments), dy)
    exact = gradients(subspace_linear_ref, copies(arguments, torch.float64), dy.double())
    for name, result, plain, wanted in zip(("y", "dx", "dc"), ours, torchs, exact):
        if dtype == torch.float64:
            assert relative_error(result, wanted) < 1e-14, name
        else:
            assert_as_exact_as_torch(result, plain, wanted, name, dtype)


@pytest.mark.parametrize("plan", ["effective", "beside"])
def test_gradcheck(plan):
    x, w, bias, U, c, V = make((5,), 6, 7, 3, torch.float64)
    assert torch.autograd.gradcheck(lambda x, c: subspace_linear(x, w, bias, U, c, V, SCALE, plan), (x, c))


@pytest.mark.parametrize("effective", [True, False], ids=["effective", "beside"])
def test_library_op_gradients_of_both_orders(effective):
    x, w, bias, U, c, V = make((4,), 5, 6, 3, torch.float64)

    def library(x, c):
        return torch.ops.subspace_ext.subspace_linear(x, w, bias, U, c, V, SCALE, effective, True)[0]

    assert torch.autograd.gradcheck(library, (x, c))
    assert torch.autograd.gradgradcheck(library, (x, c))


@pytest.mark.parametrize("effective", [True, False], ids=["effective", "beside"])
@pytest.mark.parametrize("project", [True, False], ids=["core_trained", "core_frozen"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_opcheck(effective, project, bias):
    x, w, b, U, c, V = make((2, 5), 6, 7, 3, bias=bias)
    arguments = (x, w, b, U, c.requires_grad_(project), V, SCALE, effective, project)
    torch.library.opcheck(torch.ops.subspace_ext.subspace_linear.default, arguments)


def test_opcheck_of_the_effective_weight():
    _, w, _, U, c, V = make()
    torch.library.opcheck(torch.ops.subspace_ext.effective_weight.default, (w, U, c, V, SCALE, torch.bfloat16))


@pytest.mark.parametrize("plan", ["effective", "beside", "auto"])
def test_compile_traces_one_graph(plan):
    def layer(x, w, bias, U, c, V):
        return subspace_linear(x * 2, w, bias, U, c, V, SCALE, plan).relu()

    arguments = make((2, 19))
    dy = torch.randn(2, 19, 40)
    results = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        leaves = copies(arguments)
        y = function(*leaves)
        results.append((y, *torch.autograd.grad(y, (leaves[0], leaves[4]), dy)))
    for eager, compiled in zip(*results):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.slow
def test_compile_with_the_default_backend():
    arguments = make()
    compiled = torch.compile(subspace_linear, fullgraph=True)(*arguments, SCALE)
    torch.testing.assert_close(compiled, subspace_linear(*arguments, SCALE))


def test_compile_under_autocast():
    arguments = make((50,))

    def layer(x, w, bias, U, c, V):
        with torch.autocast("cpu", torch.bfloat16):
            return subspace_linear(x, w, bias, U, c, V, SCALE)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(*arguments)
    assert compiled.dtype == torch.bfloat16
    torch.testing.assert_close(compiled, layer(*arguments))


def saved_shapes(function, tokens):
    """Shapes with `tokens` rows that autograd keeps while `function` runs."""
    shapes = []

    def pack(tensor):
        if tokens in tensor.shape:
            shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return shapes


@pytest.mark.parametrize("plan", ["effective", "beside"])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "library"])
def test_only_the_projection_is_saved(plan, autocast, compiled):
    x, w, bias, U, c, V = make((101,))

    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if compiled:
                return torch.ops.subspace_ext.subspace_linear(x, w, bias, U, c, V, SCALE, plan == "effective", True)
            return subspace_linear(x, w, bias, U, c, V, SCALE, plan)

    assert saved_shapes(run, 101) == [(101, 8)]
    c.requires_grad_(False)
    if not compiled:
        assert saved_shapes(run, 101) == []


@pytest.mark.parametrize("plan", ["effective", "beside"])
def test_no_tokens(plan):
    arguments = make((0,))
    y, dx, dc = gradients(subspace_linear, arguments, torch.zeros(0, 40), plan=plan)
    assert y.shape == (0, 40) and dx.shape == (0, 24) and not dc.any()
    assert subspace_linear(*make((3, 0, 2)), SCALE, plan=plan).shape == (3, 0, 2, 40)


@pytest.mark.parametrize("plan", ["effective", "beside"])
def test_non_contiguous_inputs(plan):
    arguments = make((6, 5))
    expected = gradients(subspace_linear, copies(arguments), torch.ones(6, 5, 40), plan=plan)
    leaves = copies(arguments)
    strided = [None if t is None else torch.stack([t.detach(), t.detach()], dim=-1)[..., 0] for t in leaves]
    strided[1] = leaves[1].t().contiguous().t()
    strided[0] = leaves[0].detach().transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided[0].is_contiguous() and not strided[4].is_contiguous()
    strided[0].requires_grad_()
    strided[4].requires_grad_()
    dy = torch.ones(1, 1, 40).expand(6, 5, 40)
    for result, wanted in zip(gradients(subspace_linear, strided, dy, plan=plan), expected):
        torch.testing.assert_close(result, wanted)


def test_only_one_gradient_wanted():
    x, w, bias, U, c, V = make()
    for plan in ("effective", "beside"):
        y = subspace_linear(x, w, bias, U, c.detach(), V, SCALE, plan)
        assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape
        y = subspace_linear(x.detach(), w, bias, U, c, V, SCALE, plan)
        assert torch.autograd.grad(y.sum(), c)[0].shape == c.shape
    assert not subspace_linear(x.detach(), w, bias, U, c.detach(), V).requires_grad
    with torch.no_grad():
        assert not subspace_linear(x, w, bias, U, c, V).requires_grad


@pytest.mark.parametrize("plan", ["effective", "beside"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_as_linear_does(plan, dtype):
    arguments = make((64,), 64, 48, 8)
    exact = subspace_linear_ref(*copies(arguments, torch.float64), SCALE)
    with torch.autocast("cpu", dtype):
        ours = subspace_linear(*arguments, SCALE, plan=plan)
        frozen = linear(*arguments[:3])
        chain = eager_low_rank(*arguments, SCALE)
    assert ours.dtype == frozen.dtype == dtype
    assert_as_exact_as_torch(ours, chain, exact, "y")
    dx, dc = torch.autograd.grad(ours.sum(), (arguments[0], arguments[4]))
    assert dx.dtype == dc.dtype == torch.float32
    doubles = make((3,), dtype=torch.float64)
    with torch.autocast("cpu", dtype):
        assert subspace_linear(*doubles).dtype == linear(*doubles[:3]).dtype == torch.float64


@pytest.mark.parametrize("plan", ["effective", "beside"])
def test_a_zero_core_changes_nothing(plan):
    x, w, bias, U, c, V = make((64,))
    assert torch.equal(subspace_linear(x, w, bias, U, c.detach() * 0, V, SCALE, plan), linear(x, w, bias))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(subspace_linear(x, w, bias, U, c.detach() * 0, V, SCALE, plan), linear(x, w, bias))


def test_effective_weights_from_float32_keep_small_updates():
    """An update of relative size 1e-3 is below half a bfloat16 step; added before the one rounding it survives."""
    _, w, _, U, c, V = make((1,), 512, 512, 32)
    update = U @ c.detach() @ V.t()
    update *= 1e-3 * w.norm() / update.norm()
    core = U.t() @ update @ V
    change = effective_weight(w, U, core, V, 1.0, torch.bfloat16).double() - w.bfloat16().double()
    gain = (change * update).sum() / update.double().square().sum()
    assert abs(gain - 1) < 0.1
    assert choose_effective("auto", 10_000, w) and not choose_effective("auto", 10_000, w.bfloat16())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(3, 5)}, r"x must be \[..., in\] with in = 6, got shape \(3, 5\)"),
        ({"x": torch.ones(3, 6, dtype=torch.int64)}, "x must have a floating dtype, got torch.int64"),
        ({"x": torch.ones(3, 6, dtype=torch.float64)}, "w must have the dtype of x, torch.float64"),
        ({"w": torch.ones(7)}, r"w must be \[out, in\], got shape \(7,\)"),
        ({"w": torch.ones(7, 6, requires_grad=True)}, "w must be frozen"),
        ({"bias": torch.ones(6)}, r"bias must be \[out\] = \[7\], got shape \(6,\)"),
        ({"bias": torch.ones(7, dtype=torch.float16)}, "bias must have the dtype of x"),
        ({"bias": torch.ones(7, requires_grad=True)}, "bias must be frozen"),
        ({"U": torch.ones(6, 2)}, r"U must be \[out, K\] with out = 7, got shape \(6, 2\)"),
        ({"U": torch.ones(7, 2, requires_grad=True)}, "U must be frozen"),
        ({"c": torch.ones(2, 3)}, r"c must be \[K, K\] = \[2, 2\] to match w and U, got shape \(2, 3\)"),
        ({"c": torch.ones(2, 2, dtype=torch.bfloat16)}, "c must have the dtype of x, torch.float32, or torch.float32"),
        ({"V": torch.ones(6, 3)}, r"V must be \[in, K\] = \[6, 2\] to match w and U, got shape \(6, 3\)"),
        ({"V": torch.ones(6, 2, device="meta")}, "V must be on the device of w, cpu, got meta"),
        ({"x": torch.ones(3, 6, device="meta")}, "x must be on the device of w, cpu, got meta"),
        ({"plan": "fast"}, "plan must be one of auto, effective, beside, got 'fast'"),
    ],
)
def test_bad_arguments_are_named(change, message):
    good = {
        "x": torch.ones(3, 6),
        "w": torch.ones(7, 6),
        "bias": torch.ones(7),
        "U": torch.ones(7, 2),
        "c": torch.ones(2, 2),
        "V": torch.ones(6, 2),
    }
    with pytest.raises(ValueError, match=message):
        subspace_linear(**(good | change))


def test_former_names_of_the_plans_still_stand_for_them():
    arguments = [t if t is None else t.detach() for t in make((64,))]
    for former, now in (("fold", "effective"), ("factored", "beside")):
        with pytest.warns(DeprecationWarning, match=f"plan '{former}' is now called '{now}'"):
            y = subspace_linear(*arguments, SCALE, former)
        assert torch.equal(y, subspace_linear(*arguments, SCALE, now))
