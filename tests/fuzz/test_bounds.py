"""Files made to harm: bombs, ways out of a folder and pickles; each is refused by name, at no cost."""

from __future__ import annotations

import functools
import io
import json
import os
import pickle
import resource
import shutil
import signal
import socket
import struct
import tempfile
import time
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz.readers import READERS, npy_of, zip_of
from mining.synthetic_adapters import write_adapter
from PIL import Image

from subspace3d import files, settings
from subspace3d.backbones.weights import load_weights
from subspace3d.commands.finetune import FinetuneConfig
from subspace3d.datasets.readers import mesh_files
from subspace3d.datasets.readers.clearpose import _read_metadata
from subspace3d.datasets.readers.npz_bundle import Bundle
from subspace3d.formats.adapter import read_adapter
from subspace3d.formats.exr import LARGEST_PIXELS
from subspace3d.formats.images import open_image, read_raw_depth
from subspace3d.formats.scene import load_scene


@pytest.fixture(autouse=True)
def _memory_stays_low():
    """No refusal may cost more than 64 MiB of memory, the parsing of what is within bounds included."""
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


def exr_header(width: int, height: int, channels: int = 1, extra: bytes = b"") -> bytes:
    """An EXR of float32 channels without pixels; ``extra`` are attributes before the true ones."""
    named = b"".join(b"c%d\0" % index + struct.pack("<iIii", 2, 0, 1, 1) for index in range(channels)) + b"\0"
    header = b"v/1\x01\x02\0\0\0" + extra + b"channels\0chlist\0" + struct.pack("<i", len(named)) + named
    return header + b"dataWindow\0box2i\0" + struct.pack("<5i", 16, 0, 0, width - 1, height - 1) + bytes(100)


@pytest.mark.parametrize(
    ("size", "channels"), [((10**6, 10**6), 1), ((9000, 9000), 1), ((1000, 1000), 100), ((0, 5), 1)]
)
def test_exr_that_declares_too_much(tmp_path: Path, size: tuple[int, int], channels: int) -> None:
    (tmp_path / "d.exr").write_bytes(exr_header(*size, channels))
    with pytest.raises(ValueError, match=rf"d\.exr is not an EXR file .*{LARGEST_PIXELS} bytes"):
        read_raw_depth(tmp_path / "d.exr", 1.0)


def test_exr_with_a_small_window_in_another_attribute(tmp_path: Path) -> None:
    window = b"dataWindow\0box2i\0" + struct.pack("<5i", 16, 0, 0, 9, 9)
    extra = b"comment\0string\0" + struct.pack("<i", len(window)) + window
    (tmp_path / "d.exr").write_bytes(exr_header(10**6, 10**6, extra=extra))
    with pytest.raises(ValueError, match=f"{LARGEST_PIXELS} bytes"):
        read_raw_depth(tmp_path / "d.exr", 1.0)
    (tmp_path / "d.exr").write_bytes(exr_header(10**6, 10**6, extra=window))
    with pytest.raises(ValueError, match="dataWindow stands twice"):
        read_raw_depth(tmp_path / "d.exr", 1.0)


def test_webp_canvas(tmp_path: Path) -> None:
    """The decoder allocates the canvas when the file is opened."""
    side = (16383).to_bytes(3, "little")
    chunk = b"VP8X" + struct.pack("<I", 10) + bytes(4) + side + side
    (tmp_path / "b.webp").write_bytes(b"RIFF" + struct.pack("<I", len(chunk) + 4) + b"WEBP" + chunk + bytes(64))
    with pytest.raises(ValueError, match=r"b\.webp is not a whole image: 16384 x 16384 pixels"):
        open_image(tmp_path / "b.webp")


