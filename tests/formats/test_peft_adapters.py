"""Adapters made by stock PEFT on a transformers ViT are mined as they are, equal to PEFT's own updates."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mining.synthetic_adapters import AT_REST, dense_mining

from subspace3d.commands import mine
from subspace3d.commands.mine import MineConfig
from subspace3d.formats.adapter import read_adapter
from subspace3d.formats.subspace import load_subspace

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

# PEFT multiplies the factors in float32
FLOAT32 = 1e-5


def _vit():
    config = transformers.ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=40,
        image_size=16,
        patch_size=4,
    )
    return transformers.ViTModel(config, add_pooling_layer=False)


def _save_adapter(folder, **settings):
    """Tune nothing, but fill the factors, so that the update is not zero; returns PEFT's own delta per module."""
    settings = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", **settings}
    model = peft.get_peft_model(_vit(), peft.LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    model.save_pretrained(folder)
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach().flatten(1)
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


LINEAR_AND_CONV = r".*(projection|query|key|value|q_proj|k_proj|v_proj|o_proj|dense|fc1|fc2)"

SETTINGS = [
    pytest.param({}, id="plain"),
    pytest.param({"use_rslora": True}, id="rslora"),
    pytest.param({"target_modules": LINEAR_AND_CONV}, id="conv"),
    pytest.param(
        {
            "target_modules": LINEAR_AND_CONV,
            "use_rslora": True,
            "rank_pattern": {r".*\.0\..*": 2, "projection": 4},
            "alpha_pattern": {r".*\.1\..*": 7, "projection": 1},
        },
        id="patterns",
    ),
    pytest.param({"init_lora_weights": "gaussian"}, id="gaussian"),
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_updates_equal_those_of_peft(tmp_path, settings):
    deltas = _save_adapter(tmp_path / "a", **settings)
    adapter = read_adapter(tmp_path / "a")
    assert adapter.modules.keys() == deltas.keys()
    assert len(deltas) >= 12
    for name, (lora_b, lora_a) in adapter.modules.items():
        scale = float(deltas[name].abs().max())
        torch.testing.assert_close(lora_b @ lora_a, deltas[name], rtol=0, atol=FLOAT32 * scale)


def test_mining_equals_the_dense_definition_on_pefts_updates(tmp_path):
    adapters = [
        _save_adapter(tmp_path / "in" / f"set_{index}", target_modules=LINEAR_AND_CONV, r=rank)
        for index, rank in enumerate((3, 3, 2))
    ]
    subspaces = load_subspace(mine.run(MineConfig(tmp_path / "in", tmp_path / "vit.safetensors", k=3, **AT_REST)))
    assert subspaces.modules.keys() == adapters[0].keys()
    convolutions = [name for name in subspaces.modules if name.endswith("projection")]
    assert convolutions
    assert subspaces.modules[convolutions[0]].v.shape == (3 * 4 * 4, 3)
    for name, module in subspaces.modules.items():
        stack = np.stack([adapter[name].double().numpy() for adapter in adapters])
        shared, values, weights = dense_mining(stack, 3, p=1.0)
        scale = np.abs(shared).max()
        np.testing.assert_allclose((module.u @ module.v.T).numpy(), shared, atol=10 * FLOAT32 * scale)
        kept = values[: len(module.singular_values)]
        np.testing.assert_allclose(module.singular_values.numpy(), kept, atol=FLOAT32 * kept[0])
        np.testing.assert_allclose((module.weights / module.weights.mean()).numpy(), weights, rtol=10 * FLOAT32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
        ({"use_dora": True}, "use_dora must be off"),
    ],
)
def test_what_peft_writes_that_is_no_plain_update_is_refused(tmp_path, settings, message):
    model = peft.get_peft_model(_vit(), peft.LoraConfig(r=2, target_modules="all-linear", **settings))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        read_adapter(tmp_path)


def test_other_methods_of_peft_are_refused(tmp_path):
    model = peft.get_peft_model(
        _vit(), peft.AdaLoraConfig(target_modules=LINEAR_AND_CONV.replace("projection|", ""), total_step=9)
    )
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="peft_type must be LORA, got 'ADALORA'"):
        read_adapter(tmp_path)


def test_modules_to_save_and_embeddings_are_left_out(tmp_path):
    _save_adapter(tmp_path, modules_to_save=["layernorm"])
    adapter = read_adapter(tmp_path)
    assert adapter.ignored
    assert all("layernorm" in key for key in adapter.ignored)
