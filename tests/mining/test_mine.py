"""From adapter folders to a subspace file: planted subspaces, padding, narrow modules, repetition, refusals."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from mining.synthetic_adapters import (
    AT_REST,
    dense_mining,
    orthonormal,
    planted_pair,
    projector,
    random_pair,
    write_adapter,
)

from subspace3d.commands import mine
from subspace3d.commands.mine import MineConfig
from subspace3d.formats.adapter import read_adapter
from subspace3d.formats.adapter_folders import find_adapters
from subspace3d.formats.subspace import load_subspace
from subspace3d.mining import stacks
from subspace3d.mining.cross_validation import find_mined_adapters

NAME = "aggregator.frame_blocks.0.attn.qkv"

# u and v are stored in float32: a relative 2^-24 per entry, a few of them summed in a product
FLOAT32 = 1e-5


def _deltas(root, name):
    adapters = [read_adapter(folder) for folder in find_adapters(root)]
    return np.stack([(a.modules[name][0].double() @ a.modules[name][1].double()).numpy() for a in adapters])


def _assert_dense(subspaces, root, k, p=1.0):
    for name, module in subspaces.modules.items():
        shared, values, weights = dense_mining(_deltas(root, name), k, p)
        scale = np.abs(shared).max()
        np.testing.assert_allclose((module.u @ module.v.T).numpy(), shared, atol=FLOAT32 * scale)
        np.testing.assert_allclose(
            module.singular_values.numpy(), values[: len(module.singular_values)], rtol=1e-5, atol=1e-9 * scale
        )
        np.testing.assert_allclose((module.weights / module.weights.mean()).numpy(), weights, rtol=1e-5)


def test_a_planted_subspace_is_found_and_the_bad_adapter_loses_weight(tmp_path, rng):
    left, right = orthonormal(rng, 24, 3), orthonormal(rng, 18, 3)
    for number in range(5):
        pair = planted_pair(rng, left, right, 0.05) if number < 4 else random_pair(rng, 24, 18, 3)
        write_adapter(tmp_path / "adapters" / f"set_{number}", {NAME: pair})
    path = mine.run(MineConfig(tmp_path / "adapters", tmp_path / "texture.safetensors", k=3))
    subspaces = load_subspace(path)
    module = subspaces.modules[NAME]
    # the bad adapter's leftover weight tilts the subspaces by less than this
    assert np.linalg.norm(projector(module.u) - left @ left.T) < 0.05
    assert np.linalg.norm(projector(module.v) - right @ right.T) < 0.05
    weights = module.weights / module.weights.mean()
    assert weights[4] < 0.1 < weights[:4].min()
    assert module.singular_values.shape == (15,)
    assert subspaces.header["base_model"] == "planted"
    assert [a["path"] for a in subspaces.header["adapters"]] == [f"set_{number}" for number in range(5)]
    assert subspaces.header["modules"][NAME]["k"] == subspaces.header["modules"][NAME]["rank"] == 3
    explained = subspaces.header["modules"][NAME]["explained"]
    assert min(explained[:4]) > 0.99 > max(explained[4:])


@pytest.mark.parametrize("p", [2.0, 1.0, 0.5])
def test_adapters_of_different_rank_equal_the_dense_definition(tmp_path, rng, p):
    names = ("blocks.0.proj", "blocks.1.proj", "head.out")
    for number, rank in enumerate((2, 4, 3)):
        sizes = {"blocks.0.proj": (10, 8), "blocks.1.proj": (10, 8), "head.out": (8, 9)}
        write_adapter(tmp_path / "in" / str(number), {name: random_pair(rng, *sizes[name], rank) for name in names})
    path = mine.run(MineConfig(tmp_path / "in", tmp_path / "out.safetensors", k=4, p=p, **AT_REST))
    subspaces = load_subspace(path)
    _assert_dense(subspaces, tmp_path / "in", 4, p)
    assert {name: detail["rank"] for name, detail in subspaces.header["modules"].items()} == dict.fromkeys(names, 4)


def test_a_narrow_module_gets_the_k_it_can_hold(tmp_path, rng):
    for number in range(3):
        modules = {"wide": random_pair(rng, 12, 10, 2), "head.out": random_pair(rng, 2, 10, 2)}
        write_adapter(tmp_path / "in" / str(number), modules)
    subspaces = load_subspace(mine.run(MineConfig(tmp_path / "in", tmp_path / "out.safetensors", k=5)))
    assert subspaces.modules["wide"].u.shape == (12, 5)
    assert subspaces.modules["head.out"].u.shape == (2, 2)
    assert subspaces.header["k"] == 5
    assert subspaces.header["modules"]["head.out"]["k"] == 2


def test_k_beyond_all_ranks_is_refused(tmp_path, rng):
    for number in range(2):
        write_adapter(tmp_path / "in" / str(number), {NAME: random_pair(rng, 12, 10, 2)})
    with pytest.raises(ValueError, match="k must be at most the sum of the adapters' ranks, 4, got 5"):
        mine.run(MineConfig(tmp_path / "in", tmp_path / "out.safetensors", k=5))
    assert not (tmp_path / "out.safetensors").exists()


def test_batches_do_not_change_the_result(tmp_path, rng, monkeypatch):
    for number in range(2):
        modules = {f"blocks.{layer}.proj": random_pair(rng, 12, 10, 2) for layer in range(5)}
        write_adapter(tmp_path / "in" / str(number), modules)
    whole = load_subspace(mine.run(MineConfig(tmp_path / "in", tmp_path / "whole.safetensors", k=2)))
    monkeypatch.setattr(stacks, "_BATCH_BYTES", 1)
    single = load_subspace(mine.run(MineConfig(tmp_path / "in", tmp_path / "single.safetensors", k=2)))
    for name, module in whole.modules.items():
        torch.testing.assert_close(module.u, single.modules[name].u)
        torch.testing.assert_close(module.weights, single.modules[name].weights)


def test_the_same_inputs_are_not_mined_twice_and_changed_ones_are(tmp_path, rng, capsys):
    for number in range(2):
        write_adapter(tmp_path / "in" / str(number), {NAME: random_pair(rng, 12, 10, 2)})
    config = MineConfig(tmp_path / "in", tmp_path / "out.safetensors", k=2)
    first = mine.run(config).stat().st_mtime_ns
    assert mine.run(config).stat().st_mtime_ns == first
    assert "already mined" in capsys.readouterr().out
    assert mine.run(MineConfig(tmp_path / "in", tmp_path / "out.safetensors", k=3)).stat().st_mtime_ns != first
    settings = json.loads((tmp_path / "in" / "0" / "adapter_config.json").read_text())
    (tmp_path / "in" / "0" / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 9}))
    before = load_subspace(config.out).modules[NAME].u
    mine.run(MineConfig(tmp_path / "in", tmp_path / "out.safetensors", k=3))
    assert not torch.equal(load_subspace(config.out).modules[NAME].u, before)
    config.out.write_bytes(config.out.read_bytes()[:200])
    mine.run(config)
    assert "not a whole safetensors file" in capsys.readouterr().out
    assert load_subspace(config.out).header["k"] == 2


def test_untrained_modules_give_zero_subspaces(tmp_path, rng):
    for number in range(2):
        lora_b, lora_a = random_pair(rng, 12, 10, 2)
        write_adapter(tmp_path / "in" / str(number), {"a": (lora_b, lora_a), "b": (0 * lora_b, lora_a.clone())})
    subspaces = load_subspace(mine.run(MineConfig(tmp_path / "in", tmp_path / "out.safetensors", k=2)))
    assert not subspaces.modules["b"].u.any()
    assert subspaces.header["modules"]["b"]["explained"] == [None, None]


def cancelling(pair):
    """The update of a PiSSA adapter that was not trained: trained minus initial factors, which are the same."""
    lora_b, lora_a = pair
    return torch.cat([lora_b, -lora_b], 1), torch.cat([lora_a, lora_a])


@pytest.mark.parametrize("model", ["mean", "shared"])
def test_an_update_that_cancels_counts_as_the_zero_it_is(tmp_path, rng, caplog, model):
    pairs = [random_pair(rng, 12, 10, 4) for _ in range(4)]
    half = random_pair(rng, 12, 10, 2)
    for root, zero in (("cancels", cancelling(half)), ("zero", (0 * pairs[3][0], pairs[3][1]))):
        for number, pair in enumerate(pairs):
            write_adapter(tmp_path / root / str(number), {"a": pair, "b": zero if number == 3 else pair})
    found = []
    for root in ("cancels", "zero"):
        with caplog.at_level("INFO", logger="subspace3d"):
            found.append(
                load_subspace(mine.run(MineConfig(tmp_path / root, tmp_path / f"{root}.safetensors", 3, model)))
            )
        assert f"{root}/3 changes nothing in 1 of the 2 modules that others change, such as b" in caplog.text
    for module, explained in ((each.modules["b"], each.header["modules"]["b"]["explained"]) for each in found):
        assert explained[3] is None and all(0 < share <= 1 for share in explained[:3])
        torch.testing.assert_close(projector(module.u), projector(found[1].modules["b"].u), rtol=0, atol=FLOAT32)
        torch.testing.assert_close(module.singular_values, found[1].modules["b"].singular_values)


def test_energies_are_exact_where_factors_nearly_cancel(rng):
    lora_b, lora_a = (side.double() for side in random_pair(rng, 30, 20, 3))
    moved_b, moved_a = (side + 1e-7 * torch.from_numpy(rng.standard_normal(side.shape)) for side in (lora_b, lora_a))
    b, a = torch.cat([moved_b, -lora_b], 1)[None, None], torch.cat([moved_a, lora_a])[None, None]
    delta = (moved_b - lora_b) @ moved_a + lora_b @ (moved_a - lora_a)
    # rounding of the factors, 2^-53, over the 1e-7 that is left of them
    assert float(stacks.energy(b, a)) == pytest.approx(float(delta.square().sum()), rel=1e-7)
    u, v = (torch.from_numpy(orthonormal(rng, size, 5)) for size in (30, 20))
    inside = float((u.T @ delta @ v).square().sum())
    assert float(stacks.projected_energy(b, a, u[None], v[None])) == pytest.approx(inside, rel=1e-6)


def test_an_adapter_that_changes_nothing_is_refused(tmp_path, rng):
    pairs = [random_pair(rng, 12, 10, 4) for _ in range(3)]
    for root, zero in (("zero", (0 * pairs[2][0], pairs[2][1])), ("cancels", cancelling(pairs[2]))):
        for number, pair in enumerate((*pairs[:2], zero)):
            write_adapter(tmp_path / root / str(number), {"a": pair, "b": pair})
        for model in ("mean", "auto"):
            with pytest.raises(ValueError, match=f"{root}/2 changes nothing: its update is zero in all 2 modules"):
                mine.run(MineConfig(tmp_path / root, tmp_path / "out.safetensors", k=3, model=model))
    write_adapter(tmp_path / "untrained" / "0", {"a": (0 * pairs[0][0], pairs[0][1])})
    write_adapter(tmp_path / "untrained" / "1", {"a": (0 * pairs[1][0], pairs[1][1])})
    for model in ("mean", "auto"):
        with pytest.raises(ValueError, match="untrained/0 changes nothing"):
            mine.run(MineConfig(tmp_path / "untrained", tmp_path / "out.safetensors", k=3, model=model))
    assert not (tmp_path / "out.safetensors").exists()


def test_what_is_chosen_needs_two_adapters_and_fits_their_ranks(tmp_path, rng):
    write_adapter(tmp_path / "in" / "0", {NAME: random_pair(rng, 12, 10, 2)})
    out = tmp_path / "out.safetensors"
    for setting, given in (("k", "an integer"), ("model", "mean or shared")):
        with pytest.raises(ValueError, match=f"{setting} must be {given} for a single adapter"):
            mine.run(MineConfig(tmp_path / "in", out, **{"k": 2, setting: "auto"}))
    write_adapter(tmp_path / "in" / "1", {NAME: random_pair(rng, 12, 10, 2)})
    # fewer directions than models are usually compared at
    assert load_subspace(mine.run(MineConfig(tmp_path / "in", out, k="auto", model="auto"))).header["k"] == "auto"


def test_the_next_command_names_only_backbones_that_there_are(tmp_path, rng, capsys):
    for name, said in (("facebook/VGGT-1B", "ITS_NAME --weights"), ("vggt-1b@0123456789ab", "vggt-1b --weights")):
        root = tmp_path / name.replace("/", "-")
        write_adapter(root, {NAME: random_pair(rng, 12, 10, 2)}, base_model_name_or_path=name)
        mine.run(MineConfig(root, tmp_path / f"{root.name}.safetensors", k=2))
        assert f"--backbone {said}" in capsys.readouterr().out.splitlines()[-1]


def test_adapters_that_do_not_belong_together_are_refused(tmp_path, rng):
    pair, other = random_pair(rng, 12, 10, 2), random_pair(rng, 12, 9, 2)
    cases = {
        "adapters must have one base model: .*'planted', .*'another'": (
            {NAME: pair},
            {"base_model_name_or_path": "another"},
        ),
        f"a has {NAME}, .*b has not": ({"x": pair}, {}),
        rf"{NAME} must have one size \[out, in\]: .*\[12, 10\], .*\[12, 9\]": ({NAME: other}, {}),
    }
    for index, (message, (modules, config)) in enumerate(cases.items()):
        root = tmp_path / str(index)
        write_adapter(root / "a", {NAME: pair})
        write_adapter(root / "b", modules, **config)
        with pytest.raises(ValueError, match=message):
            mine.run(MineConfig(root, tmp_path / "out.safetensors", k=2))


def test_one_model_under_two_names_is_mined_when_it_is_given_one(tmp_path, rng, capsys):
    for name, base in (("a", "facebook/VGGT-1B"), ("b", "/models/vggt")):
        write_adapter(tmp_path / "in" / name, {NAME: random_pair(rng, 12, 10, 2)}, base_model_name_or_path=base)
    out = tmp_path / "out.safetensors"
    with pytest.raises(ValueError, match=r"one base model: .*give it one name \(--base-model\)"):
        mine.run(MineConfig(tmp_path / "in", out, k=2))
    config = MineConfig(tmp_path / "in", out, k=2, base_model="vggt-1b")
    assert load_subspace(mine.run(config)).header["base_model"] == "vggt-1b"
    capsys.readouterr()
    mine.run(config)
    assert "already mined" in capsys.readouterr().out


def test_the_end_counts_what_was_taken_and_left_out(tmp_path, rng, capsys):
    for name in ("a", "b"):
        write_adapter(tmp_path / "in" / name, {NAME: random_pair(rng, 12, 10, 2)})
    write_adapter(tmp_path / "in/a/checkpoint-7", {NAME: random_pair(rng, 12, 10, 2)})
    shutil.copytree(tmp_path / "in/b", tmp_path / "in/c")
    mine.run(MineConfig(tmp_path / "in", tmp_path / "out.safetensors", k=2))
    counts, following = capsys.readouterr().out.splitlines()[-2:]
    assert following.startswith("next: ")
    assert counts.startswith("2 adapters taken; left out: 1 checkpoints") and "1 copies" in counts


def test_an_adapter_that_was_saved_twice_is_one(tmp_path, rng, capsys):
    pair = random_pair(rng, 12, 10, 2)
    # the order of a set is another one in every process
    for name, settings in (
        ("a", {"target_modules": ["qkv", "proj"], "peft_version": "0.18.0"}),
        ("b", {"target_modules": ["proj", "qkv"], "peft_version": "0.19.0", "use_rslora": False}),
        ("c", {"target_modules": ["qkv", "proj"], "lora_alpha": 5}),
    ):
        write_adapter(tmp_path / "in" / name, {NAME: pair}, **settings)
    path = mine.run(MineConfig(tmp_path / "in", tmp_path / "out.safetensors", k=2))
    assert [entry["path"] for entry in load_subspace(path).header["adapters"]] == ["a", "c"]
    assert "2 adapters taken; left out: 1 copies" in capsys.readouterr().out
    # found again by the copy's name or its own
    (tmp_path / "both").mkdir()
    shutil.copytree(tmp_path / "in/b", tmp_path / "both/0")
    shutil.copytree(tmp_path / "in", tmp_path / "both/1")
    attribute = {"out": load_subspace(path)}
    folders = find_mined_adapters(attribute, [tmp_path / "both"])["out"]
    assert folders == [tmp_path / "both/1/a", tmp_path / "both/1/c"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["adapter_model.bin"], "only adapter_model.bin: only adapter_model.safetensors is read, never a pickle"),
        (["model.safetensors"], "model.safetensors in the place of adapter_model.safetensors: rename it"),
        (["adapter_model-00001-of-00002.safetensors", "adapter_model-00002-of-00002.safetensors"], "in 2 files"),
        ([], "no weights, adapter_model.safetensors"),
    ],
)
def test_weights_under_another_name_are_named(tmp_path, rng, names, message):
    folder = write_adapter(tmp_path / "in", {NAME: random_pair(rng, 12, 10, 2)})
    (folder / "adapter_model.safetensors").unlink()
    for name in names:
        (folder / name).write_bytes(b"")
    with pytest.raises(ValueError, match=message):
        mine.run(MineConfig(folder, tmp_path / "out.safetensors", k=2))


@pytest.mark.parametrize(
    ("name", "value"), [("k", 0), ("k", 2.0), ("p", 0.0), ("p", 2.5), ("eps", 0.0), ("max_iter", 0), ("tol", -1.0)]
)
def test_settings_out_of_range_are_refused(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*{value}"):
        MineConfig(tmp_path, tmp_path / "out.safetensors", **{name: value})


def test_a_name_that_a_folder_of_subspaces_would_overlook_is_refused(tmp_path, rng):
    write_adapter(tmp_path / "in", {NAME: random_pair(rng, 12, 10, 2)})
    with pytest.raises(ValueError, match=r"out must be a name that ends in \.safetensors, got .*texture'"):
        mine.run(MineConfig(tmp_path / "in", tmp_path / "texture", k=2))
    assert not (tmp_path / "texture").exists()