def test_jpeg_of_many_scans(tmp_path: Path) -> None:
    """A scan of sixteen bytes takes the time of all pixels; a thousand of them take a thousand times as long."""
    data = io.BytesIO()
    Image.fromarray(np.zeros((1024, 1024), np.uint8)).save(data, "JPEG", progressive=True)
    whole = data.getvalue()
    last_scan = whole[whole.rfind(b"\xff\xda") : -2]
    (tmp_path / "j.jpg").write_bytes(whole[:-2] + 1000 * last_scan + whole[-2:])
    start = time.process_time()
    with pytest.raises(ValueError, match=r"j\.jpg is not a whole image: it has 10\d\d scans, more than 64"):
        open_image(tmp_path / "j.jpg")
    assert time.process_time() - start < 1
    (tmp_path / "j.jpg").write_bytes(whole[:-2] + 50 * last_scan + whole[-2:])
    assert open_image(tmp_path / "j.jpg").size == (1024, 1024)


def test_tiff_tile(tmp_path: Path) -> None:
    tags = {256: 4, 257: 4, 258: 8, 259: 1, 262: 1, 277: 1, 322: 1 << 30, 323: 1 << 30, 324: 8, 325: 16}
    entries = b"".join(struct.pack("<2H2I", tag, 4, 1, value) for tag, value in tags.items())
    (tmp_path / "t.tiff").write_bytes(b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(64))
    with pytest.raises(ValueError, match=r"t\.tiff is not a whole image: a tile has more than"):
        open_image(tmp_path / "t.tiff")


def test_header_of_a_safetensors_file(tmp_path: Path) -> None:
    (tmp_path / "h.safetensors").write_bytes(struct.pack("<Q", 1 << 26) + b"{" + b" " * 1000)
    with pytest.raises(ValueError, match=r"h\.safetensors is not a whole safetensors file: its header has 67108864"):
        files.load_tensors(tmp_path / "h.safetensors")


def test_json_of_many_values(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[" + "[]," * (1 << 21) + "[]]")
    with pytest.raises(ValueError, match=r"a\.json is not valid JSON: it has more than"):
        files.read_json(tmp_path / "a.json")
    with open(tmp_path / "b.json", "wb") as file:
        file.truncate(1 << 40)  # no byte of it is stored
    with pytest.raises(ValueError, match=r"b\.json must be at most"):
        files.read_json(tmp_path / "b.json")


def _element(kind: int, data: bytes) -> bytes:
    return struct.pack("<II", kind, len(data)) + data + bytes(-len(data) % 8)


def _matrix(flags: int, sides: tuple[int, ...], content: bytes = b"") -> bytes:
    parts = [_element(6, struct.pack("<II", flags, 0)), _element(5, struct.pack(f"<{len(sides)}i", *sides))]
    return _element(14, b"".join(parts) + _element(1, b"") + content)


def test_matlab_bomb(tmp_path: Path) -> None:
    element = zlib.compress(_matrix(9, (1, 1 << 24), _element(2, bytes(1 << 24))), 9)
    header = b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack("<H", 0x0100) + b"IM"
    (tmp_path / "m.mat").write_bytes(header + (struct.pack("<II", 15, len(element)) + element) * 17)
    with pytest.raises(ValueError, match=r"m\.mat is not a whole MATLAB file: it expands to more than"):
        _read_metadata(tmp_path / "m.mat")


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nested", "nested more than 8 deep"),
        ("cells", "declares .* entries in"),
        ("struct", "declares .* entries in"),
        ("object", "has class 3"),
        ("many", "holds more than 2097152 elements"),
        ("no size", "has no size"),
    ],
)
def test_matlab_files_that_make_much_of_little(tmp_path: Path, kind: str, message: str, compressed: bool) -> None:
    data = _matrix(6, (1, 1), _element(9, bytes(8)))
    if kind == "nested":
        for _ in range(100):
            data = _matrix(1, (1, 1), data)
    elif kind in ("cells", "struct"):
        data = _matrix(1 if kind == "cells" else 2, (1 << 30, 1 << 30))
    elif kind == "object":
        data = _matrix(3, (1, 1))
    elif kind == "many":
        data = _matrix(1, (1 << 21, 1), _element(14, b"") * (1 << 21))
    else:
        data = _element(14, _element(6, struct.pack("<II", 6, 0)) + _element(6, bytes(8)))
    header = b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack("<H", 0x0100) + b"IM"
    packed = zlib.compress(data, 1)
    (tmp_path / "m.mat").write_bytes(header + (struct.pack("<II", 15, len(packed)) + packed if compressed else data))
    with pytest.raises(ValueError, match=rf"m\.mat is not a whole MATLAB file: .*{message}"):
        _read_metadata(tmp_path / "m.mat")


