"""Files made to harm: bombs, ways out of a folder and pickles; each is refused by name, at no cost."""

from __future__ import annotations

import json
import os
import pickle
import resource
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz.readers import READERS, npy_of, zip_of

from subspace3d import files, settings
from subspace3d.backbones.weights import load_weights
from subspace3d.commands.finetune import FinetuneConfig
from subspace3d.datasets.readers import mesh_files
from subspace3d.datasets.readers.clearpose import _read_metadata
from subspace3d.datasets.readers.npz_bundle import Bundle
from subspace3d.formats.adapter import read_adapter
from subspace3d.formats.images import MOST_PIXELS, open_image, read_raw_depth
from subspace3d.formats.scene import load_scene


@pytest.fixture(autouse=True)
def _memory_stays_low():
    """No refusal may cost more than 64 MiB of memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 1 << 16, f"{grown} KiB"


def png_header(width: int, height: int) -> bytes:
    """A png that declares a size and holds next to nothing."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ]
    packed = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.mark.parametrize("size", [(100_000, 100_000), (13_000, 13_000), (2**31 - 1, 1)])
def test_image_bombs(tmp_path: Path, size: tuple[int, int]) -> None:
    (tmp_path / "bomb.png").write_bytes(png_header(*size))
    with pytest.raises(ValueError, match=r"bomb\.png is not a whole image"):
        open_image(tmp_path / "bomb.png")
    with pytest.raises(ValueError, match=r"bomb\.png is not a whole image"):
        open_image(tmp_path / "bomb.png", (size[1], size[0]))


def test_only_formats_of_images_are_opened(tmp_path: Path) -> None:
    """EPS would be handed to Ghostscript."""
    (tmp_path / "a.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(ValueError, match="not a whole image"):
        open_image(tmp_path / "a.png")


@pytest.mark.parametrize("shape", ["(1099511627776,)", "(4294967296, 4294967296)", "(-1, 4)"])
def test_declared_sizes_of_arrays(tmp_path: Path, shape: str) -> None:
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + bytes(64)
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.npy is not a whole \.npy file"):
        read_raw_depth(tmp_path / "a.npy", 1.0)
    (tmp_path / "a.npz").write_bytes(zip_of({"x.npy": content}))
    with pytest.raises(ValueError, match="'x' cannot be read"):
        Bundle(tmp_path / "a.npz", allow_pickle=False)["x"]


def test_zip_bomb(tmp_path: Path) -> None:
    header = "{'descr': '|u1', 'fortran_order': False, 'shape': (300000000,), }".ljust(117) + "\n"
    start = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode()

    with (
        zipfile.ZipFile(tmp_path / "b.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("x.npy", "w") as member,
    ):
        member.write(start)
        for _ in range(300):
            member.write(bytes(1_000_000))
    assert (tmp_path / "b.npz").stat().st_size < 3_000_000
    with pytest.raises(ValueError, match=r"'x' cannot be read: 300000\d+ bytes are more than"):
        Bundle(tmp_path / "b.npz", allow_pickle=True)["x"]


def test_more_frames_than_members(tmp_path: Path) -> None:
    np.savez(tmp_path / "frame_bundle.npz", num_frames=10**15)
    with pytest.raises(ValueError, match=r"num_frames is 10+, but there are 1 members"):
        READERS["HNDR bundle"].read(tmp_path)


def test_matlab_bomb(tmp_path: Path) -> None:
    element = zlib.compress(bytes(1 << 24), 9)
    header = b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack("<H", 0x0100) + b"IM"
    (tmp_path / "m.mat").write_bytes(header + (struct.pack("<II", 15, len(element)) + element) * 17)
    with pytest.raises(ValueError, match=r"m\.mat is not a whole MATLAB file: it expands to more than"):
        _read_metadata(tmp_path / "m.mat")


def test_exr_that_declares_too_much(tmp_path: Path) -> None:
    window = b"dataWindow\0box2i\0" + struct.pack("<5i", 16, 0, 0, 10**6, 10**6)
    (tmp_path / "d.exr").write_bytes(b"v/1\x01\x02\x00\x00\x00" + window + bytes(100))
    with pytest.raises(ValueError, match=f"must be an EXR of 1 to {MOST_PIXELS} pixels"):
        read_raw_depth(tmp_path / "d.exr", 1.0)


def test_yaml_that_stands_for_more_than_memory_holds(tmp_path: Path) -> None:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]" for old, new in zip("abcdefgh", "bcdefghi")]
    (tmp_path / "c.yaml").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="stands for more than 10000 values"):
        settings.flags(tmp_path / "c.yaml", FinetuneConfig)


