"""Base layers of every kind: what a core beside them gives, trains and merges, against the formula."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.functional import linear
from torch.nn.utils import parametrize

from subspace_ext import SubspaceConv2d, SubspaceLinear, core
from subspace_ext.ops import lora
from subspace_ext.ops.lora import lora_conv2d, lora_linear
from subspace_ext.ops.lora_ref import lora_conv2d_ref, lora_linear_ref

IN, OUT, K, SCALE = 64, 48, 4, 0.5
PLANS = ("auto", "effective", "beside")


def bases():
    return torch.randn(OUT, K), torch.randn(IN, K)


def with_core(base, plan="auto"):
    layer = SubspaceLinear.from_linear(base, *bases(), SCALE, plan).train()
    nn.init.normal_(layer.c, std=0.1)
    return layer


def update_of(layer, x):
    """s ((x V) c^T) U^T in the dtype of x, differentiated by autograd."""
    U, c, V = (tensor.to(x.dtype) for tensor in (layer.U, layer.c, layer.V))
    return layer.scale * ((x @ V) @ c.t()) @ U.t()


class MaskedBias(nn.Linear):
    """The bias of a part of the outputs is left out, as that of the keys in some attention layers."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("mask", (torch.arange(sizes[1]) < sizes[1] // 3).float())

    def forward(self, x):
        return linear(x, self.weight, self.bias * self.mask)


def hooked():
    base = nn.Linear(IN, OUT)
    base.register_forward_hook(lambda module, args, y: 2 * y + 1)
    return base


def pre_hooked():
    base = nn.Linear(IN, OUT)
    base.register_forward_pre_hook(lambda module, args: (args[0].tanh(),))
    return base


def weight_normed():
    return nn.utils.parametrizations.weight_norm(nn.Linear(IN, OUT))


def weight_normed_by_hook():
    return nn.utils.weight_norm(nn.Linear(IN, OUT))


class Symmetric(nn.Module):
    def forward(self, w):
        return w.tanh()


def parametrized_bias():
    base = nn.Linear(IN, OUT)
    parametrize.register_parametrization(base, "bias", Symmetric())
    return base


def patched():
    base = nn.Linear(IN, OUT)
    base.forward = lambda x: linear(x, base.weight)
    return base


KINDS = {
    "masked_bias": lambda: MaskedBias(IN, OUT),
    "forward_hook": hooked,
    "forward_pre_hook": pre_hooked,
    "weight_norm": weight_normed,
    "weight_norm_by_hook": weight_normed_by_hook,
    "parametrized_bias": parametrized_bias,
    "patched_forward": patched,
    "plain": lambda: nn.Linear(IN, OUT),
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_base_layer_runs_as_it_is(kind, plan):
    base = KINDS[kind]()
    layer, x = with_core(base, plan), torch.randn(3, 80, IN, requires_grad=True)
    for mode in (True, False):
        expected = base.train(mode)(x) + update_of(layer, x)
        torch.testing.assert_close(layer.train(mode)(x), expected, rtol=1e-4, atol=1e-4)
    dy = torch.randn(3, 80, OUT)
    ours = torch.autograd.grad(layer.train()(x), (x, layer.c), dy)
    wanted = torch.autograd.grad(base(x) + update_of(layer, x), (x, layer.c), dy)
    for result, exact in zip(ours, wanted):
        torch.testing.assert_close(result, exact, rtol=1e-3, atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), (base(x) + update_of(layer, x)).float(), rtol=3e-2, atol=3e-2)


def test_a_base_of_its_own_kind_compiles_to_one_graph():
    layer, x = with_core(MaskedBias(IN, OUT)), torch.randn(80, IN)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)


def test_a_hook_may_come_and_go():
    layer, x = with_core(nn.Linear(IN, OUT), "effective"), torch.randn(80, IN)
    plain = layer(x)
    handle = layer.base_layer.register_forward_hook(lambda module, args, y: -y)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + update_of(layer, x))
    handle.remove()
    assert torch.equal(layer(x), plain)


