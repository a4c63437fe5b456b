"""Spectra, disentanglement and weights of mined subspaces, from files to analysis.json and figures."""

from __future__ import annotations

import json
import math

import pytest
import torch
from mining.synthetic_adapters import orthonormal, planted_pair, write_adapter

from subspace3d.commands import analyze, mine
from subspace3d.commands.analyze import AnalyzeConfig
from subspace3d.commands.mine import MineConfig
from subspace3d.formats.subspace import load_subspaces
from subspace3d.mining.analyze import analyze as analyze_subspaces
from subspace3d.mining.analyze import describe, random_level
from subspace3d.mining.spectra import behaviour, find_drops, place
from subspace3d.mining.stacks import explained_energy
from subspace3d.reporting.spectra_figures import draw_behaviours

NAMES = [f"aggregator.frame_blocks.{layer}.attn.qkv" for layer in range(2)] + ["head.out"]
RANK = 2

# u is stored in float32, so an angle of zero is known to about 2^-24 per entry, and 1 - cos to its square
FLOAT32 = 1e-5


def _mine(root, attribute, bases, rng, base_model="planted", spread=0.02):
    for number in range(3):
        modules = {name: planted_pair(rng, left, right, spread) for name, (left, right) in bases.items()}
        write_adapter(root / "adapters" / attribute / str(number), modules, base_model_name_or_path=base_model)
    out = root / "subspaces" / f"{attribute}.safetensors"
    return mine.run(MineConfig(root / "adapters" / attribute, out, k=RANK))


def _orthogonal_bases(rng, count):
    """For each of ``count`` attributes: bases that are orthogonal to those of all others."""
    bases = [{} for _ in range(count)]
    for name in NAMES:
        left, right = orthonormal(rng, 12, RANK * count), orthonormal(rng, 14, RANK * count)
        for index in range(count):
            columns = slice(RANK * index, RANK * (index + 1))
            bases[index][name] = left[:, columns], right[:, columns]
    return bases


