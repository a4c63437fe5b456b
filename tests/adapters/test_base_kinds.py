"""Cores on bases of every kind give what stock PEFT LoRA with the same update gives; what cannot is refused by name."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import linear

from subspace3d.adapters import SubspaceConfig
from subspace3d.adapters.basis import Basis

IN, OUT, K, SCALE = 64, 128, 4, 2.0


class Net(nn.Module):
    def __init__(self, fc: nn.Module) -> None:
        super().__init__()
        self.fc = fc

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


class MaskedBias(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias * (torch.arange(len(self.bias)) < 9))


def eight_bit() -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    plain = nn.Linear(IN, OUT)
    layer = bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False)
    layer.load_state_dict(plain.state_dict())
    return layer.to("cpu")


def four_bit() -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(IN, OUT, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict(nn.Linear(IN, OUT).state_dict())
    return layer.to("cpu")


def hooked() -> nn.Module:
    layer = nn.Linear(IN, OUT)
    layer.register_forward_hook(lambda module, args, y: y + 1)
    return layer


def half() -> nn.Module:
    return nn.Linear(IN, OUT).bfloat16()


KINDS: dict[str, Callable[[], nn.Module]] = {
    "Linear8bitLt": eight_bit,
    "Linear4bit": four_bit,
    "own_forward": lambda: MaskedBias(IN, OUT),
    "hooked": hooked,
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(IN, OUT)),
    "bfloat16": half,
    "plain": lambda: nn.Linear(IN, OUT),
}


@pytest.fixture
def basis() -> Basis:
    return {"fc": (torch.linalg.qr(torch.randn(OUT, K)).Q, torch.linalg.qr(torch.randn(IN, K)).Q)}


def both(fc: nn.Module, basis: Basis, plan: str = "auto") -> tuple[nn.Module, nn.Module]:
    """The net with a core, and with the LoRA of the same update: B = U c, A = V^T, alpha / r = s."""
    stock = get_peft_model(Net(copy.deepcopy(fc)), LoraConfig(r=K, lora_alpha=int(SCALE * K), target_modules=["fc"]))
    ours = get_peft_model(Net(fc), SubspaceConfig.from_basis(basis, scale=SCALE, plan=plan))
    core = ours.get_submodule("base_model.model.fc").subspace_core["default"]
    lora = stock.get_submodule("base_model.model.fc")
    U, V = basis["fc"]
    with torch.no_grad():
        core.c.copy_(torch.randn(K, K))
        lora.lora_B["default"].weight.copy_(U @ core.c)
        lora.lora_A["default"].weight.copy_(V.T)
    return ours, stock


@pytest.mark.parametrize("plan", ["auto", "effective", "beside"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_stock_lora(kind: str, plan: str, basis: Basis) -> None:
    ours, stock = both(KINDS[kind](), basis, plan)
    layer, lora = ours.get_submodule("base_model.model.fc"), stock.get_submodule("base_model.model.fc")
    assert (layer.in_features, layer.out_features) == (IN, OUT)
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    for autocast in (False, True):
        x = torch.randn(3, 50, IN, dtype=dtype, requires_grad=True)
        y, gradients = [], []
        for net in (ours, stock):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*MatMul8bitLt.*")
                y.append(net(x))
            gradients.append(torch.autograd.grad(y[-1].float().square().sum(), (x, *_trained(net))))
        assert y[0].dtype == y[1].dtype and y[0].shape == y[1].shape
        # both round the sum, and what they add, to the dtype of the result
        close = 1e-5 if y[1].dtype == torch.float32 and not autocast else 2e-2
        size = y[1].float().abs().max().item()
        torch.testing.assert_close(y[0].float(), y[1].float(), rtol=0, atol=close * size)
        size = gradients[1][0].float().abs().max().item()
        torch.testing.assert_close(gradients[0][0].float(), gradients[1][0].float(), rtol=0, atol=2 * close * size)
        # of B = U c, dc = U^T dB
        wanted = basis["fc"][0].T @ gradients[1][2]
        torch.testing.assert_close(gradients[0][1], wanted, rtol=0, atol=2 * close * wanted.abs().max().item())
    del layer, lora


def _trained(net: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in net.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("kind", ["Linear8bitLt", "Linear4bit", "weight_norm", "hooked"])
def test_what_cannot_be_merged_into_is_named_before_anything_changes(kind: str, basis: Basis) -> None:
    ours, _ = both(KINDS[kind](), basis)
    if kind == "hooked":
        base = ours.get_submodule("base_model.model.fc.base_layer")
        base.register_forward_hook(lambda module, args, y: 3 * y)
    x = torch.randn(50, IN)
    before = ours(x)
    for merge in (ours.merge_adapter, ours.merge_and_unload):
        with pytest.raises(ValueError, match=r"fc cannot be merged into: "):
            merge()
    assert torch.equal(ours(x), before)


def test_an_own_forward_is_merged_into(basis: Basis) -> None:
    ours, _ = both(MaskedBias(IN, OUT), basis)
    x = torch.randn(50, IN)
    before = ours(x)
    plain = ours.merge_and_unload()
    assert type(plain.fc) is MaskedBias
    torch.testing.assert_close(plain(x), before, rtol=1e-4, atol=1e-4)


class Shared(nn.Module):
    """One linear under two names, another whose weight a third one uses, and an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = self.first
        self.head, self.embed = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.embed.weight = self.head.weight
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x))
        return self.attention(x, x, x)[0] + self.head(self.embed(x).tanh())