def test_convolutions_run_as_they_are():
    class Doubled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    for base in (
        Doubled(3, 8, 3, padding=1, stride=2),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")),
        nn.Conv2d(3, 8, 3, padding="same", dilation=2),
    ):
        layer = SubspaceConv2d.from_conv(base, torch.randn(8, K), torch.randn(27, K), SCALE).train()
        nn.init.normal_(layer.c, std=0.1)
        x = torch.randn(2, 3, 9, 8, requires_grad=True)
        plain = nn.Conv2d(3, 8, 3, base.stride, base.padding, base.dilation, bias=False, padding_mode=base.padding_mode)

        def expected(layer=layer, base=base, plain=plain, x=x):
            update = (layer.scale * layer.U @ layer.c @ layer.V.t()).view(8, 3, 3, 3)
            return base(x) + torch.func.functional_call(plain, {"weight": update}, x)

        y = layer(x)
        torch.testing.assert_close(y, expected(), rtol=1e-4, atol=1e-4)
        dy = torch.randn_like(y)
        for ours, wanted in zip(*(torch.autograd.grad(out, (x, layer.c), dy) for out in (y, expected()))):
            torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(layer(x[0]), y[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("trained", [("bias",), ("weight", "bias")], ids=str)
def test_weight_and_bias_train_beside_the_core(plan, trained):
    layer, x = with_core(nn.Linear(IN, OUT), plan), torch.randn(80, IN)
    layer(x)
    for name in trained:
        getattr(layer, name).requires_grad_(True)
    leaves = [layer.c, *(getattr(layer, name) for name in trained)]
    ours = torch.autograd.grad(layer(x).square().sum(), leaves)
    wanted = torch.autograd.grad((layer.base_layer(x) + update_of(layer, x)).square().sum(), leaves)
    for result, exact in zip(ours, wanted):
        torch.testing.assert_close(result, exact, rtol=1e-3, atol=1e-2)
    optimizer = torch.optim.SGD(leaves, 1e-3)
    for leaf, gradient in zip(leaves, ours):
        leaf.grad = gradient
    optimizer.step()
    torch.testing.assert_close(layer(x), layer.base_layer(x) + update_of(layer, x), rtol=1e-4, atol=1e-4)


def test_weights_in_float8_are_refused_where_nothing_reads_them():
    base = nn.Linear(IN, OUT).requires_grad_(False)
    base.weight = nn.Parameter(base.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match=r"weight must be float16.*got torch\.float8_e4m3fn"):
        SubspaceLinear.from_linear(base, *bases())

    class Float8(nn.Linear):
        def forward(self, x):
            return linear(x, self.weight.to(x.dtype), self.bias)

    own = Float8(IN, OUT).requires_grad_(False)
    own.weight = nn.Parameter(base.weight, requires_grad=False)
    layer, x = with_core(own), torch.randn(80, IN)
    torch.testing.assert_close(layer(x), own(x) + update_of(layer, x), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"must be stored in float16.*got torch\.float8_e4m3fn in a Parameter"):
        layer.merge()


@pytest.mark.parametrize("kind", ["masked_bias", "parametrized_bias", "plain"])
def test_merging_into_bases_that_act_as_a_plain_layer(kind):
    layer, x = with_core(KINDS[kind]()), torch.randn(80, IN)
    before, base = layer(x), layer.base_layer
    weight = base.weight.clone()
    torch.testing.assert_close(layer.merge()(x), before, rtol=1e-4, atol=1e-4)
    assert torch.equal(base.weight, weight) and type(layer.base_layer) is type(base)
    assert layer.unmerge().base_layer is base
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("forward_hook", "must add x w"),
        ("forward_pre_hook", "must add x w"),
        ("patched_forward", "must add x w"),
        ("weight_norm", "it is computed from others"),
        ("weight_norm_by_hook", "it is computed from others"),
    ],
)
def test_merging_is_refused_where_it_would_change_the_result(kind, reason):
    layer, x = with_core(KINDS[kind]()), torch.randn(80, IN)
    before = layer(x)
    with pytest.raises(ValueError, match=reason):
        layer.merge()
    assert torch.equal(layer(x), before) and not layer.merged


