"""Adapters of every method as plain LoRA folders: stock PEFT, on the base weights, gives the same outputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapters.models import (
    outputs,
    random_basis,
    relative_difference,
    tiny_vggt,
    train_at_random,
)
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from subspace3d.adapters import SubspaceConfig
from subspace3d.adapters.hooks import method_hook
from subspace3d.adapters.low_rank import adapter_factors
from subspace3d.adapters.methods import apply_method
from subspace3d.adapters.placement import place
from subspace3d.adapters.spectral import singular_basis
from subspace3d.backbones.targets import target_modules, target_regex
from subspace3d.files import read_json
from subspace3d.formats.adapter import read_adapter, write_lora


def _tuned(method: str, head_cores: bool = False) -> PeftModel:
    model, basis = tiny_vggt(), None
    names = place(model, "subspace", head_cores=head_cores).cores
    if method in ("psv", "subspace"):
        basis = singular_basis(model, names, 5) if method == "psv" else random_basis(model, list(names), 5)
    tuned = apply_method(model, method, 3, basis=basis, steps=6)  # type: ignore[arg-type]
    train_at_random(tuned, size=0.03)
    if method == "adalora":
        hook = method_hook(tuned)
        assert hook is not None
        for step in range(1, 5):
            tuned(torch.rand(1, 2, 3, 28, 28))["pose_enc"].sum().backward()
            hook.after_step(step)
    return tuned


@pytest.mark.parametrize(
    ("method", "head_cores"),
    [("lora", False), ("pissa", False), ("adalora", False), ("psv", False), ("subspace", False), ("subspace", True)],
)
def test_stock_peft_gives_the_same_outputs(method: str, head_cores: bool, tmp_path: Path) -> None:
    tuned = _tuned(method, head_cores)
    write_lora(tmp_path / "lora", adapter_factors(tuned), tuned.get_base_model(), "some-model")
    expected = outputs(tuned)
    stock = PeftModel.from_pretrained(tiny_vggt(), tmp_path / "lora")
    assert read_json(tmp_path / "lora/adapter_config.json")["peft_type"] == "LORA"
    assert relative_difference(outputs(stock), expected) < 1e-6
    assert relative_difference(expected, outputs(tiny_vggt())) > 1e-4
    # our own reader, which mining uses, sees the same updates
    adapter = read_adapter(tmp_path / "lora")
    assert adapter.base_model == "some-model"
    for name, (b, a) in adapter_factors(tuned).items():
        torch.testing.assert_close(adapter.modules[name][0] @ adapter.modules[name][1], b @ a)


def test_factors_of_the_subspace_method(tmp_path: Path) -> None:
    tuned = _tuned("subspace", head_cores=True)
    factors = adapter_factors(tuned)
    assert set(factors) == set(target_modules(tiny_vggt(), "all"))
    name = "aggregator.frame_blocks.1.mlp.fc2"
    core = tuned.get_submodule(f"base_model.model.{name}").subspace_core["default"]
    torch.testing.assert_close(factors[name][0], 2 * core.U @ core.c, rtol=1e-6, atol=1e-7)
    assert torch.equal(factors[name][1], core.V.T)
    # a core of 5 beside a LoRA of 3, and a LoRA alone
    assert factors["depth_head.projects.0"][1].shape == (8, 64)
    assert factors["camera_head.pose_branch.fc2"][1].shape == (3, 32)
    write_lora(tmp_path / "lora", factors, tuned.get_base_model())
    config = read_json(tmp_path / "lora/adapter_config.json")
    assert config["target_modules"] == target_regex("all")
    ranks = {**dict.fromkeys(factors, config["r"])}
    for pattern, rank in config["rank_pattern"].items():
        ranks.update({name: rank for name in factors if "^" + name.replace(".", r"\.") == pattern})
    assert ranks == {name: len(a) for name, (_, a) in factors.items()}
    # scaling is alpha / r = 1
    assert config["lora_alpha"] == config["r"] and config["alpha_pattern"] == config["rank_pattern"]


class Nested(nn.Module):
    """Module names that end in other module names, and one that reads as an expression."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.a = nn.ModuleDict({"fc": nn.Linear(4, 4), "a": nn.ModuleDict({"fc": nn.Linear(4, 4)})})
        self.a2fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a2fc(self.a["a"]["fc"](self.a["fc"](self.fc(x))))


def test_ranks_reach_the_module_they_are_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Nested(), torch.rand(3, 4)
    factors = {
        name: (torch.randn(4, rank), torch.randn(rank, 4)) for name, rank in (("fc", 2), ("a.fc", 1), ("a.a.fc", 3))
    }
    write_lora(tmp_path / "lora", factors, model)
    expected = Nested()
    expected.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, (b, a) in factors.items():
            expected.get_parameter(f"{name}.weight").add_(b @ a)
    stock = PeftModel.from_pretrained(model, tmp_path / "lora")
    assert relative_difference(outputs(stock, x), outputs(expected, x)) < 1e-6


def test_what_no_plain_lora_can_hold_is_refused(tmp_path: Path) -> None:
    for changes, message in (
        (
            {"dilation": 2},
            r"0 cannot be exported: .* needs dilation \(1, 1\), the module has \(2, 2\)",
        ),
        ({"padding_mode": "circular"}, "needs padding_mode 'zeros', the module has 'circular'"),
    ):
        model = nn.Sequential(nn.Conv2d(2, 3, 3, **changes))
        basis = random_basis(model, ["0"], 2)
        tuned = get_peft_model(model, SubspaceConfig.from_basis(basis))
        with pytest.raises(ValueError, match=message):
            write_lora(tmp_path / "lora", adapter_factors(tuned), tuned.get_base_model())
    plain = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(r=1, target_modules=["0"]))
    with pytest.raises(ValueError, match="must change at least one module, got none"):
        write_lora(tmp_path / "lora", adapter_factors(plain, "absent"), plain.get_base_model())
    assert not (tmp_path / "lora").exists()