def _basis_of(*names: str) -> Basis:
    return {name: (torch.randn(8, 2), torch.randn(8, 2)) for name in names}


def test_modules_with_several_uses_are_refused_by_name() -> None:
    for name, message in (
        ("first", r"target_modules must leave out first: it is one module with second"),
        (
            "attention.out_proj",
            r"target_modules must leave out attention\.out_proj: torch\.nn\.MultiheadAttention reads",
        ),
    ):
        model = Shared()
        with pytest.raises(ValueError, match=message):
            get_peft_model(model, SubspaceConfig.from_basis(_basis_of(name)))
    config = SubspaceConfig.from_basis(_basis_of("head"), lora_modules=["attention.out_proj"])
    with pytest.raises(ValueError, match=r"lora_modules must leave out attention\.out_proj"):
        get_peft_model(Shared(), config)


def test_merging_leaves_the_other_use_of_a_tied_weight_alone() -> None:
    model, x = Shared().eval(), torch.randn(2, 5, 8)
    embed = model.embed
    ours = get_peft_model(model, SubspaceConfig.from_basis(_basis_of("head"))).eval()
    core = ours.get_submodule("base_model.model.head").subspace_core["default"]
    nn.init.normal_(core.c, std=0.1)
    before, weight = ours(x), embed.weight.clone()
    ours.merge_adapter()
    torch.testing.assert_close(ours(x), before, rtol=1e-4, atol=1e-4)
    assert torch.equal(embed.weight, weight)
    ours.unmerge_adapter()
    assert ours.get_submodule("base_model.model.head").base_layer.weight is embed.weight
    plain = ours.merge_and_unload()
    torch.testing.assert_close(plain(x), before, rtol=1e-4, atol=1e-4)


def test_a_transformer_encoder_sees_its_cores_in_eval_mode() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True), 2)
    names = ["layers.0.linear1", "layers.1.linear2"]
    x, mask = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    plain = encoder.eval()(x, src_key_padding_mask=mask)
    ours = get_peft_model(encoder, SubspaceConfig.from_basis(_basis_of(*names)))
    for name in names:
        nn.init.normal_(ours.get_submodule(f"base_model.model.{name}").subspace_core["default"].c)
    trained = ours.train()(x, src_key_padding_mask=mask)
    with torch.no_grad():
        evaluated = ours.eval()(x, src_key_padding_mask=mask)
    torch.testing.assert_close(evaluated[~mask], trained[~mask], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(evaluated[~mask], plain[~mask], atol=1e-2)


def test_weight_and_bias_train_beside_cores(basis: Basis) -> None:
    ours, stock = both(nn.Linear(IN, OUT), basis)
    x = torch.randn(50, IN)
    gradients = []
    for net in (ours, stock):
        base = net.get_submodule("base_model.model.fc.base_layer")
        base.requires_grad_(True)
        net(x).square().sum().backward()
        gradients.append((base.weight.grad, base.bias.grad))
    for mine, theirs in zip(*gradients):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3)


def test_lora_on_a_plain_layer_equals_stock(tmp_path: Path) -> None:
    """The fused LoRA of lora_modules, on a linear and on convolutions, against PEFT's own."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.point = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 6, 1)
            self.fc, self.other = nn.Linear(6, 9), nn.Linear(9, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.other(self.fc(self.point(self.conv(x)).mean((-2, -1))))

    names = ["conv", "point", "fc"]
    base = Both()
    stock = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, lora_alpha=4, target_modules=names))
    config = SubspaceConfig.from_basis(
        {"other": (torch.randn(4, 2), torch.randn(9, 2))}, lora_modules=names, r=2, lora_alpha=4
    )
    ours = get_peft_model(copy.deepcopy(base), config)
    for name in names:
        for side in ("lora_A", "lora_B"):
            key = f"base_model.model.{name}.{side}.default.weight"
            value = torch.randn_like(stock.get_parameter(key))
            for net in (ours, stock):
                net.get_parameter(key).data.copy_(value)
    x = torch.randn(2, 3, 9, 9)
    for autocast in (False, True):
        results = []
        for net in (ours, stock):
            net.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = net(x)
            y.float().square().sum().backward()
            named = dict(net.named_parameters())
            results.append([y, *(named[key].grad for key in named if "lora_" in key)])
        for mine, theirs in zip(*results):
            size = theirs.float().abs().max().item()
            bound = (3e-2 if autocast else 1e-5) * size
            torch.testing.assert_close(mine.float(), theirs.float(), rtol=0, atol=bound)
