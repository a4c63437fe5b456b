"""Which model of sharing, how many directions, and joined sources, on planted adapters."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from mining.synthetic_adapters import orthonormal, random_pair, write_adapter

from subspace3d.commands import mine
from subspace3d.commands.mine import MineConfig
from subspace3d.formats.adapter import PEFT_PREFIX
from subspace3d.formats.subspace import ModuleSubspace, load_subspace
from subspace3d.mining.join import join
from subspace3d.mining.selection import HeldOut, choose_k, compare_models, rotated
from subspace3d.mining.stacks import Factors

SETTINGS = {"p": 1.0, "eps": 1e-3, "max_iter": 30, "tol": 1e-4}
NAME = "aggregator.frame_blocks.0.attn.qkv"
OUT, IN, RANK = 40, 36, 3


def planted(rng: np.random.Generator, kind: str, adapters: int = 6, noise: float = 0.3) -> Factors:
    """Adapters ``left core_n right^T + noise``: one core for all, one each, or nothing in common."""
    left, right = orthonormal(rng, OUT, RANK), orthonormal(rng, IN, RANK)
    common = orthonormal(rng, RANK, RANK)
    module = []
    for _ in range(adapters):
        core = common if kind == "mean" else orthonormal(rng, RANK, RANK)
        if kind == "unrelated":
            left, right = orthonormal(rng, OUT, RANK), orthonormal(rng, IN, RANK)
        own = orthonormal(rng, OUT, RANK), orthonormal(rng, IN, RANK)
        b = np.concatenate([left @ core, noise * own[0]], 1)
        a = np.concatenate([right, own[1]], 1).T
        module.append((torch.from_numpy(b), torch.from_numpy(a)))
    return module


@pytest.mark.parametrize("kind", ["shared", "mean"])
def test_the_model_that_fits_is_named_with_the_null_beside_it(rng, kind):
    found = compare_models({NAME: planted(rng, kind, noise=1.0)}, RANK, SETTINGS)
    assert found is not None
    # as much noise as signal: half the energy is planted, and nearly all of that is found
    assert max(found.shares.values()) == pytest.approx(0.5, abs=0.05)
    # of unrelated ones about k^2 / (out in)
    assert max(found.unrelated.values()) < 0.05
    assert found.best == kind
    if kind == "shared":
        assert found.shares["shared"] > found.shares["mean"] + 0.01
    assert f"(model {found.best})" in found.sentence() and f"{found.shares[found.best]:.1%}" in found.sentence()


def test_one_adapter_cannot_be_compared(rng):
    assert compare_models({NAME: planted(rng, "mean", adapters=1)}, 2, SETTINGS) is None


def test_k_counts_what_stands_above_unrelated_adapters(rng):
    modules = {"blocks.0.proj": planted(rng, "shared"), "blocks.1.proj": planted(rng, "unrelated")}
    assert choose_k(modules, "shared", SETTINGS) == {"blocks.0.proj": RANK, "blocks.1.proj": 0}
    modules = {"blocks.0.proj": planted(rng, "mean"), "blocks.1.proj": planted(rng, "unrelated")}
    assert choose_k(modules, "mean", SETTINGS) == {"blocks.0.proj": RANK, "blocks.1.proj": 0}


def test_unrelated_adapters_are_said_to_share_nothing():
    found = HeldOut({"mean": 0.01, "shared": 0.004}, {"mean": 0.02, "shared": 0.01})
    assert "share nothing that the model mean sees" in found.sentence()


def test_unrelated_adapters_keep_their_singular_values_and_nothing_else():
    generator = torch.Generator().manual_seed(3)
    b, a = (
        torch.randn(1, 2, 30, 3, generator=generator).double(),
        torch.randn(1, 2, 3, 25, generator=generator).double(),
    )
    b, a = b[:, :1].expand(1, 2, 30, 3), a[:, :1].expand(1, 2, 3, 25)
    one, two = rotated(b, a, generator)
    torch.testing.assert_close(torch.linalg.svdvals(one @ two), torch.linalg.svdvals(b @ a), rtol=1e-10, atol=1e-10)
    turned = (one @ two)[0]
    cosine = float((turned[0] * turned[1]).sum() / turned[0].norm() / turned[1].norm())
    assert abs(cosine) < 0.3


def test_mine_says_what_it_chose(tmp_path, rng, caplog):
    module = planted(rng, "shared")
    for number, (b, a) in enumerate(module):
        write_adapter(tmp_path / "in" / str(number), {NAME: (b.float(), a.float())})
    config = MineConfig(tmp_path / "in", tmp_path / "out.safetensors", k="auto", model="auto")
    with caplog.at_level("INFO", logger="subspace3d"):
        header = load_subspace(mine.run(config)).header
    assert header["model"] == "shared" and header["modules"][NAME]["k"] == RANK and header["source"] == "tuned"
    assert header["held_out"]["shares"]["shared"] > header["held_out"]["unrelated"]["shared"]
    assert "(model shared)" in caplog.text and "k by module: 3 to 3" in caplog.text
    with pytest.raises(ValueError, match="k must be an integer of at least 1, or auto"):
        MineConfig(tmp_path, tmp_path / "x", k=0)


def write_gradient(folder, modules):
    """A folder whose weights say that they are a gradient."""
    from subspace3d.files import save_tensors

    folder.mkdir(parents=True)
    tensors = {}
    for name, (b, a) in modules.items():
        tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"], tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = a, b
    rank = len(next(iter(modules.values()))[1])
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "base_model_name_or_path": "planted"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_tensors(folder / "adapter_model.safetensors", tensors, {"source": "gradient"})


def test_joined_sources_take_outputs_of_both_and_inputs_of_the_gradients(tmp_path, rng):
    for number in range(2):
        write_adapter(tmp_path / "tuned" / str(number), {NAME: random_pair(rng, 12, 10, 2)})
        write_gradient(tmp_path / "gradients" / str(number), {NAME: random_pair(rng, 12, 10, 2)})
    path = mine.run(MineConfig(tmp_path / "tuned", tmp_path / "j.safetensors", k=2, join=tmp_path / "gradients"))
    both = load_subspace(path)
    own = load_subspace(mine.run(MineConfig(tmp_path / "tuned", tmp_path / "t.safetensors", k=2))).modules[NAME]
    gradient = load_subspace(mine.run(MineConfig(tmp_path / "gradients", tmp_path / "g.safetensors", k=2)))
    assert gradient.header["source"] == "gradient" and len(both.header["join"]) == 2
    torch.testing.assert_close(both.modules[NAME].v, gradient.modules[NAME].v)
    stacked = torch.cat([own.u / own.u.norm(), gradient.modules[NAME].u / gradient.modules[NAME].u.norm()], 1)
    left, values, _ = torch.linalg.svd(stacked, full_matrices=False)
    expected = left[:, :2] * values[:2]
    u = both.modules[NAME].u
    torch.testing.assert_close(u @ u.T, expected @ expected.T, rtol=1e-4, atol=1e-6)
    # of the gradients there may be more
    write_gradient(tmp_path / "gradients" / "2", {NAME: random_pair(rng, 12, 10, 2)})
    more = mine.run(MineConfig(tmp_path / "tuned", tmp_path / "m.safetensors", k=2, join=tmp_path / "gradients"))
    assert len(load_subspace(more).modules[NAME].weights) == len(load_subspace(more).header["join"]) == 3
    # a file without the gradients is another one
    again = load_subspace(mine.run(MineConfig(tmp_path / "tuned", path, k=2)))
    assert "join" not in again.header
    with pytest.raises(ValueError, match="join must hold gradient adapters"):
        mine.run(MineConfig(tmp_path / "tuned", tmp_path / "x.safetensors", k=2, join=tmp_path / "tuned"))


def test_join_refuses_other_modules():
    module = ModuleSubspace(torch.ones(3, 1), torch.ones(2, 1), torch.ones(1), torch.ones(1))
    with pytest.raises(ValueError, match="b is in only one"):
        join({"a": module}, {"a": module, "b": module})
