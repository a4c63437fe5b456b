"""Reading PEFT folders: scaling rules, patterns, convolutions, and everything that must be refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from mining.synthetic_adapters import random_pair, write_adapter
from safetensors.torch import load_file, save_file

from subspace3d import inject
from subspace3d.formats.adapter import WEIGHTS_NAME, read_adapter
from subspace3d.formats.adapter_folders import find_adapters, search_adapters
from subspace3d.formats.basis import load_basis

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
    extra = {"base_model.model.classifier.weight": torch.ones(2, 2), "base_model.model.fc.bias": torch.ones(9)}
    save_file({**tensors, **extra}, folder / "adapter_model.safetensors")
    adapter = read_adapter(folder)
    assert list(adapter.modules) == [NAME]
    assert adapter.ignored == tuple(sorted(extra))


def test_folders_are_found_at_any_depth_but_not_hidden_ones(tmp_path, pair):
    for alpha, name in enumerate(("b/deep", "a", ".a.x7.tmp"), 1):
        write_adapter(tmp_path / name, {NAME: pair}, lora_alpha=alpha)
    assert find_adapters(tmp_path) == [tmp_path / "a", tmp_path / "b" / "deep"]
    assert find_adapters(tmp_path / "a") == [tmp_path / "a"]


@pytest.mark.parametrize(
    "key", ["lora_A.default.weight", "lora_B.bias", "lora_embedding_A", "lora_diag", "lora_A.2.weight"]
)
def test_unknown_parts_of_a_lora_are_refused_by_name(tmp_path, pair, key):
    folder = write_adapter(tmp_path / "a", {NAME: pair})
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({**tensors, f"base_model.model.{NAME}.{key}": torch.ones(2)}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=rf"adapter_model\.safetensors: .*{key} is none of lora_A"):
        read_adapter(folder)


# as their patched PEFT saves them: the pattern's default is always there
AUTHORS_SETTINGS = {"apply_svd_lora": False, "pattern_svd_lora": "block", "use_predefined_space": "/space.safetensors"}


def _authors_run(folder, pair, generator):
    """A folder of the authors' code, K = 5 beside r, and what it was saved from: LoRA's A and B are Sequentials."""
    write_adapter(folder, {NAME: pair}, lora_alpha=2 * len(pair[1]), **AUTHORS_SETTINGS)
    lora_a = torch.nn.Sequential(torch.nn.Linear(8, 5, bias=False))
    lora_b = torch.nn.Sequential(torch.nn.Linear(5, 5, bias=False), torch.nn.Linear(5, 6, bias=False))
    for layer in (*lora_a, *lora_b):
        torch.nn.init.normal_(layer.weight, generator=generator)
    cores = {
        f"base_model.model.blocks.7.lora_{side}.{key}": tensor
        for side, module in (("A", lora_a), ("B", lora_b))
        for key, tensor in module.state_dict().items()
    }
    weights = folder / "adapter_model.safetensors"
    plain = load_file(weights)
    save_file({**plain, **cores}, weights)
    return plain, cores, torch.nn.Sequential(lora_a, lora_b)


def test_the_authors_cores_are_read_exactly(tmp_path, pair):
    generator = torch.Generator().manual_seed(0)
    _, cores, theirs = _authors_run(tmp_path / "a", pair, generator)
    adapter = read_adapter(tmp_path / "a")
    assert set(adapter.modules) == {NAME, "blocks.7"} and set(adapter.cores) == {"blocks.7"}
    core = adapter.cores["blocks.7"]
    for mine, stored in ((core.v.T, "A.0"), (core.c, "B.0"), (core.u, "B.1")):
        assert torch.equal(mine, cores[f"base_model.model.blocks.7.lora_{stored}.weight"])
    assert core.scale == 2

    x = torch.randn(9, 8, generator=generator, dtype=torch.float64)
    expected = 2 * theirs.double()(x)
    lora_b, lora_a = adapter.modules["blocks.7"]
    rounding = float(torch.finfo(torch.float32).eps) * float(expected.detach().abs().max()) * 8
    torch.testing.assert_close(x @ (lora_b.double() @ lora_a.double()).T, expected.detach(), rtol=0, atol=rounding)

    # the same bases and core as a layer of ours
    model = torch.nn.ModuleDict({"blocks": torch.nn.ModuleDict({"7": torch.nn.Linear(8, 6).double()})})
    before = model.get_submodule("blocks.7")(x)
    inject(model, {"blocks.7": (core.u, core.v)}, core.scale)
    layer = model.get_submodule("blocks.7")
    with torch.no_grad():
        layer.core.c.copy_(core.c)
    torch.testing.assert_close((layer(x) - before).detach(), expected.detach(), rtol=0, atol=rounding)


def test_the_basis_of_an_authors_run_is_a_basis(tmp_path, pair, capsys):
    _, cores, _ = _authors_run(tmp_path / "lora-save", pair, torch.Generator().manual_seed(0))
    basis = load_basis(tmp_path / "lora-save" / "adapter_model.safetensors")
    assert set(basis) == {"blocks.7"}
    assert torch.equal(basis["blocks.7"][0], cores["base_model.model.blocks.7.lora_B.1.weight"])
    assert torch.equal(basis["blocks.7"][1].T, cores["base_model.model.blocks.7.lora_A.0.weight"])
    assert "the basis is that of its 1 cores; 1 plain LoRA pairs are no part of it" in capsys.readouterr().out
    (tmp_path / "lora-save" / "adapter_model.safetensors").rename(tmp_path / "lora-save" / "b.safetensors")
    with pytest.raises(ValueError, match=r"read from an adapter folder, whose weights are called adapter_model"):
        load_basis(tmp_path / "lora-save" / "b.safetensors")


def test_incomplete_cores_are_refused(tmp_path, pair):
    folder = tmp_path / "a"
    plain, cores, _ = _authors_run(folder, pair, torch.Generator().manual_seed(0))
    weights = folder / "adapter_model.safetensors"
    save_file({**plain, **{key: value for key, value in cores.items() if "B.1" not in key}}, weights)
    with pytest.raises(ValueError, match=r"blocks\.7 has a core but no lora_B\.1\.weight"):
        read_adapter(folder)
    save_file({**plain, **cores, "base_model.model.blocks.7.lora_B.0.weight": torch.ones(5, 4)}, weights)
    with pytest.raises(ValueError, match=r"blocks\.7 must have lora_A\.0 \[K, in\]"):
        read_adapter(folder)
    save_file(plain, weights)
    with pytest.raises(ValueError, match=r"use_predefined_space is on, but no module of .* has a core"):
        read_adapter(folder)


def test_a_plain_lora_of_the_authors_peft_is_one(tmp_path, pair):
    settings = {**AUTHORS_SETTINGS, "use_predefined_space": ""}
    ours = read_adapter(write_adapter(tmp_path / "ours", {NAME: pair})).modules[NAME]
    theirs = read_adapter(write_adapter(tmp_path / "theirs", {NAME: pair}, **settings))
    assert not theirs.cores and all(map(torch.equal, theirs.modules[NAME], ours))


@pytest.mark.parametrize(
    ("rename", "wrapper"),
    [
        (lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."), "_orig_mod."),
        (lambda name: "_orig_mod." + name, "_orig_mod."),
        (lambda name: "module." + name, "module."),
        (lambda name: name.replace("base_model.model.", "base_model.model.module."), "module."),
    ],
)
def test_prefixes_of_wrappers_are_taken_off_and_named(tmp_path, pair, rename, wrapper):
    folder = write_adapter(tmp_path / "a", {NAME: pair})
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({rename(name): tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    adapter = read_adapter(folder)
    assert list(adapter.modules) == [NAME] and adapter.unwrapped == (wrapper,)


def test_checkpoints_copies_and_links_are_told_apart(tmp_path, pair):
    root = tmp_path / "adapters"
    write_adapter(root / "a", {NAME: pair}, lora_alpha=1)
    write_adapter(root / "a" / "checkpoint-100", {NAME: pair}, lora_alpha=2)
    write_adapter(root / "a" / "checkpoint-200" / "inner", {NAME: pair}, lora_alpha=3)
    write_adapter(root / "run" / "checkpoints" / "step_40" / "adapter", {NAME: pair}, lora_alpha=4)
    shutil.copytree(root / "a", root / "z")
    write_adapter(tmp_path / "elsewhere", {NAME: pair}, lora_alpha=5)
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "linked again").symlink_to(tmp_path / "elsewhere")
    (root / "loop").symlink_to(root)
    found = search_adapters(root)
    assert found.folders == [root / "a", root / "linked"]
    assert len(found.checkpoints) == 5 and found.copies == {root / "z": root / "a"}
    assert "2 adapters taken; left out: 5 checkpoints" in found.summary() and "1 copies" in found.summary()


def test_earlier_epochs_of_the_authors_trainer_are_checkpoints(tmp_path, pair):
    for alpha, name in enumerate(("lora-save", "lora-save-5", "lora-save-10"), 1):
        write_adapter(tmp_path / "ckpts" / name, {NAME: pair}, lora_alpha=alpha)
    found = search_adapters(tmp_path)
    assert found.folders == [tmp_path / "ckpts" / "lora-save"] and len(found.checkpoints) == 2
    shutil.rmtree(tmp_path / "ckpts" / "lora-save")
    with pytest.raises(ValueError, match="ckpts holds 2 checkpoints of one training"):
        search_adapters(tmp_path)


def test_checkpoints_without_a_result_are_refused(tmp_path, pair):
    write_adapter(tmp_path / "run" / "checkpoint-100", {NAME: pair}, lora_alpha=1)
    assert find_adapters(tmp_path) == [tmp_path / "run" / "checkpoint-100"]
    write_adapter(tmp_path / "run" / "checkpoint-200", {NAME: pair}, lora_alpha=2)
    with pytest.raises(ValueError, match="run holds 2 checkpoints of one training"):
        find_adapters(tmp_path)


@pytest.mark.parametrize("setting", ["kasa_config", "lora_bias", "arrow_config", "monteclora_config", "use_tomorrow"])
def test_unknown_settings_that_are_on_are_refused_by_name(tmp_path, pair, setting):
    read_adapter(write_adapter(tmp_path / "off", {NAME: pair}, **{setting: None}))
    with pytest.raises(ValueError, match=rf"adapter_config\.json: {setting} must be off, got"):
        read_adapter(write_adapter(tmp_path / "on", {NAME: pair}, **{setting: {"a": 1}}))


def test_a_pattern_of_four_repetitions_is_read(tmp_path, pair):
    rank = len(pair[1])
    pattern = {r"aggregator\..*\.\d+\.(attn|mlp)\..*k?v+": rank}
    folder = write_adapter(tmp_path / "a", {NAME: pair}, r=rank + 1, rank_pattern=pattern)
    assert NAME == "aggregator.frame_blocks.0.attn.qkv" and list(read_adapter(folder).modules) == [NAME]


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
    with pytest.raises(ValueError, match="must be an object"):
        read_adapter(folder)


def test_factors_stay_in_the_file_and_one_written_anew_is_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", {"fc": (torch.ones(3, 2), torch.ones(2, 5))})
    adapter = read_adapter(tmp_path / "a")
    first, again = adapter.modules["fc"], adapter.modules["fc"]
    assert first[0] is not again[0] and torch.equal(first[0], again[0])
    write_adapter(tmp_path / "b", {"fc": (torch.zeros(3, 2), torch.ones(2, 5))})
    (tmp_path / "b" / WEIGHTS_NAME).replace(tmp_path / "a" / WEIGHTS_NAME)
    with pytest.raises(ValueError, match="must stay as it is while it is used"):
        adapter.modules["fc"]
