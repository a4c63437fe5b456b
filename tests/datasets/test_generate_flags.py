"""The flags of the verb generate that render nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from datasets.official_layouts import write_rgbd_folder

from subspace3d import cli, settings
from subspace3d.configs import GenerateConfig

SCRIPT = Path(sys.executable).with_name("subspace3d")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["out must be given"]),
        (["--out", "x", "--from", "rgbd"], ["root must be given with from"]),
        (["--out", "x", "--root", "y"], ["root must be given with from"]),
        (["--out", "x", "--from", "kitti", "--root", "y"], ["kitti"]),
        (["--out", "x", "--from", "rgbd", "--root", "/nonexistent"], ["root: no such folder", "/nonexistent"]),
        (["--validate", "/nonexistent"], ["no such folder of scenes", "/nonexistent"]),
    ],
)
def test_bad_flags_get_one_line(arguments: list[str], words: list[str]) -> None:
    answer = subprocess.run([str(SCRIPT), "generate", *arguments], capture_output=True, text=True, check=False)
    assert answer.returncode == 2
    assert len(answer.stderr.strip().splitlines()) == 1, answer.stderr
    assert all(word in answer.stderr for word in words), answer.stderr


def test_from_stands_in_files_under_its_own_name(tmp_path: Path) -> None:
    config = GenerateConfig(out=Path("a"), from_="rgbd", root=Path("b"), only=("x", "y"), depth_scale=2e-4)
    settings.save(tmp_path / "run.yaml", config)
    assert "\nfrom: rgbd\n" in (tmp_path / "run.yaml").read_text()
    assert cli._parse("generate", ["--config", str(tmp_path / "run.yaml")]) == config


def test_a_folder_is_converted_then_checked(tmp_path: Path) -> None:
    write_rgbd_folder(tmp_path / "root/kitchen", views=4)
    convert = [
        str(SCRIPT),
        "generate",
        "--from",
        "rgbd",
        "--root",
        str(tmp_path / "root"),
        "--out",
        str(tmp_path / "o"),
    ]
    answer = subprocess.run(convert, capture_output=True, text=True, check=False)
    assert answer.returncode == 0 and "1 of 1 scenes" in answer.stdout, answer.stderr
    check = [str(SCRIPT), "generate", "--validate", str(tmp_path / "o")]
    answer = subprocess.run(check, capture_output=True, text=True, check=False)
    assert answer.returncode == 0 and "1 without fault" in answer.stdout, answer.stdout
    # the same poses taken for camera-from-world are noticed
    answer = subprocess.run([*convert, "--poses", "w2c", "--name", "wrong"], capture_output=True, check=False)
    answer = subprocess.run(check, capture_output=True, text=True, check=False)
    assert answer.returncode == 2 and "(c2w): store their inverse" in answer.stdout, answer.stdout