def test_list_of_members_of_an_archive(tmp_path: Path) -> None:
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 1 << 25, 0, 0)
    with open(tmp_path / "a.npz", "wb") as file:
        file.truncate(1 << 26)
        file.seek(0, 2)
        file.write(end)
    with pytest.raises(ValueError, match=r"a\.npz is not a whole npz file: its list of members has 33554432 bytes"):
        Bundle(tmp_path / "a.npz", allow_pickle=True)


@pytest.mark.parametrize("text", ["a: &a {x: 1}\nb: {<<: *a}\n", "? [" * 9000, "[" * 9000, "- " * 9000])
def test_yaml_that_is_merged_or_deep(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"c\.yaml cannot be read"):
        settings.flags(tmp_path / "c.yaml", FinetuneConfig)


def test_yaml_and_toml_of_many_keys(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("".join(f"k{index}: 1\n" for index in range(6000)))
    with pytest.raises(ValueError, match="stands for more than 10000 values"):
        settings.flags(tmp_path / "c.yaml", FinetuneConfig)
    (tmp_path / "c.toml").write_text(".".join("a" * 50_000) + " = 1\n")
    with pytest.raises(ValueError, match="a line has more than 1000 dots"):
        settings.flags(tmp_path / "c.toml", FinetuneConfig)
    (tmp_path / "d.toml").write_text("a = 1\n" * 100_000)
    with pytest.raises(ValueError, match="must be at most 262144 bytes"):
        settings.flags(tmp_path / "d.toml", FinetuneConfig)


def test_yaml_that_stands_for_more_than_memory_holds(tmp_path: Path) -> None:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]" for old, new in zip("abcdefgh", "bcdefghi")]
    (tmp_path / "c.yaml").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="stands for more than 10000 values"):
        settings.flags(tmp_path / "c.yaml", FinetuneConfig)


@pytest.mark.parametrize("key", ["(a+)+$", "(.*)*x", ".*" * 30 + "y", "(x?){30}" * 9, "(a|a|aa)*$", "((((a*)*)*)*)*b"])
def test_patterns_that_take_forever(tmp_path: Path, key: str) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    name = "a" * 400
    write_adapter(folder / "a", {name: (torch.ones(2, 3), torch.ones(3, 2))}, rank_pattern={key: 9, "": 3})
    before = time.process_time()
    try:
        read_adapter(folder / "a")
    except ValueError as error:
        assert "do not fit the rank" in str(error)
    assert time.process_time() - before < 2


@pytest.mark.parametrize("key", ["(?i)a", "(?x) a", "(?=a)a", r"(a)\1", "(", "a{1000}", "x" * 70_000])
def test_patterns_that_are_not_read(tmp_path: Path, key: str) -> None:
    modules = {"a": (torch.ones(2, 1), torch.ones(1, 2))}
    write_adapter(tmp_path / "a", modules, rank_pattern={key: 1})
    with pytest.raises(ValueError, match=r"adapter_config\.json: rank_pattern"):
        read_adapter(tmp_path / "a")


@pytest.mark.parametrize("kind", ["pipe", "zeros", "socket", "folder", "loop"])
@pytest.mark.parametrize("name", READERS)
def test_only_regular_files_are_read(tmp_path: Path, name: str, kind: str) -> None:
    """A named pipe would be waited for, a device read without end."""
    folder = tmp_path / "input"
    folder.mkdir()
    shutil.copytree(made(name), folder, dirs_exist_ok=True)
    target = folder / READERS[name].target
    target.unlink()
    if kind == "pipe":
        os.mkfifo(target)
    elif kind == "zeros":
        target.symlink_to("/dev/zero")
    elif kind == "folder":
        target.mkdir()
    elif kind == "loop":
        target.symlink_to(target.name)
    else:
        # the path of a socket is short
        short = Path(tempfile.mkdtemp(dir="/tmp")) / "s"
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(short))
        short.rename(target)
        short.parent.rmdir()
    signal.signal(signal.SIGALRM, _waited)
    signal.alarm(20)
    try:
        READERS[name].read(folder)
    except (ValueError, FileNotFoundError) as error:
        assert str(error)
    finally:
        signal.alarm(0)


