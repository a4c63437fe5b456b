"""Folders that are almost scenes, roots that are one folder off, and what the last lines make of names with blanks."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from datasets import benchmark_layouts as layouts
from datasets import own_captures as captures
from datasets.official_layouts import write_clearpose_scene, write_rgbd_folder
from PIL import Image

from subspace3d.commands import convert
from subspace3d.commands.convert import ConvertConfig, kind_of
from subspace3d.formats.scene import SceneFile, load_scene


def run(kind: str, root: Path, out: Path) -> list[Path]:
    return convert.run(ConvertConfig(out=out, from_=kind, root=root))  # type: ignore[arg-type]


# kind -> writer of one scene at a folder, what is taken from it, and what is said
HALVES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "colmap": (
        lambda root: captures.write_colmap(root / "desk", 2), "desk/sparse",
        "desk: left out, it has images but no COLMAP model (cameras and images, .bin or .txt)",
    ),
    "half a model": (
        lambda root: captures.write_colmap(root / "desk", 2), "desk/sparse/0/images.bin",
        "desk/sparse/0: left out, it has cameras.bin but no images.bin",
    ),
    "nerfstudio": (
        lambda root: captures.write_nerfstudio(root / "desk", 2), "desk/transforms.json",
        "desk: left out, it has images but no transforms.json",
    ),
    "rgbd": (
        lambda root: write_rgbd_folder(root / "desk", views=2), "desk/intrinsics.txt",
        "desk: left out, it has rgb but no intrinsics.txt",
    ),
    "renderings": (
        lambda root: captures.write_renderings(root / "desk", 2), "desk/opencv_cameras.json",
        "desk/renderings: left out, there is no opencv_cameras.json beside it or in it",
    ),
    "7scenes": (
        lambda root: layouts.write(root / "chess/seq-03.zip", "PK"), "nothing",
        "chess/seq-03.zip: left out, it is not extracted",
    ),
    "nrgbd": (
        layouts.nrgbd, "breakfast_room/focal.txt", "breakfast_room: left out, it has images but no focal.txt",
    ),
    "scannet": (
        layouts.scannet, "scans/scene0000_00/intrinsic",
        "scans/scene0000_00: left out, it has color but no intrinsic",
    ),
    "scannet++": (
        layouts.scannetpp, "data/09c1414f1b/dslr/colmap",
        "data/09c1414f1b/dslr: left out, it has no colmap/ with cameras and images",
    ),
    "bonn": (
        layouts.bonn, "rgbd_bonn_balloon/groundtruth.txt",
        "rgbd_bonn_balloon: left out, it has rgb but no groundtruth.txt",
    ),
    "hiroom": (
        layouts.hiroom, "20241230/828805/cam_sampled_06/cam_K.npy",
        "20241230/828805/cam_sampled_06: left out, it has image but no cam_K.npy",
    ),
    "eth3d": (
        lambda root: layouts.eth3d(root, undistorted=False), "courtyard/dslr_calibration_jpg/cameras.txt",
        "courtyard: left out, it has images but no dslr_calibration_jpg or dslr_calibration_undistorted",
    ),
    "clearpose": (
        lambda root: write_clearpose_scene(root / "set1/scene1", [0]), "set1/scene1/metadata.mat",
        "set1/scene1: no metadata.mat in it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HALVES)
def test_a_scene_that_lacks_something_is_told_by_what_it_has_and_lacks(tmp_path: Path, case: str) -> None:
    write, taken, message = HALVES[case]
    kind = "colmap" if case == "half a model" else case
    write(tmp_path / "root")
    lost = tmp_path / "root" / taken
    if lost.is_dir():
        shutil.rmtree(lost)
    elif lost.exists():
        lost.unlink()
    if kind == "scannet++":
        shutil.rmtree(tmp_path / "root/data/09c1414f1b/iphone")
    with pytest.raises(ValueError, match="root must hold .*; found none below .*" + re.escape(f"/root/{message}")):
        run(kind, tmp_path / "root", tmp_path / "out")


def test_it_is_told_beside_scenes_that_are_whole_and_counted_in_the_last_lines(tmp_path: Path, capsys) -> None:
    root = tmp_path / "my phone"
    write_rgbd_folder(root / "desk", views=2)
    write_rgbd_folder(root / "more/été 2", views=2)
    (root / "more/été 2/intrinsics.txt").unlink()
    run("rgbd", root, tmp_path / "out")
    out = capsys.readouterr().out
    assert f"skipped root: {root}/more/été 2: left out, it has rgb but no intrinsics.txt\n" in out
    assert "left out: 1 x left out, it has rgb but no intrinsics.txt\n1 of 1 scenes" in out


def test_a_part_of_a_download_that_is_no_scene_costs_that_part(tmp_path: Path, capsys) -> None:
    layouts.dtu(tmp_path / "root/dtu", "rectified")
    layouts.hiroom(tmp_path / "root/hiroom", "data")
    (tmp_path / "root/hiroom/data/20241230/828805/cam_sampled_06/cam_K.npy").unlink()
    run("da3-bench", tmp_path / "root", tmp_path / "out")
    assert (tmp_path / "out/da3-bench/dtu_scan1/scene.json").is_file()
    assert "/root/hiroom: left out, root must hold HiRoom scenes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "write", "below", "message"),
    [
        ("scannet++", layouts.scannetpp, "data/09c1414f1b/dslr", r"folder of the scene, \S*09c1414f1b, or one above"),
        ("eth3d", layouts.eth3d, "courtyard/dslr_calibration_jpg", r"folder of the scene, \S*courtyard, or one above"),
        ("dtu", lambda root: layouts.dtu(root, "rectified"), "Rectified", r"must have cameras in \S*scan1/cams or"),
    ],
)  # fmt: skip
def test_a_root_inside_a_scene_is_told_what_to_name(
    tmp_path: Path, kind: str, write: Callable[[Path], None], below: str, message: str
) -> None:
    write(tmp_path)
    with pytest.raises(ValueError, match=message):
        run(kind, tmp_path / below, tmp_path / "out")


def test_depth_of_eth3d_that_has_lost_its_images_is_told(tmp_path: Path, capsys) -> None:
    layouts.eth3d(tmp_path / "root")
    (tmp_path / "root/courtyard/dslr_calibration_jpg/cameras.txt").unlink()
    run("eth3d", tmp_path / "root", tmp_path / "out")
    assert "ground_truth_depth: not used: it belongs to the original images" in capsys.readouterr().out


def test_provenance_and_notes_speak_of_the_frames_that_were_used_alone(tmp_path: Path, capsys, monkeypatch) -> None:
    """An image whose pixels turn out broken is found late: its name, and the note on its depth, must not stay."""
    root = tmp_path / "mes photos"
    monkeypatch.chdir(tmp_path)
    poses = captures.write_nerfstudio(root / "été 1", 5, names=lambda index: f"images/la mer {index}.png")
    record = json.loads((root / "été 1/transforms.json").read_text())
    for index in (1, 3):
        del record["frames"][index]["depth_file_path"]
    record["frames"].append({**record["frames"][0], "file_path": "images/la mer 9.png"})
    (root / "été 1/transforms.json").write_text(json.dumps(record))
    for index, keep in ((1, 400), (2, 500)):
        path = root / f"été 1/images/la mer {index}.png"
        path.write_bytes(path.read_bytes()[:keep])
    run("nerfstudio", Path("mes photos"), tmp_path / "out")
    folder = tmp_path / "out/nerfstudio/été 1"
    assert SceneFile(folder).provenance["source"]["images"] == [f"images/la mer {index}.png" for index in (0, 3, 4)]
    np.testing.assert_allclose(load_scene(folder).extrinsics, np.array(poses)[[0, 3, 4]], atol=1e-9)
    out = capsys.readouterr().out
    assert "6 images found, 3 used, 3 left out; 4 depths found, 2 used, 2 left out; 6 cameras found, 3 used" in out
    # two of one kind though their names have blanks, and one note though two had no depth
    assert "left out: 2 x is not a whole image: image file is truncated; 1 x no such file\n" in out
    assert "\nnoted: 1 x used without depth: the frame names none\n" in out


@pytest.mark.parametrize(
    ("sentence", "kind"),
    [
        ("été 8.jpg: /photos/a b/images/été 8.jpg is not a whole image: it is empty",
         "is not a whole image: it is empty"),
        ("images/gone 99.jpg: no such file: /captures/Café au lait/images/gone 99.jpg", "no such file"),
        ("été 8.jpg: used without depth: no such file (été 8.png)", "used without depth: no such file"),
        ("a 3.jpg: a copy (of a 2.jpg)", "a copy"),
        ("/tmp/a b/desk: left out, it has images but no transforms.json",
         "left out, it has images but no transforms.json"),
        ("1.png: the rotation is off by -2.5e-3, 4x4", "the rotation is off by N, 4x4"),
    ],
)  # fmt: skip
def test_kinds_of_reasons_hold_no_names_and_numbers(sentence: str, kind: str) -> None:
    # of a relative folder whose first word has blanks that word may stay: it is the same for all of its files
    assert (
        kind_of(sentence).removeprefix("my ").removeprefix("nerf ").replace("no such file: nerf", "no such file")
        == kind
    )


def test_bundles_behind_links_are_found(tmp_path: Path) -> None:
    from subspace3d.datasets.readers import handshake, scans
    from subspace3d.datasets.readers.config import ReaderConfig
    from subspace3d.datasets.readers.source import Report

    elsewhere = tmp_path / "elsewhere"
    layouts.write(elsewhere / "burst/frame_bundle.npz", "x")
    layouts.write(elsewhere / "burst/compressed_frame_bundle.npz", "x")
    layouts.write(elsewhere / "00003/00003.ply", "x")
    (tmp_path / "root").mkdir()
    (tmp_path / "root/linked").symlink_to(elsewhere)
    for kind, find, name in (("hndr", handshake.find, "linked_burst"), ("2k2k", scans.find_2k2k, "00003")):
        config = ReaderConfig(from_=kind, root=tmp_path / "root")  # type: ignore[arg-type]
        assert [scene.name for scene in find(config, tmp_path / "root", Report())] == [name]


def test_a_photo_of_the_wrong_size_is_not_an_image_without_depth(tmp_path: Path, capsys) -> None:
    captures.write_colmap(tmp_path / "root/desk", 3, depth=".png")
    (tmp_path / "root/desk/depth/1.png").unlink()
    Image.new("RGB", (60, 60)).save(tmp_path / "root/desk/images/1.png")
    run("colmap", tmp_path / "root", tmp_path / "out")
    out = capsys.readouterr().out
    assert "is not the one of its camera" in out and "noted" not in out