def test_planted_orthogonal_and_identical_attributes(tmp_path, rng):
    one, two = _orthogonal_bases(rng, 2)
    for attribute, bases in (("texture", one), ("camera", two), ("zebra", one)):
        _mine(tmp_path, attribute, bases, rng)
    path = analyze.run(AnalyzeConfig(tmp_path / "analysis", (tmp_path / "subspaces",)))
    analysis = json.loads(path.read_text())
    assert analysis["attributes"] == ["texture", "camera", "zebra"]
    for side in ("output", "input"):
        pairs = {tuple(pair["attributes"]): pair for pair in analysis["disentanglement"][side]}
        assert set(pairs) == {("texture", "camera"), ("texture", "zebra"), ("camera", "zebra")}
        for names, expected in ((("texture", "camera"), 1.0), (("texture", "zebra"), 0.0)):
            for row in pairs[names]["modules"].values():
                assert row["eigenvalues"] == pytest.approx([expected] * RANK, abs=FLOAT32)
            assert pairs[names]["mean_smallest"] == pytest.approx(expected, abs=FLOAT32)
        level = analysis["disentanglement"]["random"][pairs["texture", "camera"]["modules"][NAMES[0]]["random"]]
        assert 0 < level["low"][0] < level["mean"][0] < level["high"][0] < 1
    for figure in ("spectra", "largest", "disentanglement", "weights"):
        assert (tmp_path / "analysis" / f"{figure}.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_files_are_not_analyzed_twice_and_changed_ones_are(tmp_path, rng, capsys):
    (bases,) = _orthogonal_bases(rng, 1)
    _mine(tmp_path, "texture", bases, rng)
    config = AnalyzeConfig(tmp_path / "a", (tmp_path / "subspaces",))
    first = analyze.run(config).stat().st_mtime_ns
    assert analyze.run(config).stat().st_mtime_ns == first
    assert "already made" in capsys.readouterr().out
    # one attribute has nothing to be compared with
    assert not (tmp_path / "a" / "disentanglement.png").exists()
    mine.run(MineConfig(tmp_path / "adapters" / "texture", tmp_path / "subspaces" / "texture.safetensors", k=1))
    assert json.loads(analyze.run(config).read_text())["spectra"]["texture"][NAMES[0]]["k"] == 1


def test_spectra_of_the_shared_model_end_at_what_k_directions_leave_and_have_no_behaviour(tmp_path, rng):
    (bases,) = _orthogonal_bases(rng, 1)
    _mine(tmp_path, "texture", bases, rng)
    path = tmp_path / "shared" / "texture.safetensors"
    mine.run(MineConfig(tmp_path / "adapters" / "texture", path, k=1, model="shared"))
    analysis = analyze_subspaces(load_subspaces([path.parent]))
    assert analysis["models"] == {"texture": "shared"} and not any(analysis["behaviours"]["texture"].values())
    for spectrum in analysis["spectra"]["texture"].values():
        assert len(spectrum["singular_values"]) == 3 and min(spectrum["singular_values"]) > 0
        assert spectrum["behaviour"] is spectrum["rank"] is None
    assert draw_behaviours(analysis) is None
    assert not any("drop of the spectrum" in line for line in describe(analysis))


def test_shared_updates_drop_at_the_rank(tmp_path, rng):
    (bases,) = _orthogonal_bases(rng, 1)
    _mine(tmp_path, "texture", bases, rng)
    analysis = analyze_subspaces(load_subspaces([tmp_path / "subspaces"]))
    assert analysis["behaviours"]["texture"] == {"at rank": 3, "at rank and beyond": 0, "beyond rank": 0, "none": 0}
    for spectrum in analysis["spectra"]["texture"].values():
        assert spectrum["drops"] == [RANK]
        assert spectrum["rank"] == spectrum["k"] == RANK
        values = spectrum["singular_values"]
        # what is left past the rank is rounding noise, which counts as a millionth of the first value
        assert spectrum["ratio_at_rank"] == pytest.approx(values[RANK - 1] / (1e-6 * values[0]), rel=1e-3)
        assert spectrum["largest_ratio_beyond"] == {"at": RANK + 1, "ratio": 1.0}
        assert len(spectrum["singular_values"]) == 3 * RANK
    assert analysis["modules"][NAMES[1]] == {
        "out": 12,
        "in": 14,
        "family": "aggregator.frame_blocks",
        "layer": 1,
        "kind": "attn.qkv",
    }
    weights = analysis["weights"]["texture"]
    assert weights["adapters"] == ["0", "1", "2"]
    assert sum(weights["mean"]) == pytest.approx(3, abs=1e-5)
    assert weights["most_down_weighted"] == weights["adapters"][weights["mean"].index(min(weights["mean"]))]
    assert weights["down_weighted"] == [
        name for name, share in zip(weights["adapters"], weights["below_half"]) if share > 0.5
    ]
    assert analysis["cross_validation"] is None
    assert analysis["disentanglement"] == {"output": [], "input": [], "random": {}}


def test_a_bad_adapter_is_named(tmp_path, rng, capsys):
    (bases,) = _orthogonal_bases(rng, 1)
    for number in range(4):
        modules = {name: planted_pair(rng, left, right, 0.02) for name, (left, right) in bases.items()}
        if number == 2:
            modules = {name: (torch.randn_like(b), torch.randn_like(a)) for name, (b, a) in modules.items()}
        write_adapter(tmp_path / "adapters" / "texture" / f"set_{number}", modules)
    mine.run(MineConfig(tmp_path / "adapters", tmp_path / "subspaces" / "texture.safetensors", k=RANK))
    analyze.run(AnalyzeConfig(tmp_path / "a", (tmp_path / "subspaces",)))
    weights = json.loads((tmp_path / "a" / "analysis.json").read_text())["weights"]["texture"]
    assert weights["down_weighted"] == ["texture/set_2"]
    assert weights["below_half"][2] == 1.0
    assert "less than half of the mean weight in most modules: texture/set_2" in capsys.readouterr().out


def test_a_module_nobody_trained_has_no_eigenvalues(tmp_path, rng):
    one, two = _orthogonal_bases(rng, 2)
    one["head.out"] = (0 * one["head.out"][0], one["head.out"][1])
    _mine(tmp_path, "texture", one, rng)
    _mine(tmp_path, "camera", two, rng)
    analysis = json.loads(analyze.run(AnalyzeConfig(tmp_path / "a", (tmp_path / "subspaces",))).read_text())
    pair = analysis["disentanglement"]["output"][0]
    assert pair["modules"]["head.out"]["eigenvalues"] == []
    assert pair["mean_smallest"] == pytest.approx(1, abs=FLOAT32)
    # nor has it a part in the level of chance
    levels = analysis["disentanglement"]["random"]
    chance = [levels[row["random"]]["mean"][0] for row in pair["modules"].values() if row["eigenvalues"]]
    assert pair["mean_smallest_random"] == pytest.approx(sum(chance) / len(chance), abs=1e-6)


def test_files_that_cannot_be_compared_are_refused(tmp_path, rng):
    (bases,) = _orthogonal_bases(rng, 1)
    _mine(tmp_path / "x", "texture", bases, rng)
    _mine(tmp_path / "y", "camera", bases, rng, base_model="another")
    _mine(tmp_path / "z", "camera", {NAMES[0]: bases[NAMES[0]]}, rng)
    with pytest.raises(ValueError, match="base models must agree: texture has 'planted', camera has 'another'"):
        analyze.run(AnalyzeConfig(tmp_path / "a", (tmp_path / "x" / "subspaces", tmp_path / "y" / "subspaces")))
    with pytest.raises(ValueError, match=f"modules must agree: {NAMES[1]} is in only one"):
        analyze.run(AnalyzeConfig(tmp_path / "a", (tmp_path / "x" / "subspaces", tmp_path / "z" / "subspaces")))
    assert not (tmp_path / "a").exists()


def test_random_level_of_lines_in_the_plane():
    # two random lines in a plane: the angle is uniform in 0..90 degrees, so 1 - cos has mean 1 - 2 / pi and
    # standard deviation sqrt(1/2 - 4 / pi^2); four standard errors of the mean of 64 draws
    level = random_level(2, 1, 1)
    error = 4 * math.sqrt(0.5 - 4 / math.pi**2) / 8
    assert level["mean"][0] == pytest.approx(1 - 2 / math.pi, abs=error)
    assert random_level(2, 1, 1) == level


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("aggregator.frame_blocks.11.mlp.fc1", ("aggregator.frame_blocks", 11, "mlp.fc1")),
        ("layers.0.attention.q_proj", ("layers", 0, "attention.q_proj")),
        ("depth_head.projects.2", ("depth_head.projects", 2, "projects")),
        ("embed_pose", ("", None, "embed_pose")),
    ],
)
def test_places_of_modules(name, expected):
    where = place(name)
    assert (where.family, where.layer, where.kind) == expected


