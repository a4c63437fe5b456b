"""Reading PEFT folders: scaling rules, patterns, convolutions, and everything that must be refused."""

from __future__ import annotations

import json

import pytest
import torch
from mining.synthetic_adapters import random_pair, write_adapter
from safetensors.torch import load_file, save_file

from subspace3d.formats.adapter import find_adapters, read_adapter

NAME = "aggregator.frame_blocks.0.attn.qkv"


@pytest.fixture
def pair(rng):
    return random_pair(rng, 6, 5, 2)


def test_update_is_the_scaled_product(tmp_path, pair):
    adapter = read_adapter(write_adapter(tmp_path / "a", {NAME: pair}, lora_alpha=6))
    lora_b, lora_a = adapter.modules[NAME]
    torch.testing.assert_close(lora_b @ lora_a, 3.0 * pair[0] @ pair[1])
    assert adapter.base_model == "planted"
    assert adapter.ignored == ()


def test_rslora_divides_by_the_root_of_the_rank(tmp_path, pair):
    adapter = read_adapter(write_adapter(tmp_path / "a", {NAME: pair}, lora_alpha=6, use_rslora=True))
    torch.testing.assert_close(adapter.modules[NAME][0], pair[0] * 6 / 2**0.5)


def test_patterns_match_dotted_suffixes_and_the_first_wins(tmp_path, rng):
    modules = {
        "blocks.0.attn.qkv": random_pair(rng, 6, 5, 3),
        "blocks.1.attn.qkv": random_pair(rng, 6, 5, 2),
        "blocks.1.attn.myqkv": random_pair(rng, 6, 5, 2),
    }
    folder = write_adapter(
        tmp_path / "a",
        modules,
        r=2,
        lora_alpha=4,
        rank_pattern={"0.attn.qkv": 3},
        alpha_pattern={r"blocks\.0\..*": 9, "qkv": 8},
    )
    scaled = read_adapter(folder).modules
    for name, scaling in (("blocks.0.attn.qkv", 3.0), ("blocks.1.attn.qkv", 4.0), ("blocks.1.attn.myqkv", 2.0)):
        torch.testing.assert_close(scaled[name][0], scaling * modules[name][0])


def test_half_precision_is_widened_before_scaling(tmp_path, pair):
    halves = {"a": tuple(t.bfloat16() for t in pair), "b": tuple(t.half() for t in pair)}
    for lora_b, lora_a in read_adapter(write_adapter(tmp_path / "a", halves, lora_alpha=3)).modules.values():
        assert lora_b.dtype == lora_a.dtype == torch.float32
    exact = halves["a"][0].float() * 1.5
    torch.testing.assert_close(read_adapter(tmp_path / "a").modules["a"][0], exact, rtol=0, atol=0)


def test_other_trained_tensors_are_named_and_left_out(tmp_path, pair):
    folder = write_adapter(tmp_path / "a", {NAME: pair})
    tensors = load_file(folder / "adapter_model.safetensors")
    extra = {
        "base_model.model.classifier.weight": torch.ones(2, 2),
        "base_model.model.embed.lora_embedding_A": torch.ones(2, 9),
    }
    save_file({**tensors, **extra}, folder / "adapter_model.safetensors")
    adapter = read_adapter(folder)
    assert list(adapter.modules) == [NAME]
    assert adapter.ignored == tuple(sorted(extra))


def test_folders_are_found_at_any_depth_but_not_hidden_ones(tmp_path, pair):
    for name in ("b/deep", "a", ".a.x7.tmp"):
        write_adapter(tmp_path / name, {NAME: pair})
    assert find_adapters(tmp_path) == [tmp_path / "a", tmp_path / "b" / "deep"]
    assert find_adapters(tmp_path / "a") == [tmp_path / "a"]


def test_pickled_weights_are_refused(tmp_path, pair):
    folder = write_adapter(tmp_path / "a", {NAME: pair})
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"only adapter_model\.bin"):
        find_adapters(tmp_path)


def test_no_adapter_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no adapter"):
        find_adapters(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        find_adapters(tmp_path / "missing")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "ADALORA"}, "peft_type must be LORA, got 'ADALORA'"),
        ({"init_lora_weights": "pissa_niter_4"}, "also changes the base weights"),
        ({"init_lora_weights": "olora"}, "also changes the base weights"),
        ({"init_lora_weights": "corda"}, "also changes the base weights"),
        ({"use_dora": True}, "use_dora must be off, got True"),
        ({"target_parameters": ["experts.weight"]}, "target_parameters must be off"),
        ({"lora_alpha": None}, "lora_alpha must be a positive number, got None"),
        ({"r": 4}, "do not fit the rank 4"),
    ],
)
def test_what_is_not_a_plain_lora_is_refused(tmp_path, pair, config, message):
    folder = write_adapter(tmp_path / "a", {NAME: pair}, **config)
    with pytest.raises(ValueError, match=message):
        read_adapter(folder)


def _change(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def _first_key(side):
    return f"base_model.model.{NAME}.lora_{side}.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(_first_key("B")), f"{NAME} has no lora_B.weight"),
        (lambda t: t.pop(_first_key("A")), f"{NAME} has no lora_A.weight"),
        (lambda t: t[_first_key("A")].fill_(float("nan")), r"adapter_model\.safetensors: .*lora_A\.weight has NaN"),
        (lambda t: t[_first_key("B")][0].fill_(float("inf")), r"lora_B\.weight has NaN or infinite"),
        (lambda t: t.update({f"{NAME}.lora_magnitude_vector": torch.ones(6)}), "DoRA"),
        (lambda t: t.update({_first_key("A"): torch.ones(3, 5)}), "do not fit the rank 2"),
        (lambda t: [t.pop(key) for key in list(t)], "holds no lora_A and lora_B"),
    ],
)
def test_broken_tensors_are_refused(tmp_path, pair, change, message):
    folder = write_adapter(tmp_path / "a", {NAME: pair})
    _change(folder, change)
    with pytest.raises(ValueError, match=message):
        read_adapter(folder)


def test_truncated_files_are_refused(tmp_path, pair):
    folder = write_adapter(tmp_path / "a", {NAME: pair})
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is not a whole safetensors file"):
        read_adapter(folder)
    (folder / "adapter_config.json").write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="must hold a JSON object"):
        read_adapter(folder)
