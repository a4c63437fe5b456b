"""PiSSA against PEFT's own on Linear, and against its definition on Conv2d and narrow modules."""

from __future__ import annotations

import pytest
import torch
from adapters.models import outputs
from peft import LoraConfig, get_peft_model
from torch import nn

from subspace3d.adapters.methods import apply_method
from subspace3d.adapters.pissa import start_factors
from subspace3d.adapters.spectral import leading_directions, singular_basis


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.fc = nn.Linear(8, 12)
        self.out = nn.Linear(12, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.fc(self.conv(x).tanh().mean((-2, -1))).tanh())


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def test_linear_starts_as_in_peft() -> None:
    ours = apply_method(net(), "pissa", rank=4, targets="fc").get_submodule("base_model.model.fc")
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["fc"], init_lora_weights="pissa")
    theirs = get_peft_model(net(), config).get_submodule("base_model.model.fc")
    torch.testing.assert_close(ours.base_layer.weight, theirs.base_layer.weight)
    a, their_a = (layer.lora_A["default"].weight for layer in (ours, theirs))
    b, their_b = (layer.lora_B["default"].weight for layer in (ours, theirs))
    # the sign of a pair of singular vectors is free
    signs = (b * their_b).sum(0).sign()
    torch.testing.assert_close(a * signs[:, None], their_a, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(b * signs, their_b, rtol=1e-4, atol=1e-5)


def test_convolutions_and_narrow_modules_start_at_the_weight() -> None:
    x = torch.rand(2, 3, 9, 9)
    before = outputs(net(), x)
    tuned = apply_method(net(), "pissa", rank=4, targets="conv|fc|out")
    torch.testing.assert_close(outputs(tuned, x), before)
    conv = tuned.get_submodule("base_model.model.conv")
    a, b = conv.lora_A["default"].weight, conv.lora_B["default"].weight
    assert a.shape == (4, 3, 3, 3) and b.shape == (8, 4, 1, 1)
    left, values, right = torch.linalg.svd(net().conv.weight.flatten(1), full_matrices=False)
    leading = left[:, :4] * values[:4] @ right[:4]
    torch.testing.assert_close(2 * b.flatten(1) @ a.flatten(1), leading, rtol=1e-4, atol=1e-6)
    residual = net().conv.weight - leading.view(8, 3, 3, 3)
    torch.testing.assert_close(conv.base_layer.weight, residual, rtol=1e-4, atol=1e-6)
    # two outputs cannot hold four directions: the others wait at zero and can still be trained
    narrow = tuned.get_submodule("base_model.model.out")
    assert narrow.lora_A["default"].weight.shape == (4, 12)
    assert not narrow.lora_B["default"].weight[:, 2:].any() and narrow.lora_A["default"].weight[2:].any()
    torch.testing.assert_close(narrow.base_layer.weight, torch.zeros(2, 12), rtol=0, atol=1e-6)
    start = start_factors(conv)
    assert start is not None and torch.equal(start[0], b.flatten(1)) and torch.equal(start[1], a.flatten(1))
    assert start_factors(net().fc) is None
    assert not [name for name in tuned.state_dict() if "pissa" in name]


def test_half_precision_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pissa needs float32 weights, base_model.model.fc has torch.bfloat16"):
        apply_method(net().bfloat16(), "pissa", rank=2, targets="fc")


def test_leading_directions() -> None:
    weight = torch.randn(6, 2, 2, 2)
    for matrix in (weight, weight.flatten(1).T, torch.zeros(6, 8), weight.flatten(1)[:, :1] * torch.ones(6, 8)):
        u, values, v = leading_directions(matrix, 6)
        torch.testing.assert_close(u * values @ v.T, matrix.flatten(1), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(values, torch.linalg.svdvals(matrix.flatten(1)), rtol=1e-5, atol=1e-5)
        for side in (u, v):
            torch.testing.assert_close(side.T @ side, torch.eye(6), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match=r"k must be in 1\.\.6 for a weight \[6, 8\], got 7"):
        leading_directions(weight, 7)
    model = net()
    (u, v), weight = singular_basis(model, ["conv"], 3)["conv"], model.conv.weight.detach().flatten(1)
    best = u @ (u.T @ weight @ v) @ v.T
    tail = torch.linalg.svdvals(weight)[3:]
    # the error of the best rank-3 matrix is what is left of the spectrum
    assert float((weight - best).norm()) == pytest.approx(float(tail.norm()), rel=1e-5)
    with pytest.raises(ValueError, match="K must be at least 1 for the method psv, got 0"):
        singular_basis(model, ["conv"], 0)