@pytest.mark.parametrize("key", ["(a+)+$", "(.*)*x", ".*.*.*.*.*.*.*.*y", "x" * 501, "("])
def test_patterns_that_take_forever(tmp_path: Path, key: str) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    READERS["adapter configuration"].make(folder)
    record = json.loads((folder / "adapter_config.json").read_text())
    record["rank_pattern"] = {key: 2}
    (folder / "adapter_config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"adapter_config\.json: rank_pattern"):
        read_adapter(folder)


class _Exploit:
    def __reduce__(self):
        return os.mkdir, ("exploited",)


@pytest.mark.parametrize("allow_pickle", [False, True])
def test_nothing_is_run_by_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allow_pickle: bool) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.npz").write_bytes(zip_of({"x.npy": npy_of({"a": _Exploit()})}))
    with pytest.raises(ValueError, match="mkdir" if allow_pickle else "Pickles can run code"):
        Bundle(tmp_path / "p.npz", allow_pickle)["x"]
    (tmp_path / "d.npy").write_bytes(npy_of(_Exploit()))
    with pytest.raises(ValueError, match=r"d\.npy"):
        read_raw_depth(tmp_path / "d.npy", 1.0)
    (tmp_path / "w.pt").write_bytes(pickle.dumps(_Exploit()))
    with pytest.raises(ValueError, match=r"w\.pt"):
        load_weights(torch.nn.Linear(1, 1), tmp_path / "w.pt")
    torch.save({"weight": _Exploit()}, tmp_path / "v.pt")
    with pytest.raises(ValueError, match=r"v\.pt"):
        load_weights(torch.nn.Linear(1, 1), tmp_path / "v.pt")
    (tmp_path / "c.yaml").write_text("scenes: !!python/object/apply:os.mkdir [exploited]\n")
    with pytest.raises(ValueError, match=r"c\.yaml"):
        settings.flags(tmp_path / "c.yaml", FinetuneConfig)
    assert not (tmp_path / "exploited").exists()


@pytest.mark.parametrize("way", ["{outside}", "../secret.png", "images/../../secret.png", "link.png", "loop", "a\0b"])
def test_no_path_leads_outside(tmp_path: Path, way: str) -> None:
    folder = tmp_path / "scene"
    folder.mkdir()
    READERS["scene.json"].make(folder)
    (tmp_path / "secret.png").write_bytes((folder / "images/0000.png").read_bytes())
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "loop").symlink_to("loop")
    way = way.format(outside=tmp_path / "secret.png")
    record = json.loads((folder / "scene.json").read_text())
    for key in ("image", "depth", "mask"):
        changed = json.loads(json.dumps(record))
        changed["frames"][0][key] = way
        (folder / "scene.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=rf"frames\[0\]\.{key} must"):
            load_scene(folder)
    with pytest.raises(ValueError, match="must"):
        files.inside(folder, way, "x")


def test_lists_and_materials_stay_inside(tmp_path: Path) -> None:
    folder = tmp_path / "tum"
    folder.mkdir()
    READERS["RGB-D list"].make(folder)
    (folder / "rgb.txt").write_text("100.0 ../secret.png\n")
    with pytest.raises(ValueError, match=r"rgb\.txt must name files inside"):
        READERS["RGB-D list"].read(folder)
    READERS["OBJ"].make(folder)
    (tmp_path / "secret.png").write_bytes((folder / "t.png").read_bytes())
    (folder / "m.mtl").write_text("map_Kd ../secret.png\n")
    with pytest.raises(ValueError, match="map_Kd must stay inside"):
        mesh_files.read_obj(folder / "m.obj")
    (folder / "m.obj").write_bytes((folder / "m.obj").read_bytes().replace(b"m.mtl", b"../m.mtl"))
    (tmp_path / "m.mtl").write_text("map_Kd t.png\n")
    with pytest.raises(ValueError, match="mtllib must stay inside"):
        mesh_files.read_obj(folder / "m.obj")