def test_tied_weights_and_shared_layers_keep_their_other_use():
    first, second = nn.Linear(IN, OUT, bias=False), nn.Linear(IN, OUT, bias=False)
    second.weight = first.weight
    layer, x = with_core(first), torch.randn(80, IN)
    before, other = layer(x), second(x)
    for _ in range(2):
        assert torch.equal(second(x), other) and torch.equal(first(x), other)
        torch.testing.assert_close(layer(x), before, rtol=1e-4, atol=1e-4)
        layer.merge()
    assert layer.unmerge().weight is second.weight


def test_merged_layers_move_and_save_as_unmerged_ones():
    layer, x = with_core(nn.Linear(IN, OUT)), torch.randn(80, IN)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.merge().double()
    assert layer.weight.dtype == torch.float64
    assert all(torch.equal(tensor, state[name].double()) for name, tensor in layer.state_dict().items())
    layer.unmerge()
    assert layer(x.double()).dtype == torch.float64


def test_state_dicts_of_nested_layers():
    """Names inside a model are those of the parameters; those of the plain layer load too."""
    model = nn.Sequential(with_core(nn.Linear(IN, OUT)), nn.ReLU())
    other = nn.Sequential(with_core(nn.Linear(IN, OUT)), nn.ReLU())
    state = model.state_dict()
    assert set(state) == {"0.base_layer.weight", "0.base_layer.bias", "0.core.U", "0.core.V", "0.core.c"}
    other.load_state_dict(state)
    x = torch.randn(80, IN)
    assert torch.equal(other(x), model(x))
    plain = {"0.weight": torch.ones(OUT, IN), "0.bias": torch.zeros(OUT)}
    missing, unexpected = other.load_state_dict({**plain, "0.d": torch.ones(1)}, strict=False)
    assert set(missing) == {"0.core.U", "0.core.V", "0.core.c"} and unexpected == ["0.base_layer.d"]
    assert torch.equal(other[0].weight, plain["0.weight"]) and torch.equal(other[0].c, model[0].c)
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.core\.c"):
        other.load_state_dict({name: tensor for name, tensor in state.items() if name != "0.core.c"})


