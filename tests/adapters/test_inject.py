"""Cores put on a model in place."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import subspace3d as s3


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(5 * 4, 6), nn.ReLU(), nn.Linear(6, 2)).double()


def basis(*names: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    sizes = {"0": (5, 27), "2": (6, 20), "4": (2, 6)}
    return {name: tuple(torch.linalg.qr(torch.randn(size, 2))[0] for size in sizes[name]) for name in names}


def test_only_the_cores_are_trained_and_a_core_of_zeros_changes_nothing(tmp_path):
    torch.manual_seed(1)
    plain, chosen = model(), basis("0", "2")
    images = torch.rand(4, 3, 4, 4, dtype=torch.float64)
    expected = plain(images)
    s3.save_basis(tmp_path / "basis.safetensors", chosen)
    for given in (chosen, tmp_path / "basis.safetensors", str(tmp_path / "basis.safetensors")):
        adapted = model()
        assert s3.inject(adapted, given) == ["0", "2"]
        trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
        assert [tuple(p.shape) for p in trained.values()] == [(2, 2), (2, 2)]
        torch.testing.assert_close(adapted(images), expected, rtol=0, atol=1e-12)

    cores = [torch.randn(2, 2, dtype=torch.float64) for _ in range(2)]
    for parameter, core in zip(trained.values(), cores):
        parameter.data = core.to(parameter.dtype)
    for (name, (u, v)), core in zip(chosen.items(), cores):
        weight = plain.get_submodule(name).weight
        update = 2 * u.double() @ core.float().double() @ v.double().T
        weight.data += update.view(weight.shape)
    torch.testing.assert_close(adapted.eval()(images), plain(images), rtol=1e-6, atol=1e-6)


def test_the_documented_way_back_to_a_plain_model():
    documentation = Path(__file__).parents[2] / "docs/adapters.md"
    *_, loop = re.findall(r"```python\n(.*?)```", documentation.read_text(encoding="utf-8"), flags=re.DOTALL)
    adapted, images = model(), torch.rand(4, 3, 4, 4, dtype=torch.float64)
    names = s3.inject(adapted, basis("0", "4"))
    cores = {name: torch.randn_like(p) for name, p in adapted.named_parameters() if p.requires_grad}
    assert not adapted.load_state_dict(cores, strict=False).unexpected_keys
    expected = adapted(images)
    assert not torch.allclose(expected, model()(images))
    exec(loop, {"names": names, "model": adapted})
    assert str(adapted) == str(model())
    torch.testing.assert_close(adapted(images), expected)


def test_what_cannot_have_a_core_is_refused_by_name_and_nothing_is_changed():
    shared = model()
    shared.twin = shared[2]
    reads_weight = nn.Sequential(nn.MultiheadAttention(4, 2))
    square = (torch.eye(4, 2), torch.eye(4, 2))
    u, v = torch.eye(2), torch.eye(6, 2)
    cases = [
        (model(), {}, "at least one module"),
        (model(), {"7": square}, "7 must be a module of the model"),
        (model(), {"3": square}, "3 must be a Linear, or a Conv2d"),
        (model(), {**basis("2"), "4": square}, r"4 must have \[out, in\] = \[2, 6\]"),
        (shared, basis("2"), "one module with twin"),
        (reads_weight, {"0.out_proj": square}, "MultiheadAttention"),
        (nn.Linear(4, 4), {"": square}, "got '' for the model itself"),
        (
            model(),
            {**basis("2"), "4": (u, torch.eye(6, 3))},
            r"4 must have U \[out, K\] and V \[in, K\]",
        ),
        (model(), {**basis("2"), "4": (u, v * float("nan"))}, "4 has NaN"),
        (model(), {"2": torch.eye(6)}, "2 must be a pair of tensors"),
        (model(), {"2": (torch.eye(6, 2).numpy(), torch.eye(20, 2).numpy())}, "got ndarray, ndarray"),
        (
            model(),
            {"4": (u.to(torch.complex64), v)},
            "4 must be float16.*got torch.complex64",
        ),
        (model(), [basis("2")], "basis must be a mapping of module names or the path of a file, got list"),
        (float8(), {**basis("0"), "4": square}, "basis: 4: weight must be float16"),
    ]
    for network, given, words in cases:
        before = str(network)
        with pytest.raises(ValueError, match=words):
            s3.inject(network, given)
        assert str(network) == before and all(p.requires_grad for p in network.parameters())
    with pytest.raises(ValueError, match="scale must be finite, got nan"):
        s3.inject(model(), basis("2"), scale=float("nan"))


def float8() -> nn.Module:
    """A model whose last layer can have no core, which only making the core finds."""
    network = model()
    network[4] = nn.Linear(4, 4)
    network[4].weight = nn.Parameter(network[4].weight.detach().to(torch.float8_e4m3fn))
    return network


def test_a_model_on_the_meta_device_keeps_its_basis():
    filled, chosen = model(), basis("0", "2")
    s3.inject(filled, chosen)
    with torch.device("meta"):
        empty = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(20, 6), nn.ReLU(), nn.Linear(6, 2))
    s3.inject(empty, chosen)
    empty.load_state_dict(model().state_dict(), strict=False, assign=True)
    images = torch.rand(4, 3, 4, 4, dtype=torch.float64)
    for network in (filled, empty):
        for name in chosen:
            nn.init.constant_(network.get_submodule(name).c, 0.5)
    torch.testing.assert_close(empty(images), filled(images))
