"""Inputs that once got through, or ended in another exception than the documented ones."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz.readers import READERS
from safetensors.torch import save_file

from subspace3d import files
from subspace3d.adapters.basis import warn_of_other_base
from subspace3d.backbones.model_card import licence_of_card
from subspace3d.datasets.readers import mesh_files
from subspace3d.datasets.readers.source import depth_at
from subspace3d.formats.subspace import ModuleSubspace, save_subspace
from subspace3d.training.trackers import MetricsFile


def _valid(name: str, folder: Path) -> Path:
    folder.mkdir()
    READERS[name].make(folder)
    return folder / READERS[name].target


def _replace(path: Path, *keys: object, value: object) -> None:
    record = node = json.loads(path.read_text())
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = value
    path.write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("reader", "keys", "value", "message"),
    [
        # R R^T - I of infinite entries is NaN, which is not more than the tolerance
        ("scene.json", ("frames", 0, "extrinsics_w2c", 0, 0), 1e200, "must be"),
        ("scene.json", ("frames", 0, "intrinsics", 0, 0), 10**400, "a matrix of numbers"),
        ("scene.json", ("depth_scale",), 10**400, "depth_scale must be a positive number"),
        ("scene.json", ("provenance",), [1], "provenance must be an object"),
        ("scene.json", ("frames", 0, "image"), "x" * 5000, "must be a path"),
        ("adapter configuration", ("r",), 0, "r must be a positive integer"),
        ("adapter configuration", ("lora_alpha",), float("inf"), "lora_alpha must be a positive number"),
        ("adapter configuration", ("rank_pattern",), [1], "rank_pattern must be an object"),
        ("adapter configuration", ("alpha_pattern",), {"a": "x"}, r"alpha_pattern\.a must be a positive number"),
        ("adapter configuration", ("base_model_name_or_path",), {"a": 1}, "base_model_name_or_path must be text"),
        ("checkpoint state", ("step",), None, "step must be at least 0"),
        ("tuned.json", ("files",), {"../x": "0" * 64, "model.safetensors": "0" * 64}, "must stay inside"),
        ("tuned.json", ("backbone",), 3, "backbone must be an object"),
        ("results.json", ("methods",), 3, "methods must be an object"),
        ("fit.json", ("shares", "basis"), None, r"shares\.basis must be an object"),
        ("fit.json", ("by_K",), {"basis": []}, "by_K must be an object with 'psv'"),
        ("fit.json", ("modules", "head", "norm"), 1e200, r"norm must be a norm of at most 1e100"),
        ("fit.json", ("modules",), {}, "modules must be not empty"),
        ("transforms.json", ("frames",), [], "frames must be a list of at least one frame"),
        ("opencv_cameras.json", ("frames",), 3, "frames must be a list of at least one frame"),
    ],
)
def test_records(tmp_path: Path, reader: str, keys: tuple, value: object, message: str) -> None:
    _replace(_valid(reader, tmp_path / "input"), *keys, value=value)
    with pytest.raises(ValueError, match=message):
        READERS[reader].read(tmp_path / "input")


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5000, "\ud800"])
def test_json_that_the_parser_stumbles_over(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(files.DamagedError, match=r"a\.json is not valid JSON"):
        files.read_json(tmp_path / "a.json")


@pytest.mark.parametrize("header", ["[]", "3", "[" * 100_000])
def test_headers_that_are_no_object(tmp_path: Path, header: str) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "h.safetensors", {"header": header})
    with pytest.raises(ValueError, match=r"h\.safetensors"):
        files.load_tensors(tmp_path / "h.safetensors")


@pytest.mark.parametrize("tensor", [torch.tensor(1.0), torch.zeros(3), torch.zeros(0, 2), torch.zeros(2, 2).long()])
def test_factors_that_are_no_matrices_of_numbers(tmp_path: Path, tensor: torch.Tensor) -> None:
    path = _valid("adapter weights", tmp_path / "input")
    save_file({"base_model.model.m.lora_A.weight": tensor, "base_model.model.m.lora_B.weight": tensor.clone()}, path)
    with pytest.raises(ValueError, match=r"lora_[AB]\.weight must be"):
        READERS["adapter weights"].read(tmp_path / "input")


def test_a_changed_bit_is_found(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    files.save_tensors(path, {"a": torch.arange(8.0), "b": torch.ones(2, dtype=torch.bfloat16)}, {"k": 1})
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    for at in (8 + length, len(whole) - 1, whole.index(b'"k') + 2):
        damaged = bytearray(whole)
        damaged[at] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"t\.safetensors"):
            files.load_tensors(path)
    path.write_bytes(whole)
    assert files.load_tensors(path)[1] == {"k": 1}


def test_depth_without_pixels() -> None:
    with pytest.raises(ValueError, match=r"depth must be \[height, width\], got \[0, 5\]"):
        depth_at(np.zeros((0, 5), np.float32), (4, 4))


@pytest.mark.parametrize(
    "change",
    [
        (b"element face 1", b"element face -1"),
        (b"3 0 1 2", b"-1 0 1 2"),
        (b"uchar red", b"foo red"),
        (b"element", b"e"),
    ],
)
def test_broken_ply_headers(tmp_path: Path, change: tuple[bytes, bytes]) -> None:
    path = _valid("PLY, ascii", tmp_path / "input")
    path.write_bytes(path.read_bytes().replace(*change))
    with pytest.raises(ValueError, match=r"a\.ply"):
        mesh_files.read_ply(path)


def test_a_card_of_blank_lines_takes_no_time(tmp_path: Path) -> None:
    """Each of them could once begin the text between the dashes."""
    (tmp_path / "README.md").write_bytes(b"---" + b"\n" * (1 << 20))
    start = time.process_time()
    assert licence_of_card(tmp_path / "README.md") is None
    assert time.process_time() - start < 1


def test_a_base_model_that_is_no_name(tmp_path: Path) -> None:
    module = ModuleSubspace(*(torch.ones(2, 1), torch.ones(3, 1)), *(torch.ones(1, dtype=torch.float64),) * 2)
    save_subspace(tmp_path / "a.safetensors", {"m": module}, {"base_model": ["vggt-nano"]})
    with pytest.raises(ValueError, match=r"a\.safetensors: header\.base_model must be text"):
        warn_of_other_base([tmp_path / "a.safetensors"], "vggt-nano")


def test_lines_of_metrics_that_are_none_are_dropped(tmp_path: Path) -> None:
    lines = ['{"step": 1}', '{"step": "1"}', "[1]", "[" * 100_000, '{"step": 9', '{"step": 3}', "9" * 5000]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    MetricsFile(tmp_path / "metrics.jsonl", 2).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
