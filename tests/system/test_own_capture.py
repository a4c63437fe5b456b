"""A capture of one's own goes through every command, in the order of README.md and docs/own_data.md."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import viser
from datasets import own_captures as captures
from datasets.plane_world import plane_error

from subspace3d import cli
from subspace3d.commands import adapt
from subspace3d.formats.scene import SceneFile, load_scene

VIEWS, BARE, BROKEN = 5, 1, 3  # a frame without depth, one whose pose is no number
SMALL = "--train.image-size 28 --train.frames 2 2 --train.images-per-step 2 --train.no-check-memory --train.threads 1"
Say = Callable[..., list[str]]


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    """Runs a command line in a folder of its own; returns the lines on stdout."""
    monkeypatch.chdir(tmp_path)

    def run(line: str, code: int | None = None) -> list[str]:
        capsys.readouterr()
        try:
            cli.main(shlex.split(line))
        except SystemExit as end:
            assert end.code == code, (line, capsys.readouterr())
        else:
            assert code is None, line
        return capsys.readouterr().out.splitlines()

    return run


def write_captures(root: Path) -> list[np.ndarray]:
    """COLMAP, nerfstudio and a phone's folder, below folders whose names have blanks and accents; returns w2c."""
    poses = captures.write_colmap(
        root / "été 1/desk", VIEWS, "SIMPLE_RADIAL", binary=False, depth=".png", names=lambda index: f"é {index}.png"
    )
    lines = (root / "été 1/desk/sparse/0/images.txt").read_text().splitlines()
    lines = [" ".join([line.split()[0], "nan", *line.split()[2:]]) if f"é {BROKEN}" in line else line for line in lines]
    (root / "été 1/desk/sparse/0/images.txt").write_text("\n".join(lines) + "\n")
    (root / f"été 1/desk/depth/é {BARE}.png").unlink()
    (root / "été 1/desk/images/notes.txt").write_text("a stray file")
    captures.write_nerfstudio(root / "été 2/desk", VIEWS)
    record = json.loads((root / "été 2/desk/transforms.json").read_text())
    del record["frames"][BARE]["depth_file_path"]
    record["frames"][BROKEN]["transform_matrix"][0][3] = float("nan")
    (root / "été 2/desk/transforms.json").write_text(json.dumps(record))
    phone = root / "été 3/desk"
    shutil.copytree(root / "été 2/desk/images", phone / "rgb")
    shutil.copytree(root / "été 2/desk/depths", phone / "depth")
    (phone / f"depth/frame_{BARE}.png").unlink()
    fx, fy, cx, cy = captures.PARAMETERS["PINHOLE"]
    (phone / "intrinsics.txt").write_text(f"{fx} {fy} {cx - 0.5} {cy - 0.5}\n")
    rows = [np.full(12, np.nan) if index == BROKEN else pose.ravel() for index, pose in enumerate(poses)]
    (phone / "poses.txt").write_text("\n".join(" ".join(map(repr, map(float, row))) for row in rows))
    return poses


def check_scene(folder: Path, poses: list[np.ndarray]) -> None:
    """Poses, intrinsics and depth are those of the world that was photographed."""
    scene, kept = load_scene(folder), [index for index in range(VIEWS) if index != BROKEN]
    np.testing.assert_allclose(scene.extrinsics, [poses[index] for index in kept], atol=1e-6)
    assert SceneFile(folder).counts() == {"images": VIEWS - 1, "depths": VIEWS - 2, "cameras": VIEWS - 1}
    for index, depth, intrinsic, extrinsic in zip(kept, scene.depths, scene.intrinsics, scene.extrinsics):
        assert (depth > 0).all() == (index != BARE)
        if index != BARE:
            # half a millimetre; undistorted, half a pixel's diagonal of a plane 2.5 deep, see test_own_captures
            assert plane_error(depth, intrinsic, extrinsic) < 2.5 * 0.5 * 0.71 / 88 + 1e-3


def test_adapters_of_each_attribute_are_mined_apart() -> None:
    assert adapt.mining(Path("my out"), ["texture/texture_00", "texture/texture_01", "camera/camera_00"]) == (
        "subspace3d mine --adapters 'my out/camera' --out subspaces/camera.safetensors, and likewise texture"
    )


