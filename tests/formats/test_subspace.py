"""Subspace files and the authors' layout: round trips, and what must be refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from subspace3d.formats.basis import load_authors, save_authors
from subspace3d.formats.subspace import ModuleSubspace, load_subspace, load_subspaces, save_subspace


def _module(out=6, in_=4, k=2):
    values = torch.arange(4.0).flip(0).double()
    return ModuleSubspace(torch.randn(out, k), torch.randn(in_, k), values, torch.rand(3).double())


def _save(path, names=("blocks.10.qkv", "blocks.2.qkv")):
    modules = {name: _module() for name in names}
    save_subspace(path, modules, {"base_model": "m", "k": 2})
    return modules


def test_round_trip_keeps_every_value_and_the_order_of_layers(tmp_path):
    modules = _save(tmp_path / "texture.safetensors")
    read = load_subspace(tmp_path / "texture.safetensors")
    assert list(read.modules) == ["blocks.2.qkv", "blocks.10.qkv"]
    assert read.header == {"format": "subspace3d-subspace", "version": 1, "base_model": "m", "k": 2}
    for name, module in modules.items():
        for field in ("u", "v", "singular_values", "weights"):
            torch.testing.assert_close(getattr(read.modules[name], field), getattr(module, field), rtol=0, atol=0)


def test_a_digit_that_does_not_count_is_a_letter_of_a_name(tmp_path):
    _save(tmp_path / "texture.safetensors", ("blocks.10", "blocks.2²", "blocks.2"))
    assert list(load_subspace(tmp_path / "texture.safetensors").modules) == ["blocks.2", "blocks.2²", "blocks.10"]


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"blocks.0.u": torch.ones(2, 2)}, path)
    with pytest.raises(ValueError, match="header format must be 'subspace3d-subspace', got None"):
        load_subspace(path)
    with pytest.raises(FileNotFoundError):
        load_subspace(tmp_path / "missing.safetensors")
    path.unlink()
    _save(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_subspace(path)


def test_bad_tensors_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    module = _module()
    save_subspace(path, {"a": ModuleSubspace(module.u, torch.ones(4, 3), module.weights, module.weights)}, {})
    with pytest.raises(ValueError, match=r"a must have u \[out, k\] and v \[in, k\], got \[6, 2\] and \[4, 3\]"):
        load_subspace(path)
    save_subspace(path, {"a": ModuleSubspace(module.u * float("nan"), module.v, module.weights, module.weights)}, {})
    with pytest.raises(ValueError, match=r"a\.u has NaN"):
        load_subspace(path)


def test_attributes_are_named_by_file_stems(tmp_path):
    _save(tmp_path / "s" / "texture.safetensors")
    _save(tmp_path / "s" / "camera.safetensors")
    _save(tmp_path / "lighting.safetensors")
    both = load_subspaces([tmp_path / "s", tmp_path / "lighting.safetensors"])
    assert list(both) == ["camera", "texture", "lighting"]
    with pytest.raises(ValueError, match="two subspace files are called 'texture'"):
        load_subspaces([tmp_path / "s", tmp_path / "s" / "texture.safetensors"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no subspace file"):
        load_subspaces([tmp_path / "empty"])
    with pytest.raises(FileNotFoundError, match="no subspace files given"):
        load_subspaces([])


def test_authors_layout_has_their_keys_and_shapes_and_reads_back(tmp_path):
    basis = {
        "aggregator.frame_blocks.3.attn.qkv": (torch.randn(12, 5), torch.randn(4, 5)),
        "aggregator.global_blocks.11.mlp.fc2": (torch.randn(4, 5), torch.randn(16, 5)),
    }
    path = tmp_path / "basis.safetensors"
    save_authors(path, basis)
    shapes = {key: tuple(tensor.shape) for key, tensor in load_file(path).items()}
    assert shapes == {
        "frame_blocks.attn.qkv.3.A": (5, 4),
        "frame_blocks.attn.qkv.3.B": (12, 5),
        "global_blocks.mlp.fc2.11.A": (5, 16),
        "global_blocks.mlp.fc2.11.B": (4, 5),
    }
    read = load_authors(path)
    assert read.keys() == basis.keys()
    for name, (u, v) in basis.items():
        torch.testing.assert_close(read[name][0], u, rtol=0, atol=0)
        torch.testing.assert_close(read[name][1], v, rtol=0, atol=0)


def test_authors_layout_of_pi3_reads_back(tmp_path):
    path = tmp_path / "basis.safetensors"
    names = ("decoder.0.attn.qkv", "decoder.2.mlp.fc1", "decoder.10.attn.proj")
    basis = {name: (torch.randn(12, 5), torch.randn(4, 5)) for name in names}
    save_authors(path, basis)
    keys = {"decoder.attn.qkv.0", "decoder.mlp.fc1.2", "decoder.attn.proj.10"}
    assert load_file(path).keys() == {f"{key}.{side}" for key in keys for side in "AB"}
    read = load_authors(path)
    assert tuple(read) == names and all(
        torch.equal(mine, theirs) for name in names for mine, theirs in zip(read[name], basis[name])
    )


def test_authors_layout_refuses_what_it_cannot_hold(tmp_path):
    path = tmp_path / "basis.safetensors"
    with pytest.raises(ValueError, match=r"no key for 'camera_head\.trunk\.0\.attn\.qkv'"):
        save_authors(path, {"camera_head.trunk.0.attn.qkv": (torch.ones(2, 1), torch.ones(2, 1))})
    assert not path.exists()
    key = "frame_blocks.attn.qkv.0"
    for tensors, message in (
        ({"decoder.attn.qkv.A": torch.ones(1, 2)}, "is foreign"),
        ({"camera_decoder.attn.qkv.0.A": torch.ones(1, 2)}, "is foreign"),
        ({f"{key}.A": torch.ones(1, 2)}, "has no B"),
        ({f"{key}.A": torch.ones(1, 2), f"{key}.B": torch.ones(2, 3)}, r"must have A \[K, in\]"),
    ):
        save_file(tensors, path)
        with pytest.raises(ValueError, match=message):
            load_authors(path)