def test_a_parametrized_core():
    layer, x = with_core(nn.Linear(IN, OUT), "effective"), torch.randn(80, IN)
    parametrize.register_parametrization(layer.core, "c", Symmetric())
    original = layer.core.parametrizations.c.original
    for mode in (True, False):
        layer.train(mode)
        y = layer(x)
        torch.testing.assert_close(y, layer.base_layer(x) + update_of(layer, x), rtol=1e-4, atol=1e-4)
        (ours,) = torch.autograd.grad(y.square().sum(), original)
        (wanted,) = torch.autograd.grad((layer.base_layer(x) + update_of(layer, x)).square().sum(), original)
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-2)
    with torch.no_grad():
        original.add_(1.0)
    torch.testing.assert_close(layer.train()(x), layer.base_layer(x) + update_of(layer, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("plan", PLANS)
def test_inference_mode_before_training(plan):
    layer, x = with_core(nn.Linear(IN, OUT), plan), torch.randn(80, IN)
    for _ in range(2):
        with torch.inference_mode():
            inferred = layer(x)
        y = layer(x)
        y.sum().backward()
        torch.testing.assert_close(inferred, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plan", PLANS)
def test_transforms_of_torch_func(plan):
    layer, x = with_core(nn.Linear(IN, OUT), plan), torch.randn(80, IN)
    layer(x)

    def loss(c, rows):
        return torch.func.functional_call(layer, {"core.c": c}, rows).square().sum()

    c = layer.c.detach()
    (wanted,) = torch.autograd.grad(layer(x).square().sum(), layer.c)
    torch.testing.assert_close(torch.func.grad(loss)(c, x), wanted, rtol=1e-3, atol=1e-2)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(c, x)
    torch.testing.assert_close(each.sum(0), wanted, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [nn.Linear, MaskedBias])
def test_a_core_left_on_the_meta_device_is_named(kind, training):
    """As tools do that keep weights elsewhere until a module is called; torch adds whatever lies at address zero."""
    for layer, x in (
        (with_core(kind(IN, OUT)), torch.randn(80, IN)),
        (SubspaceConv2d.from_conv(nn.Conv2d(1, 3, 3), torch.randn(3, 2), torch.randn(9, 2)), torch.randn(1, 1, 5, 5)),
    ):
        layer.train(training)(x)
        layer.core.c = nn.Parameter(layer.c.detach().to("meta"))
        with pytest.raises(ValueError, match=r"c must be on the device of .*, cpu, got meta"):
            layer(x)
        layer.core.requires_grad_(False)
        with pytest.raises(ValueError, match=r"c must be on the device of .*, cpu, got meta"):
            layer(x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("plan", PLANS)
def test_forward_mode_differentiation(plan, training):
    layer, x = with_core(nn.Linear(IN, OUT), plan).train(training), torch.randn(80, IN)
    layer(x)
    dx, dc = torch.randn_like(x), torch.randn_like(layer.c)
    with torch.no_grad(), forward_ad.dual_level():
        duals = forward_ad.make_dual(x, dx), forward_ad.make_dual(layer.c.detach(), dc)
        y = torch.func.functional_call(layer, {"core.c": duals[1]}, duals[0])
        tangent = forward_ad.unpack_dual(y).tangent
        wanted = dx @ layer.core.merged_weight(layer.weight).t() + SCALE * ((x @ layer.V) @ dc.t()) @ layer.U.t()
    torch.testing.assert_close(tangent, wanted, rtol=1e-4, atol=1e-3)


def small_network():
    linear_layer = with_core(nn.Linear(IN, OUT))
    conv = SubspaceConv2d.from_conv(nn.Conv2d(1, 3, 3, padding=1), torch.randn(3, 2), torch.randn(9, 2), SCALE).train()
    nn.init.normal_(conv.c)
    return nn.Sequential(conv, nn.Flatten(0, 1), linear_layer)


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_model_takes_any_batch_and_trains(strict):
    model, image = small_network(), torch.randn(5, 1, 4, IN)
    batch = {0: torch.export.Dim("batch", min=2)}
    exported = torch.export.export(model, (image,), dynamic_shapes=(batch,), strict=strict)
    assert not any("subspace_ext" in str(node.target) for node in exported.graph.nodes)
    module = exported.module()
    for size in (2, 90):
        image = torch.randn(size, 1, 4, IN)
        y, wanted = module(image), model(image)
        torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-3)
    y.square().sum().backward()
    wanted.square().sum().backward()
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert list(gradients) == ["0.core.c", "2.core.c"]
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-4, atol=1e-2)


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("training", [True, False])
def test_a_traced_model_reads_its_cores(training):
    model = small_network().train(training)
    traced = torch.jit.trace(model, torch.randn(30, 1, 4, IN))
    with torch.no_grad():
        model[0].c.add_(1.0)
    image = torch.randn(40, 1, 4, IN)
    torch.testing.assert_close(traced(image), model(image), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("readable", [True, False], ids=["compared", "not_compared"])
def test_a_hand_written_optimiser_learns(readable, monkeypatch):
    """Steps through `.data` raise no counter. Where the core cannot be compared, as on a GPU, nothing outlives them."""
    layer, x = with_core(nn.Linear(IN, OUT), "effective"), torch.randn(80, IN)
    if not readable:
        keep = core._Kept.__init__

        def keep_without_values(kept, *arguments):
            keep(kept, *arguments)
            kept.core = None

        monkeypatch.setattr(core._Kept, "__init__", keep_without_values)
    for _ in range(3):
        y = layer(x)
        torch.testing.assert_close(y, layer.base_layer(x) + update_of(layer, x), rtol=1e-4, atol=1e-4)
        layer.c.grad = None
        y.square().mean().backward()
        layer.c.data -= 0.1 * layer.c.grad.data
        with torch.no_grad():
            torch.testing.assert_close(layer(x), layer.base_layer(x) + update_of(layer, x), rtol=1e-4, atol=1e-4)
    layer(x)
    if readable:
        layer.c.data.add_(1.0)
        torch.testing.assert_close(layer(x), layer.base_layer(x) + update_of(layer, x), rtol=1e-4, atol=1e-4)


def test_multihead_attention_is_refused():
    attention = nn.MultiheadAttention(8, 2)
    with pytest.raises(ValueError, match=r"must not be the out_proj of a torch\.nn\.MultiheadAttention"):
        SubspaceLinear.from_linear(attention.out_proj, torch.randn(8, 2), torch.randn(8, 2))


def test_transformer_encoder_layers_see_their_cores_in_every_mode():
    """In eval mode they take a path that reads the weights of their linears; not where these have cores."""
    encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    x = torch.randn(2, 5, 16)
    plain = encoder.eval()(x)
    encoder.linear1 = SubspaceLinear.from_linear(encoder.linear1, torch.randn(32, K), torch.randn(16, K))
    nn.init.normal_(encoder.linear1.c)
    trained = encoder.train()(x)
    with torch.inference_mode():
        torch.testing.assert_close(encoder.eval()(x), trained)
    assert not torch.allclose(trained, plain, atol=1e-2)


def test_outputs_of_other_shapes_are_refused():
    class Wrong(nn.Linear):
        def forward(self, x):
            return (super().forward(x),)

    with pytest.raises(ValueError, match=r"must return \[\.\.\., out\] = \[5, 48\], got tuple"):
        with_core(Wrong(IN, OUT))(torch.randn(5, IN))


def test_nothing_is_hooked_before_the_first_layer():
    import subprocess
    import sys

    code = (
        "import torch, subspace_ext\n"
        "from torch.optim import optimizer\n"
        "hooks = optimizer._global_optimizer_post_hooks\n"
        "assert not hooks\n"
        "linear = torch.nn.Linear(4, 4)\n"
        "for _ in range(2): subspace_ext.SubspaceLinear.from_linear(linear, torch.ones(4, 2), torch.ones(4, 2))\n"
        "assert len(hooks) == 1\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("leading", [(37,), (2, 3), (0,)], ids=str)
def test_lora_linear_equals_its_reference(leading, dtype):
    x, w, bias = torch.randn(*leading, 17).to(dtype).requires_grad_(), torch.randn(9, 17), torch.randn(9)
    a, b = torch.randn(3, 17, requires_grad=True), torch.randn(9, 3, requires_grad=True)
    dy = torch.randn(*leading, 9).to(dtype)
    results = []
    for function in (lora_linear, lora_linear_ref):
        y = function(x, w, bias, a, b, 0.5)
        results.append((y, *torch.autograd.grad(y, (x, a, b), dy)))
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 0.2}
    for ours, wanted in zip(*results):
        torch.testing.assert_close(ours, wanted, **close)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["rows", "channels_last"])
@pytest.mark.parametrize("low_rank", [False, True], ids=["whole", "low_rank"])
@pytest.mark.parametrize("kernel", [(3, 2), (1, 1)], ids=str)
@pytest.mark.parametrize(
    "geometry", [((1, 1), (0, 0), (1, 1)), ((1, 1), (2, 1), (2, 1)), ((2, 1), (0, 0), (1, 2))], ids=str
)
def test_lora_conv2d_equals_its_reference(geometry, kernel, low_rank, layout, monkeypatch):
    monkeypatch.setattr(lora, "_SMALL_PRODUCTS", 0 if low_rank else 2**60)
    monkeypatch.setattr(lora, "_PRODUCTS_PER_COPY", 0)
    out = 9
    x = torch.randn(2, 3, 9, 8).to(memory_format=layout).requires_grad_()
    w, bias = torch.randn(out, 3, *kernel), torch.randn(out)
    a, b = torch.randn(4, 3, *kernel, requires_grad=True), torch.randn(out, 4, 1, 1, requires_grad=True)
    results = []
    for function in (lora_conv2d, lora_conv2d_ref):
        y = function(x, w, bias, a, b, 0.5, geometry)
        generator = torch.Generator().manual_seed(0)
        dy = torch.randn(y.shape, generator=generator)
        results.append((y, *torch.autograd.grad(y, (x, a, b), dy)))
    assert results[0][0].is_contiguous(memory_format=layout)
    for ours, wanted in zip(*results):
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-3)
    (only_a,) = torch.autograd.grad(lora_conv2d(x, w, bias, a, b.detach(), 0.5, geometry).square().sum(), a)
    (wanted,) = torch.autograd.grad(lora_conv2d_ref(x, w, bias, a, b.detach(), 0.5, geometry).square().sum(), a)
    torch.testing.assert_close(only_a, wanted, rtol=1e-3, atol=1e-2)