def test_every_command(tmp_path: Path, say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    poses = write_captures(tmp_path / "my captures")
    found = (
        f"{VIEWS} images found, {VIEWS - 1} used, 1 left out; {VIEWS - 1} depths found, {VIEWS - 2} used, 1 left out; "
        f"{VIEWS} cameras found, {VIEWS - 1} used, 1 left out"
    )
    for kind, flags in (("colmap", ""), ("nerfstudio", ""), ("rgbd", "--poses w2c")):
        lines = say(f"convert --from {kind} --root 'my captures' --out 'my data' {flags}")
        assert found in lines and lines[-1] == "next: subspace3d validate 'my data'", lines
        (folder,) = (tmp_path / "my data" / kind).iterdir()
        check_scene(folder, poses)
    assert say("validate 'my data'")[-1].startswith("next: subspace3d finetune --scenes 'my data' --method lora")
    assert say("params --method lora --rank 2")

    lines = say(f"adapt --scenes 'my data' --out 'my gradients' --gradient-only --rank 2 --gradient-steps 1 {SMALL}")
    mined = "subspace3d mine --adapters 'my gradients' --out subspaces/ATTRIBUTE.safetensors"
    assert lines[-2:] == ["3 adapters -> my gradients", f"next: {mined}"]
    lines = say(f"adapt --scenes 'my data/rgbd' --out adapters --rank 2 --workers 1 --train.steps 1 {SMALL}")
    assert lines[-2] == "1 adapters -> adapters"
    lines = say("mine --adapters 'my gradients' --out 'my bases/own.safetensors' --k 2 --model shared")
    assert lines[-1].startswith("next: subspace3d fit --subspaces 'my bases/own.safetensors' --scenes YOUR_SCENES")
    # the phone's folder and nerfstudio's hold the same, and so do what was made of them
    assert lines[-2].startswith("2 adapters taken; left out: 1 copies"), lines
    # a basis of the data's own gradients holds more of them than what needs no mining
    lines = say(f"fit --scenes 'my data' --subspaces 'my bases' --out fit --batches 2 {SMALL}")
    assert lines[-2] == "fit -> fit/fit.json"
    assert lines[-1] == "next: subspace3d finetune --scenes 'my data' --out RUN --subspaces 'my bases'"

    lines = say(f"finetune --scenes 'my data' --subspaces 'my bases' --out 'my run' --train.steps 1 {SMALL}")
    assert lines[-2] == "tuned -> my run/tuned"
    tested = "subspace3d evaluate --scenes TEST_SCENES --tuned 'my run' --out 'my run/evaluation'"
    assert lines[-1] == f"next: {tested}, or subspace3d export 'my run'"
    lines = say("analyze --subspaces 'my bases' --out 'my run/analysis'")
    assert lines[-2:] == ["analysis -> my run/analysis/analysis.json", "next: subspace3d report 'my run'"]
    few = "finetune --few --scenes 'my data' --method lora --rank 2 --out few --train.steps 1"
    lines = say(f"{few} --train.image-size 28 --train.threads 1")
    assert lines[-1].startswith("next: subspace3d report few, subspace3d evaluate"), lines
    lines = say("evaluate --scenes 'my data/rgbd' --tuned 'my run' --out 'my run/evaluation' --frames 2 --protocol all")
    assert lines[-2:] == ["results -> my run/evaluation/results.json", "next: subspace3d report 'my run'"]
    assert say("report 'my run'")[-1] == "report -> my run/report/index.html"
    assert say("report few")[-1] == "report -> few/report/index.html"
    assert say("export 'my run'")[-1].startswith("my run/export/lora: ")

    def interrupt(server: viser.ViserServer) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(viser.ViserServer, "sleep_forever", interrupt)
    assert any(line.startswith("view -> http://localhost:") for line in say("view 'my run'"))
    assert say("bench mining --layers 1 --adapters 2 --rank 2 --k 2 --iterations 1 --dense 0 --spectra planted")
    left = [path for path in tmp_path.rglob("*") if ".tmp" in path.name or path.name.endswith((".old", "lock"))]
    assert not left