def test_drops_are_steps_that_stand_out():
    smooth = [0.9**index for index in range(20)]
    assert find_drops(smooth) == []
    assert find_drops(smooth[:8] + [0.2 * value for value in smooth[8:]]) == [8]
    two = smooth[:4] + [0.3 * value for value in smooth[4:10]] + [0.05 * value for value in smooth[10:]]
    assert find_drops(two) == [4, 10]
    # rounding noise below a millionth of the first value has no structure
    assert find_drops([1.0, 0.9, 0.8, 1e-9, 1e-12, 1e-15]) == [3]
    assert find_drops([0.0, 0.0]) == find_drops([1.0]) == find_drops([]) == []


def test_behaviours_are_named_by_drops_at_and_beyond_the_rank():
    assert behaviour([4], 4, 12) == "at rank"
    assert behaviour([2, 4, 8], 4, 12) == "at rank and beyond"
    assert behaviour([8], 4, 12) == "beyond rank"
    assert behaviour([2], 4, 12) == "none"
    assert behaviour([], 4, 4) is None


def test_explained_energy_is_the_share_inside_both_projectors():
    lora_b, lora_a = torch.eye(3, 2, dtype=torch.float64), torch.eye(2, 4, dtype=torch.float64)
    lora_a[1, 1] = 2
    u, v = torch.eye(3, 1, dtype=torch.float64), torch.eye(4, 1, dtype=torch.float64)
    # the update is diag(1, 2), the subspaces hold its first entry: 1 / (1 + 4)
    share = explained_energy(lora_b[None, None], lora_a[None, None], 3 * u[None], v[None])
    torch.testing.assert_close(share, torch.tensor([[0.2]], dtype=torch.float64))
