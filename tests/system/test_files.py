"""Nothing partial under a final name; broken files are named."""

import subprocess
import sys

import pytest
import torch

from subspace3d.files import atomic_folder, atomic_path, load_tensors, read_json, save_tensors, write_json


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
