"""Adapters left out in turn: planted subspaces, the dense definition, finding the adapters by their hashes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from mining.synthetic_adapters import AT_REST, dense_mining, orthonormal, planted_pair, random_pair, write_adapter

from subspace3d.commands import analyze, mine
from subspace3d.commands.analyze import AnalyzeConfig
from subspace3d.commands.mine import MineConfig
from subspace3d.formats.adapter import read_adapter
from subspace3d.formats.adapter_folders import find_adapters
from subspace3d.formats.subspace import load_subspaces
from subspace3d.mining.cross_validation import cross_validate, find_mined_adapters, overlap

NAMES = [f"blocks.{layer}.mlp.fc1" for layer in range(2)]
OUT, IN, RANK, COUNT = 12, 14, 2, 4


@pytest.fixture
def planted(tmp_path, rng):
    """Two attributes on orthogonal subspaces, each shared by its adapters but for their mixing."""
    for number, attribute in enumerate(("texture", "camera")):
        columns = slice(RANK * number, RANK * (number + 1))
        bases = {name: (_BASES[name][0][:, columns], _BASES[name][1][:, columns]) for name in NAMES}
        for adapter in range(COUNT):
            pairs = {name: planted_pair(rng, *bases[name], spread=0.05) for name in NAMES}
            write_adapter(tmp_path / "adapters" / attribute / str(adapter), pairs)
        mine.run(MineConfig(tmp_path / "adapters" / attribute, tmp_path / "mined" / f"{attribute}.safetensors", k=RANK))
    return tmp_path


_RNG = np.random.default_rng(1)
_BASES = {name: (orthonormal(_RNG, OUT, 2 * RANK), orthonormal(_RNG, IN, 2 * RANK)) for name in NAMES}


def test_a_shared_subspace_is_stable_and_explains_its_own_adapters_alone(planted):
    path = analyze.run(AnalyzeConfig(planted / "out", (planted / "mined",), adapters=(planted / "adapters",)))
    validation = json.loads(path.read_text())["cross_validation"]
    for attribute, other in (("texture", "camera"), ("camera", "texture")):
        explained = validation["explained"][attribute]
        assert explained["adapters"] == ["0", "1", "2", "3"]
        # float32 factors: energies are known to about 1e-6
        for share, expected in (
            (explained["subspaces"][attribute], 1.0),
            (explained["held_out"], 1.0),
            (explained["subspaces"][other], 0.0),
            (explained["random"], RANK**2 / (OUT * IN)),
        ):
            assert share["adapters"] == pytest.approx([expected] * COUNT, abs=2e-6)
            assert share["mean"] == pytest.approx(expected, abs=2e-6)
            assert list(share["modules"].values()) == pytest.approx([expected] * 2, abs=2e-6)
        for side, dim in (("output", OUT), ("input", IN)):
            stability = validation["stability"][attribute][side]
            assert stability["adapters"] == pytest.approx([1.0] * COUNT, abs=2e-6)
            assert stability["random"] == pytest.approx(RANK / dim, abs=1e-6)
            assert {name: len(row) for name, row in stability["modules"].items()} == dict.fromkeys(NAMES, COUNT)
    for figure in ("stability", "explained", "behaviours", "disentanglement_layers"):
        assert (planted / "out" / f"{figure}.png").read_bytes().startswith(b"\x89PNG")


def test_leaving_one_out_is_mining_the_others_densely(tmp_path, rng):
    for adapter in range(COUNT):
        write_adapter(tmp_path / "adapters" / str(adapter), {name: random_pair(rng, OUT, IN, RANK) for name in NAMES})
    mine.run(MineConfig(tmp_path / "adapters", tmp_path / "texture.safetensors", k=3, **AT_REST))
    subspaces = load_subspaces([tmp_path / "texture.safetensors"])
    folders = find_mined_adapters(subspaces, [tmp_path / "adapters"])
    result = cross_validate(subspaces, ["texture"], folders)
    adapters = [read_adapter(folder) for folder in find_adapters(tmp_path / "adapters")]
    inside, whole = np.zeros(COUNT), np.zeros(COUNT)
    for name in NAMES:
        deltas = np.stack([(a.modules[name][0].double() @ a.modules[name][1].double()).numpy() for a in adapters])
        every = np.linalg.svd(dense_mining(deltas, 3, 1.0)[0])
        for n in range(COUNT):
            left, _, right = np.linalg.svd(dense_mining(np.delete(deltas, n, 0), 3, 1.0)[0])
            cosines = np.linalg.svd(every[0][:, :3].T @ left[:, :3])[1]
            found = result["stability"]["texture"]["output"]["modules"][name][n]
            # full u is stored in float32
            assert found == pytest.approx(np.mean(cosines**2), abs=1e-5)
            inside[n] += np.linalg.norm(left[:, :3].T @ deltas[n] @ right[:3].T) ** 2
            whole[n] += np.linalg.norm(deltas[n]) ** 2
    assert result["explained"]["texture"]["held_out"]["adapters"] == pytest.approx(inside / whole, abs=1e-5)
    # an adapter bends the subspace towards itself
    assert result["explained"]["texture"]["subspaces"]["texture"]["mean"] > np.mean(inside / whole) + 0.05


def test_one_adapter_cannot_be_left_out(tmp_path, rng):
    write_adapter(tmp_path / "adapters" / "only", {NAMES[0]: random_pair(rng, OUT, IN, RANK)})
    mine.run(MineConfig(tmp_path / "adapters", tmp_path / "mined" / "texture.safetensors", k=RANK))
    path = analyze.run(AnalyzeConfig(tmp_path / "out", (tmp_path / "mined",), adapters=(tmp_path / "adapters",)))
    validation = json.loads(path.read_text())["cross_validation"]
    assert validation["stability"]["texture"] is None
    assert validation["explained"]["texture"]["held_out"] is None
    assert validation["explained"]["texture"]["subspaces"]["texture"]["mean"] == pytest.approx(1, abs=2e-6)
    assert not (tmp_path / "out" / "stability.png").exists()


def test_an_analysis_without_adapters_is_made_anew_when_they_are_given(planted):
    config = AnalyzeConfig(planted / "out", (planted / "mined",))
    assert json.loads(analyze.run(config).read_text())["cross_validation"] is None
    given = AnalyzeConfig(planted / "out", (planted / "mined",), adapters=(planted / "adapters",))
    made = analyze.run(given).stat().st_mtime_ns
    assert json.loads((planted / "out" / "analysis.json").read_text())["cross_validation"] is not None
    # neither asks for more than is there
    assert analyze.run(given).stat().st_mtime_ns == analyze.run(config).stat().st_mtime_ns == made


def test_adapters_are_known_by_their_hashes(planted):
    subspaces = load_subspaces([planted / "mined"])
    (planted / "adapters" / "texture").rename(planted / "adapters" / "moved")
    found = find_mined_adapters(subspaces, [planted / "adapters"])
    assert [folder.name for folder in found["texture"]] == ["0", "1", "2", "3"]
    assert found["texture"][0].parent.name == "moved"
    with pytest.raises(ValueError, match="adapters must hold those of texture: 0 is not below"):
        find_mined_adapters(subspaces, [planted / "adapters" / "camera"])
    del subspaces["texture"].header["p"]
    with pytest.raises(ValueError, match="header of texture must have p"):
        find_mined_adapters(subspaces, [planted / "adapters"])


def test_overlap_by_hand():
    axes = torch.eye(4)
    spaces = torch.stack([axes[:, [0, 1]], axes[:, [0, 1]], axes[:, [0, 1]]])
    others = torch.stack([3 * axes[:, [0, 2]], axes[:, [0, 1]] @ torch.tensor([[1.0, 2], [0, 1]]), axes[:, [2, 3]]])
    torch.testing.assert_close(overlap(spaces, others), torch.tensor([0.5, 1, 0], dtype=torch.float64))
    # a line inside a plane is held whole; a space that is zero has no angles
    torch.testing.assert_close(overlap(axes[None, :, :1], spaces[:1]), torch.ones(1, dtype=torch.float64))
    assert overlap(0 * axes[None, :, :1], spaces[:1]).isnan().all()
