"""Captures as other programs and systems write them, against the world behind them: right values, or told by name."""

from __future__ import annotations

import json
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap
import pytest
from datasets import official_layouts as layouts
from datasets import own_captures as captures
from datasets.plane_world import camera_path
from datasets.test_own_captures import MILLIMETRE, RESAMPLED, assert_on_plane, run
from PIL import Image

from subspace3d.commands import finetune, validate
from subspace3d.commands.finetune import FinetuneConfig
from subspace3d.commands.validate import ValidateConfig
from subspace3d.datasets.multiview import MultiViewDataset
from subspace3d.datasets.readers.folders import named_file
from subspace3d.datasets.readers.source import nearest_rotation, pose_matrix
from subspace3d.datasets.readers.views import pose_from_c2w, pose_from_opengl, pose_from_w2c
from subspace3d.formats.scene import SceneFile, load_scene


def change(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    record = json.loads(path.read_text())
    edit(record)
    path.write_text(json.dumps(record))


# COLMAP


def test_an_undistorted_workspace_has_its_own_images(tmp_path: Path) -> None:
    # as image_undistorter leaves it, inside the folder of the photos it was made from
    root = tmp_path / "root"
    captures.write_colmap(root / "desk", 3, model="OPENCV")
    captures.write_colmap(root / "desk/dense/0", 3, depth="dense", at="sparse")
    run("colmap", root, tmp_path / "out")
    assert_on_plane(tmp_path / "out/colmap/desk_dense_0", 1e-5, levels=1)
    sources = [SceneFile(tmp_path / f"out/colmap/{name}").provenance["source"] for name in ("desk", "desk_dense_0")]
    assert [source["models"] for source in sources] == [["OPENCV"], ["PINHOLE"]]
    copied = (tmp_path / "out/colmap/desk_dense_0/images/0000.png").read_bytes()
    assert copied == (root / "desk/dense/0/images/0.png").read_bytes()


def test_reduced_images_stand_in_for_images(tmp_path: Path, capsys) -> None:
    root = tmp_path / "root"
    captures.write_colmap(root / "a", 3, depth=".png")
    for factor in (2, 4):
        for index in range(3):
            image = Image.open(root / f"a/images/{index}.png")
            layouts.save_image(
                root / f"a/images_{factor}/{index}.png",
                np.asarray(image.resize((80 // factor, 60 // factor), Image.Resampling.BOX)),
            )
    shutil.rmtree(root / "a/images")
    run("colmap", root, tmp_path / "out")
    scene = load_scene(tmp_path / "out/colmap/a")
    assert scene.images.shape == (3, 30, 40, 3)
    np.testing.assert_allclose(scene.intrinsics[0], [[44, 0, 21.2], [0, 46, 13.8], [0, 0, 1]])
    assert "noted a: images_2: used" in capsys.readouterr().out


def test_a_model_without_a_folder_of_images_says_which_it_looks_for(tmp_path: Path) -> None:
    captures.write_colmap(tmp_path / "root/a", 2)
    shutil.rmtree(tmp_path / "root/a/images")
    with pytest.raises(ValueError, match="must have the model's images in a folder images, or rgb, color, input"):
        run("colmap", tmp_path / "root", tmp_path / "out")


# nerfstudio and Instant-NGP


def backslashes(name: str) -> str:
    return name.replace("/", "\\")


def apart(name: str) -> str:
    return unicodedata.normalize("NFD", name)


def without_suffix(name: str) -> str:
    return name.rsplit(".", 1)[0]


@pytest.mark.parametrize("spelled", [backslashes, apart, without_suffix, str.upper])
@pytest.mark.parametrize("suffix", [".png", ".PNG"])
def test_names_are_found_as_other_systems_spell_them(
    tmp_path: Path, spelled: Callable[[str], str], suffix: str
) -> None:
    root = tmp_path / "root"
    poses = captures.write_nerfstudio(root / "a", 4, names=lambda index: f"images/été.{index + 8}.png")
    for path in list((root / "a/images").iterdir()):
        path.rename(path.with_suffix(suffix))

    def spell(record: dict[str, Any]) -> None:
        for frame in record["frames"]:
            frame["file_path"] = spelled(frame["file_path"].replace(".png", suffix))
            frame["depth_file_path"] = frame["depth_file_path"].replace("/", "\\")

    change(root / "a/transforms.json", spell)
    if spelled is str.upper:
        (root / "a/images").rename(root / "a/IMAGES")
    run("nerfstudio", root, tmp_path / "out")
    scene = load_scene(tmp_path / "out/nerfstudio/a")
    np.testing.assert_allclose(scene.extrinsics, poses, atol=1e-9)
    assert_on_plane(tmp_path / "out/nerfstudio/a", MILLIMETRE, levels=2)
    assert json.loads((tmp_path / "out/skipped-nerfstudio.json").read_text()) == {}


def test_a_name_that_two_files_could_have_is_neither(tmp_path: Path) -> None:
    for name in ("A.png", "a.PNG", "b.jpg", "b.tiff", "c.txt"):
        (tmp_path / name).write_bytes(b"1")
    assert named_file(tmp_path, "a.png") == tmp_path / "a.png"
    assert named_file(tmp_path, "A.png") == tmp_path / "A.png"
    assert named_file(tmp_path, "b") == tmp_path / "b.jpg"
    assert named_file(tmp_path, "B") == tmp_path / "B"
    assert named_file(tmp_path, "c") == tmp_path / "c"
    assert named_file(tmp_path / "b", "") == tmp_path / "b"


def test_instant_ngps_fisheye_depth_and_step_are_read(tmp_path: Path) -> None:
    root = tmp_path / "root"
    captures.write_nerfstudio(root / "a", 3, model="OPENCV_FISHEYE")

    def as_instant_ngp(record: dict[str, Any]) -> None:
        del record["camera_model"]
        record |= {"is_fisheye": True, "integer_depth_scale": 0.0005, "aabb_scale": 16, "enable_depth_loading": True}
        for frame in record["frames"]:
            frame["depth_path"] = frame.pop("depth_file_path")
            path = root / "a" / frame["depth_path"]
            layouts.save_image(path, np.asarray(Image.open(path)).astype(np.uint16) * 2)

    change(root / "a/transforms.json", as_instant_ngp)
    run("nerfstudio", root, tmp_path / "out")
    assert_on_plane(tmp_path / "out/nerfstudio/a", RESAMPLED, levels=8)


@pytest.mark.parametrize(
    "lens", [{"equirectangular": True}, {"ftheta_p0": 1.0}, {"k5": 0.1}, {"camera_model": "EQUIRECTANGULAR"}]
)
def test_a_lens_that_is_not_read_is_refused_by_name(tmp_path: Path, lens: dict[str, Any]) -> None:
    captures.write_nerfstudio(tmp_path / "root/a", 2)
    change(tmp_path / "root/a/transforms.json", lambda record: record.update(lens))
    with pytest.raises(ValueError, match=str(next(iter(lens)))):
        run("nerfstudio", tmp_path / "root", tmp_path / "out")


def test_a_rolling_shutter_is_told(tmp_path: Path, capsys) -> None:
    captures.write_nerfstudio(tmp_path / "root/a", 2)
    change(
        tmp_path / "root/a/transforms.json",
        lambda record: record["frames"][0].update(rolling_shutter=[0.0, 0.0, 0.1]),
    )
    run("nerfstudio", tmp_path / "root", tmp_path / "out")
    assert "noted a: rolling_shutter: used" in capsys.readouterr().out


def test_an_image_named_twice_counts_once(tmp_path: Path, capsys) -> None:
    captures.write_nerfstudio(tmp_path / "root/a", 3)
    change(tmp_path / "root/a/transforms.json", lambda record: record["frames"].append(record["frames"][0]))
    run("nerfstudio", tmp_path / "root", tmp_path / "out")
    assert len(SceneFile(tmp_path / "out/nerfstudio/a")) == 3
    out = capsys.readouterr().out
    assert "4 images found, 3 used, 1 left out" in out and "frame_0.png: named twice" in out


# poses


def test_a_transposed_pose_is_refused_and_a_scaled_rotation_named() -> None:
    pose = np.vstack([camera_path(3)[0], [0, 0, 0, 1]])
    np.testing.assert_array_equal(pose_matrix(pose.tolist(), "p"), pose)
    with pytest.raises(ValueError, match=r"last row 0 0 0 1.*transposed"):
        pose_matrix(pose.T.tolist(), "p")
    for read in (pose_from_c2w, pose_from_opengl, pose_from_w2c):
        np.testing.assert_array_equal(read(pose), read(pose[:3]))
        with pytest.raises(ValueError, match="is it transposed"):
            read(pose.T)
        with pytest.raises(ValueError, match="translation must be finite"):
            read(np.c_[pose[:, :3], [np.nan, 0, 0, 1]])
    with pytest.raises(ValueError, match=r"one times 2\.5: divide"):
        nearest_rotation(2.5 * pose[:3, :3])
    with pytest.raises(ValueError, match="a reflection"):
        nearest_rotation(pose[:3, :3] * [1, 1, -1])


def test_poses_written_column_by_column_are_refused(tmp_path: Path, capsys) -> None:
    layouts.write_rgbd_folder(tmp_path / "root/a", views=3)
    lines = [" ".join(map(str, layouts.to_c2w(pose).T.ravel())) for pose in camera_path(3)]
    (tmp_path / "root/a/poses.txt").write_text("\n".join(lines))
    run("rgbd", tmp_path / "root", tmp_path / "out")
    # the camera between them stands at the origin, where rows and columns look the same
    assert "2 x a pose must have the last row" in capsys.readouterr().out


# turned photos


@pytest.mark.parametrize("orientation", [6, 8])
def test_depth_as_the_sensor_lies_is_turned_with_its_photo(tmp_path: Path, orientation: int) -> None:
    # a phone held upright: the cameras are those of the photo as shown, photo and depth are stored as the sensor lies
    size, folder = (80, 60), tmp_path / "root/a"
    fx, fy, cx, cy = 92.0, 88.0, 32.4, 42.4
    camera = pycolmap.Camera(model="PINHOLE", width=size[1], height=size[0], params=[fx, fy, cx, cy])
    exif = Image.Exif()
    exif[0x0112] = orientation
    turns = {6: 1, 8: -1}[orientation]
    (folder / "rgb").mkdir(parents=True)
    lines = []
    for index, pose in enumerate(camera_path(3)):
        image, depth = captures.seen_by(camera, pose, size)
        stored = np.ascontiguousarray(np.rot90(image, turns))
        Image.fromarray(stored).save(folder / f"rgb/{index}.jpg", quality=98, subsampling=0, exif=exif)
        turned = np.ascontiguousarray(np.rot90(depth, turns))
        layouts.save_image(folder / f"depth/{index}.png", np.rint(1000 * turned).astype(np.uint16))
        lines.append(" ".join(map(str, layouts.to_c2w(pose)[:3].ravel())))
    (folder / "intrinsics.txt").write_text(f"{fx} {fy} {cx - 0.5} {cy - 0.5}")
    (folder / "poses.txt").write_text("\n".join(lines))
    run("rgbd", tmp_path / "root", tmp_path / "out")
    assert_on_plane(tmp_path / "out/rgbd/a", MILLIMETRE, levels=20)
    assert SceneFile(tmp_path / "out/rgbd/a").counts()["depths"] == 3


# folders of images


def test_photos_of_a_kind_that_is_not_read_are_told_and_copies_left_out(tmp_path: Path, capsys) -> None:
    rng = np.random.default_rng(2)
    for index in range(2):
        layouts.save_image(tmp_path / f"root/a/{index}.png", rng.integers(0, 256, (8, 9, 3), dtype=np.uint8))
    shutil.copy(tmp_path / "root/a/0.png", tmp_path / "root/a/5 copy.png")
    (tmp_path / "root/a/6.png").write_bytes(b"")
    (tmp_path / "root/phone").mkdir()
    (tmp_path / "root/phone/IMG_1.HEIC").write_bytes(b"1")
    run("images", tmp_path / "root", tmp_path / "out")
    out = capsys.readouterr().out
    assert len(SceneFile(tmp_path / "out/images/a")) == 2
    assert "5 copy.png: a copy (of 0.png)" in out and "6.png is not a whole image: it is empty" in out
    assert "IMG_1.HEIC: images of the kind .heic are not read" in out
    assert "5 images found, 2 used, 3 left out" in out and "1 of 2 scenes" in out


def test_scenes_that_are_lost_are_told_before_single_frames(tmp_path: Path, capsys) -> None:
    root = tmp_path / "root"
    captures.write_nerfstudio(root / "a", 16, depth=False)
    for index in range(14):
        (root / f"a/images/frame_{index}.png").write_bytes(b"")
    (root / "b").mkdir()
    (root / "b/transforms.json").write_text("{}")
    run("nerfstudio", root, tmp_path / "out")
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped ")]
    assert told[0].startswith("skipped b: left out: ")
    assert len(told) == 11 and told[-1].startswith("skipped or noted 5 more")


def test_what_comes_next_is_said_and_a_scene_that_stands_is_not_read_again(tmp_path: Path, capsys) -> None:
    root = tmp_path / "root"
    captures.write_nerfstudio(root / "a", 2)
    run("nerfstudio", root, tmp_path / "out")
    assert "were there before" not in capsys.readouterr().out
    run("nerfstudio", root, tmp_path / "out")
    assert "1 were there before and were not read again" in capsys.readouterr().out
    validate.run(ValidateConfig(tmp_path / "out"))
    told = capsys.readouterr().out
    assert f"next: subspace3d finetune --scenes {tmp_path / 'out'} --method lora --out RUN, with --few" in told
    run("images", root / "a/images", tmp_path / "photos")
    capsys.readouterr()
    validate.run(ValidateConfig(tmp_path / "photos"))
    assert "next: subspace3d finetune --few --scenes" in capsys.readouterr().out
    validate.run(ValidateConfig(tmp_path / "photos", json=True))
    assert json.loads(capsys.readouterr().out)["with_errors"] == 0


def test_a_scene_without_cameras_is_refused_before_training_begins(tmp_path: Path) -> None:
    captures.write_nerfstudio(tmp_path / "root/a", 2)
    run("nerfstudio", tmp_path / "root", tmp_path / "out")
    run("images", tmp_path / "root/a/images", tmp_path / "out")
    dataset = MultiViewDataset(tmp_path / "out", 28)
    with pytest.raises(ValueError, match=r"scene\.json has frames without cameras.*finetune --few"):
        dataset.require_cameras()
    with pytest.raises(ValueError, match="has frames without cameras"):
        finetune.run(FinetuneConfig(tmp_path / "out", tmp_path / "run", method="bias"))
    assert not (tmp_path / "run").exists()
    whole = MultiViewDataset(tmp_path / "out/nerfstudio", 28)
    assert whole.require_cameras() is whole
