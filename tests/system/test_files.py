"""Nothing partial under a final name; broken files are named."""

import os
import subprocess
import sys

import pytest
import torch

from subspace3d import files
from subspace3d.files import (
    atomic_folder,
    atomic_path,
    discard,
    load_tensors,
    read_json,
    save_tensors,
    sweep,
    write_json,
)


def test_a_failed_write_leaves_the_old_file_and_no_temporary(tmp_path):
    path = tmp_path / "result.json"
    write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_folder_leaves_the_old_folder(tmp_path):
    path = tmp_path / "step_1"
    with atomic_folder(path) as temporary:
        (temporary / "a").write_text("old")
    with pytest.raises(RuntimeError), atomic_folder(path) as temporary:
        (temporary / "a").write_text("new")
        raise RuntimeError
    assert (path / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with atomic_folder(path) as temporary:
        (temporary / "a").write_text("new")
    assert (path / "a").read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("exchange", [True, False])
def test_what_another_process_sweeps_before_it_is_held_is_made_again(tmp_path, monkeypatch, exchange):
    swept = []

    def swept_at_first(make):
        def call(*args, **kwargs):
            made = make(*args, **kwargs)
            if made not in swept and len(swept) % 2 == 0:
                sweep(tmp_path)  # opens what it finds anew, as another process does
            swept.append(made)
            return made

        return call

    monkeypatch.setattr(files.tempfile, "mkdtemp", swept_at_first(files.tempfile.mkdtemp))
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    for content in ("old", "new"):
        with atomic_path(tmp_path / "file.txt") as temporary:
            temporary.write_text(content)
        with atomic_folder(tmp_path / "folder") as temporary:
            (temporary / "file.txt").write_text(content)
        assert (tmp_path / "file.txt").read_text() == (tmp_path / "folder/file.txt").read_text() == content
    discard(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]
    assert len(swept) == 2 * (5 if exchange else 6)


def test_where_everything_is_swept_at_once_the_write_ends_with_its_reason(tmp_path, monkeypatch):
    make = files.tempfile.mkdtemp

    def swept(*args, **kwargs):
        made = make(*args, **kwargs)
        sweep(tmp_path)
        return made

    monkeypatch.setattr(files.tempfile, "mkdtemp", swept)
    with pytest.raises(BlockingIOError, match="other processes took every temporary folder"):
        write_json(tmp_path / "file.json", {})


def test_a_writer_may_put_another_file_in_the_place_of_the_temporary_one(tmp_path):
    """As safetensors does; other processes sweep meanwhile."""
    with atomic_path(tmp_path / "file.bin") as temporary:
        other = temporary.with_name("other")
        other.write_bytes(b"whole")
        os.replace(other, temporary)
        sweep(tmp_path)
    assert (tmp_path / "file.bin").read_bytes() == b"whole"
    assert [path.name for path in tmp_path.iterdir()] == ["file.bin"]


def test_nan_is_not_json(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())


def test_tensors_and_header_round_trip_and_a_truncated_file_is_named(tmp_path):
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"a": torch.arange(6.0).reshape(2, 3).T}, {"k": 3})
    tensors, header = load_tensors(path)
    assert torch.equal(tensors["a"], torch.arange(6.0).reshape(2, 3).T)
    assert header == {"k": 3}
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"t\.safetensors"):
        load_tensors(path)
    (tmp_path / "j.json").write_text("{")
    with pytest.raises(ValueError, match=r"j\.json"):
        read_json(tmp_path / "j.json")


def test_tensor_files_of_the_same_content_have_the_same_bytes(tmp_path):
    script = (
        "import sys, torch; from pathlib import Path; from subspace3d.files import save_tensors\n"
        "save_tensors(Path(sys.argv[1]), {'ä': torch.arange(3.0)}, {'text': 'é \\u0001 \"quoted\"', 'list': [1, 2]})\n"
    )
    paths = [tmp_path / f"{index}.safetensors" for index in range(4)]
    for path in paths:
        subprocess.run([sys.executable, "-c", script, str(path)], check=True)
    assert len({path.read_bytes() for path in paths}) == 1
    tensors, header = load_tensors(paths[0])
    assert tensors["ä"].tolist() == [0, 1, 2] and header == {"text": 'é \x01 "quoted"', "list": [1, 2]}
