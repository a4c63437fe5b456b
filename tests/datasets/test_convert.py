"""The commands convert and validate, through the console script."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from datasets.official_layouts import write_rgbd_folder

from subspace3d import cli, settings
from subspace3d.commands.convert import ConvertConfig

SCRIPT = Path(sys.executable).with_name("subspace3d")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate"], ["out"]),
        (["convert", "--out", "x", "--from", "rgbd"], ["root"]),
        (["convert", "--out", "x", "--root", "y"], ["from"]),
        (["convert", "--out", "x", "--from", "kitti", "--root", "y"], ["kitti"]),
        (
            ["convert", "--out", "x", "--from", "rgbd", "--root", "/nonexistent"],
            ["root: no such folder", "/nonexistent"],
        ),
        (["validate", "/nonexistent"], ["no such folder of scenes", "/nonexistent"]),
    ],
)
def test_bad_flags_get_one_line(arguments: list[str], words: list[str]) -> None:
    answer = subprocess.run([str(SCRIPT), *arguments], capture_output=True, text=True, check=False)
    assert answer.returncode == 2
    assert len(answer.stderr.strip().splitlines()) == 1, answer.stderr
    assert all(word in answer.stderr for word in words), answer.stderr


def test_from_stands_in_files_under_its_own_name(tmp_path: Path) -> None:
    config = ConvertConfig(out=Path("a"), from_="rgbd", root=Path("b"), only=("x", "y"), depth_scale=2e-4)
    settings.save(tmp_path / "run.yaml", config)
    assert "\nfrom: rgbd\n" in (tmp_path / "run.yaml").read_text()
    assert cli.parse("convert", ConvertConfig, ["--config", str(tmp_path / "run.yaml")]) == config


def test_a_folder_is_converted_then_checked(tmp_path: Path) -> None:
    write_rgbd_folder(tmp_path / "root/kitchen", views=4)
    convert = [
        str(SCRIPT),
        "convert",
        "--from",
        "rgbd",
        "--root",
        str(tmp_path / "root"),
        "--out",
        str(tmp_path / "o"),
    ]
    answer = subprocess.run(convert, capture_output=True, text=True, check=False)
    assert answer.returncode == 0 and "1 of 1 scenes" in answer.stdout, answer.stderr
    check = [str(SCRIPT), "validate", str(tmp_path / "o")]
    answer = subprocess.run(check, capture_output=True, text=True, check=False)
    assert answer.returncode == 0 and "1 without fault" in answer.stdout, answer.stdout
    # the same poses taken for camera-from-world are noticed
    answer = subprocess.run([*convert, "--poses", "w2c", "--name", "wrong"], capture_output=True, check=False)
    answer = subprocess.run(check, capture_output=True, text=True, check=False)
    assert answer.returncode == 2 and "(c2w): store their inverse" in answer.stdout, answer.stdout
