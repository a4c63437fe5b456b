"""The commands convert and validate, through the console script."""

from __future__ import annotations

import contextlib
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets.official_layouts import write_rgbd_folder

from subspace3d import cli, settings
from subspace3d.commands import convert
from subspace3d.commands.convert import ConvertConfig
from subspace3d.datasets.readers import rgbd_folder
from subspace3d.datasets.readers.source import Report, SourceScene
from subspace3d.jobs import pool

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
    assert "from: rgbd\n" in (tmp_path / "run.yaml").read_text()
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


def test_scenes_side_by_side_are_those_one_after_the_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in "abc":
        write_rgbd_folder(tmp_path / "root" / name, views=3)
    # one scene loses a frame, one is lost
    (tmp_path / "root/b/rgb/001.png").write_bytes(b"no image")
    (tmp_path / "root/c/poses.txt").unlink()
    made, said = [], []
    for workers in (1, 2):
        caplog.clear()
        out = tmp_path / str(workers)
        convert.run(ConvertConfig(out=out, from_="rgbd", root=tmp_path / "root", workers=workers))
        files = {path.relative_to(out): path for path in out.rglob("*") if path.is_file() and path.suffix != ".yaml"}
        made.append({name: path.read_bytes() for name, path in files.items() if not name.name.startswith(".")})
        said.append(caplog.text.replace(str(out), "OUT"))
    assert made[0] == made[1] and Path("rgbd/b/scene.json") in made[0] and Path("skipped-rgbd.json") in made[0]
    assert said[0] == said[1] and "2 of 3 scenes" in said[0]
    assert re.search(r"skipped c: left out: .*poses\.txt", said[0]) and "b: 001.png" in said[0]


def test_the_source_is_scanned_once_whatever_the_number_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        write_rgbd_folder(tmp_path / "root" / name, views=3)
    config = ConvertConfig(out=tmp_path / "out", from_="rgbd", root=tmp_path / "root", workers=2)
    find = rgbd_folder.find
    scans: list[Any] = []

    def counted(*arguments: Any) -> list[SourceScene]:
        scans.append(arguments)
        return find(*arguments)

    def in_this_process(
        names: list[str], setup: Any, argument: Any, workers: int, *_: Any, **__: Any
    ) -> dict[str, str]:
        for worker in range(workers):
            setup(argument, worker)
        return pool.run_here(names, setup, pickle.loads(pickle.dumps(argument)))

    monkeypatch.setattr(rgbd_folder, "find", counted)
    monkeypatch.setattr(convert, "run_jobs", in_this_process)
    with contextlib.suppress(KeyError):  # reports, which are not taken here
        convert.run(config)
    assert len(scans) == 1 and len(list(tmp_path.glob("out/rgbd/*/scene.json"))) == 3


def test_what_was_left_out_of_a_scene_is_told_though_its_first_process_died(tmp_path: Path) -> None:
    write_rgbd_folder(tmp_path / "root/a", views=3)
    (tmp_path / "root/a/rgb/001.png").write_bytes(b"no image")
    config = ConvertConfig(out=tmp_path / "out", from_="rgbd", root=tmp_path / "root")
    scenes = {str(folder): scene for folder, scene in convert._find(config, Report()).items()}
    work = convert._set_up((config, scenes, 1), 0)
    first, again = (work(str(tmp_path / "out/rgbd/a")) for _ in range(2))
    assert first == again and len(first.reasons) == 1 and first.found["images"] == 3