def _waited(number: int, frame: object) -> None:
    raise TimeoutError("it was waited for")


@functools.cache
def made(name: str) -> Path:
    folder = Path(tempfile.mkdtemp()) / "input"
    folder.mkdir()
    READERS[name].make(folder)
    return folder


_GLOBAL = b"cnumpy.core.multiarray\n_reconstruct\n"


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"]" + b"q\x00(h\x00h\x00e", "uses one list or dict twice"),
        (b"N" + b"\x85" * 40, "a tuple too long or too deep"),
        (b"]" * 40 + b"a" * 39, "nested more than 16 deep"),
        (b"cbuiltins\neval\nX\x01\x00\x00\x001\x85R", "holds a builtins.eval"),
        (_GLOBAL + b"N\x85R}b", "an array without its content"),
        (b"cnumpy\ndtype\nX\x02\x00\x00\x00O8\x85R}b", "holds no numpy array"),
        (b"(" * 20_000, "puts more than it takes"),
        (b"I1\n", "instruction INT"),
        (b"N2", "instruction DUP"),
        (b"\x8a\x20" + b"\x7f" * 32, "an integer of more than 64 bits"),
    ],
)
def test_programs_in_pickles(tmp_path: Path, program: bytes, message: str) -> None:
    start = npy_of(None)
    member = start[: start.index(b"\n") + 1] + b"\x80\x03" + program + b"."
    (tmp_path / "p.npz").write_bytes(zip_of({"x.npy": member}))
    with pytest.raises(ValueError, match=f"'x' cannot be read: .*{message}"):
        Bundle(tmp_path / "p.npz", allow_pickle=True)["x"]


@pytest.mark.parametrize(
    "value", [np.array([{}], object), np.array([[1]], object), {"a": np.array([None])}, {"a": {1, 2}}]
)
def test_objects_in_arrays_are_refused(tmp_path: Path, value: object) -> None:
    member = npy_of(None)
    member = member[: member.index(b"\n") + 1] + pickle.dumps(np.array(value, dtype=object), protocol=4)
    (tmp_path / "p.npz").write_bytes(zip_of({"x.npy": member}))
    with pytest.raises(ValueError, match="'x' cannot be read: it "):
        Bundle(tmp_path / "p.npz", allow_pickle=True)["x"]


def test_one_large_array_in_many_places(tmp_path: Path) -> None:
    large = np.zeros(1 << 24, np.uint8)
    np.savez_compressed(tmp_path / "p.npz", x={"a": [large] * 1000})  # type: ignore[arg-type]
    value = Bundle(tmp_path / "p.npz", allow_pickle=True)["x"]
    assert len(value["a"]) == 1000 and value["a"][0] is value["a"][999]


class _Big:
    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, (torch.zeros(2).storage(), 0, (1 << 40,), (0,), False, OrderedDict())


def test_tensors_beyond_their_storage(tmp_path: Path) -> None:
    torch.save({"weight": _Big()}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt is not a whole PyTorch weights file: .*reaches beyond its storage"):
        load_weights(torch.nn.Linear(1, 1), tmp_path / "w.pt")
    torch.save(torch.nn.Linear(1, 1), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt .* it holds a torch\.nn\.modules\.linear\.Linear"):
        load_weights(torch.nn.Linear(1, 1), tmp_path / "w.pt")
    torch.save({"weight": torch.zeros(1, 1)}, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"w\.pt .* before PyTorch 1\.6"):
        load_weights(torch.nn.Linear(1, 1), tmp_path / "w.pt")


class _Exploit:
    def __reduce__(self):
        return os.mkdir, ("exploited",)


@pytest.mark.parametrize("allow_pickle", [False, True])
def test_nothing_is_run_by_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allow_pickle: bool) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.npz").write_bytes(zip_of({"x.npy": npy_of({"a": _Exploit()})}))
    with pytest.raises(ValueError, match="mkdir" if allow_pickle else "is a pickled object"):
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
