"""Bad adapters: made as said, and measured as said."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mining.synthetic_adapters import orthonormal, write_adapter
from training.plane_scenes import write_plane_scenes

from experiments import planted
from subspace3d.formats.adapter import read_adapter
from subspace3d.formats.scene import find_scenes
from subspace3d.formats.subspace import ModuleSubspace, SubspaceFile

MODULES = {"a": (12, 20), "b": (8, 6)}


def _write_adapters(root, rng, names):
    for name in names:
        modules = {
            module: (torch.from_numpy(rng.standard_normal((out, 2))), torch.from_numpy(rng.standard_normal((2, into))))
            for module, (out, into) in MODULES.items()
        }
        write_adapter(root / name, modules)


def test_planted_adapters_stand_beside_the_good_ones(tmp_path, rng):
    _write_adapters(tmp_path / "good" / "texture", rng, ["texture_00", "texture_01"])
    _write_adapters(tmp_path / "wrong" / "texture", rng, ["wrong"])
    planted.gather(tmp_path / "good", tmp_path / "wrong", tmp_path / "planted")
    folder = tmp_path / "planted" / "texture"
    assert sorted(path.name for path in folder.iterdir()) == ["noise", "texture_00", "texture_01", "wrong"]
    for name in MODULES:
        norms = {
            path.name: np.linalg.norm((b @ a).numpy())
            for path in folder.iterdir()
            for b, a in [read_adapter(path).modules[name]]
        }
        largest = max(norms["texture_00"], norms["texture_01"])
        # factors are stored in float32
        assert norms["noise"] == pytest.approx(planted.NOISE_STRENGTH * largest, rel=1e-5)


def test_wrong_scenes_show_one_data_set_and_hold_the_truth_of_another(tmp_path):
    for seed, name in enumerate(("texture_00", "texture_01")):
        write_plane_scenes(tmp_path / "scenes" / "texture" / name, scenes=2, views=2, seed=seed)
    planted.write_wrong_scenes(tmp_path / "scenes", tmp_path / "wrong")
    made = find_scenes(tmp_path / "wrong" / "texture" / "wrong")
    shown, true = (find_scenes(tmp_path / "scenes" / "texture" / name) for name in ("texture_00", "texture_01"))
    assert len(made) == 2
    for wrong, image, depth in zip(made, shown, true):
        assert (wrong / "images/0000.png").read_bytes() == (image / "images/0000.png").read_bytes()
        for file in ("depth/0000.png", "scene.json"):
            assert (wrong / file).read_bytes() == (depth / file).read_bytes()


def test_kept_share_is_the_mean_squared_cosine_of_the_principal_angles(rng):
    basis = orthonormal(rng, 12, 6)
    first, rest = basis[:, :2], basis[:, 2:4]
    angles = np.array([0.3, 1.1])
    turned = first * np.cos(angles) + rest * np.sin(angles)

    def subspace(columns: np.ndarray) -> SubspaceFile:
        # any basis of the column space: neither scale nor mixing of the columns may matter
        mixed = torch.from_numpy(columns @ rng.standard_normal((2, 2))).float()
        return SubspaceFile({"a": ModuleSubspace(mixed, mixed, torch.ones(2), torch.ones(1))}, {})

    found = planted.kept_share(subspace(first), subspace(turned))
    assert found == pytest.approx(float(np.mean(np.cos(angles) ** 2)), abs=1e-4)
