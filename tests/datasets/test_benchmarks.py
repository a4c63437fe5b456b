"""Every benchmark is read from its official layout, made of the plane, and compared with it."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from datasets import benchmark_layouts as layouts
from datasets.plane_world import color_error, plane_error

from subspace3d.commands import convert, validate
from subspace3d.commands.convert import ConvertConfig
from subspace3d.commands.validate import ValidateConfig
from subspace3d.datasets.readers import binary_depth
from subspace3d.datasets.readers.source import Report
from subspace3d.formats.scene import SceneFile, load_scene

MILLIMETRE = 0.5e-3 * 1.3  # as in test_readers
RESAMPLED = 2.5 * 0.5 * 0.71 / 88 + MILLIMETRE
JPEG = 12  # levels: quality 98 and less

# kind -> writer, scenes (frames, valid depth's share at least), largest distance of points from the plane
CASES: dict[str, tuple[str, Callable[[Path], None], dict[str, int], float, float]] = {
    "7scenes": (
        "7scenes", layouts.seven_scenes,
        {"7scenes_train/chess_seq-01": 2, "7scenes_test/chess_seq-02": 2}, MILLIMETRE, 2,
    ),
    "nrgbd": ("nrgbd", layouts.nrgbd, {"nrgbd/breakfast_room": 3}, MILLIMETRE, 2),
    "scannet": ("scannet", layouts.scannet, {"scannet/scans_scene0000_00": 3}, MILLIMETRE, JPEG),
    "scannet++": (
        "scannet++", layouts.scannetpp,
        {"scannet++/data_09c1414f1b_dslr": 2, "scannet++/data_09c1414f1b_iphone": 2}, RESAMPLED, 40,
    ),
    "bonn": ("bonn", layouts.bonn, {"bonn/rgbd_bonn_balloon": 2}, MILLIMETRE / 5, 2),
    "hiroom": ("hiroom", layouts.hiroom, {"hiroom/20241230_828805_cam_sampled_06": 2}, 1.6 * MILLIMETRE, 40),
    "eth3d": ("eth3d", layouts.eth3d, {"eth3d/courtyard": 2}, RESAMPLED, 40),
    "dtu rectified": ("dtu", lambda root: layouts.dtu(root, "rectified"), {"dtu/scan1": 2}, 1e-3, 2),
    "dtu train": ("dtu", lambda root: layouts.dtu(root, "train"), {"dtu/scan1_train": 2}, 1e-3, 2),
    "sintel": ("sintel", layouts.sintel, {"sintel/alley_1": 2}, 1e-5, 2),
    "co3d": ("co3d", layouts.co3d, {"co3d_train/apple_110_13051_23361": 3}, 2.5 * 2**-11 * 1.3, 40),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_benchmark_is_read_and_agrees_with_the_world(tmp_path: Path, case: str) -> None:
    kind, write, scenes, depth_error, levels = CASES[case]
    write(tmp_path / "root")
    out = tmp_path / "out"
    convert.run(ConvertConfig(out=out, from_=kind, root=tmp_path / "root"))  # type: ignore[arg-type]
    assert sorted(str(path.parent.relative_to(out)) for path in out.rglob("scene.json")) == sorted(scenes)
    for name, count in scenes.items():
        scene = load_scene(out / name)
        assert len(scene.images) == count
        unit = 1e-3 if SceneFile(out / name).unit == "mm" else 1.0
        for image, depth, intrinsic, extrinsic in zip(scene.images, scene.depths, scene.intrinsics, scene.extrinsics):
            metres = np.c_[extrinsic[:, :3], extrinsic[:, 3] * unit]
            assert (depth > 0).mean() > 0.6
            assert plane_error(depth * unit, intrinsic, metres) <= depth_error
            assert color_error(image, depth * unit, intrinsic, metres) <= levels
    assert validate.run(ValidateConfig(scenes=out))["with_errors"] == 0


@pytest.mark.parametrize("layout", ["test", "dtu64"])
def test_dtu_without_depth(tmp_path: Path, layout: str) -> None:
    layouts.dtu(tmp_path / "root", layout)
    convert.run(ConvertConfig(out=tmp_path / "out", from_="dtu", root=tmp_path / "root"))
    (folder,) = (tmp_path / "out/dtu").iterdir()
    scene = load_scene(folder)
    np.testing.assert_allclose(scene.intrinsics[0], layouts.K, atol=1e-9)
    np.testing.assert_allclose(scene.extrinsics[:, :, 3], 1000 * np.array(layouts.POSES)[:2, :, 3], atol=1e-6)


def test_what_benchmarks_leave_out_is_left_out(tmp_path: Path) -> None:
    """Masks and marks of no depth: 65535 of 7-Scenes, HiRoom's aliased edges, Co3D's masks; poses that are none."""
    for kind, write, name in (
        ("7scenes", layouts.seven_scenes, "7scenes_train/chess_seq-01"),
        ("hiroom", layouts.hiroom, "hiroom/20241230_828805_cam_sampled_06"),
        ("co3d", layouts.co3d, "co3d_train/apple_110_13051_23361"),
    ):
        write(tmp_path / kind)
        convert.run(ConvertConfig(out=tmp_path / "out", from_=kind, root=tmp_path / kind))  # type: ignore[arg-type]
        depth = load_scene(tmp_path / "out" / name).depths[0] > 0
        lost = {"7scenes": np.s_[:3], "hiroom": np.s_[:, :5], "co3d": np.s_[:, :20]}[kind]
        expected = np.ones_like(depth)
        expected[lost] = False
        assert np.array_equal(depth, expected)
    assert SceneFile(tmp_path / "out/co3d_train/apple_110_13051_23361").provenance["found"]["images"] == 4


# a file of each layout with what takes one frame's pose away; the layouts that are not here have such a frame
BROKEN: dict[str, tuple[str, str, str]] = {
    "7scenes": ("chess/seq-01/frame-000001.pose.txt", r"\A.*\Z", "nan " * 16),
    "scannet++": ("data/09c1414f1b/iphone/colmap/images.txt", r"(?m)^2 \S+", "2 nan"),
    "bonn": ("rgbd_bonn_balloon/groundtruth.txt", r" \S+\n\Z", " nan\n"),
    "hiroom": ("20241230/828805/cam_sampled_06/pose/0001.npy", r"\A.*\Z", "none"),
    "eth3d": ("courtyard/dslr_calibration_jpg/images.txt", r"(?m)^2 \S+", "2 nan"),
    "dtu rectified": ("Cameras/00000001_cam.txt", "intrinsic", "extrinsic"),
    "dtu train": ("Cameras/train/00000001_cam.txt", "intrinsic", "extrinsic"),
    "sintel": ("training/camdata_left/alley_1/frame_0002.cam", r"\A.*\Z", "none"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_belongs_to_a_broken_pose_is_counted_as_found(tmp_path: Path, case: str) -> None:
    kind, write, _, _, _ = CASES[case]
    write(tmp_path)
    if case in BROKEN:
        name, pattern, replacement = BROKEN[case]
        content = (tmp_path / name).read_text(encoding="latin-1")
        broken = re.sub(pattern, replacement, content, count=1, flags=re.DOTALL)
        assert broken != content
        (tmp_path / name).write_text(broken, encoding="latin-1")
    config = ConvertConfig(out=tmp_path / "out", from_=kind, root=tmp_path)  # type: ignore[arg-type]
    scenes = convert._find(config, Report())
    left_out = 0
    for scene in pickle.loads(pickle.dumps(list(scenes.values()))):
        report = Report()
        content = scene.read(config, report)
        used = list(content.frames)
        assert len(content.provenance["source"]["images"]) == len(used)
        # every frame of these layouts has an image, a depth map and a camera
        assert report.found["images"] == report.found["depths"] == report.found["cameras"]
        left_out += report.found["images"] - len(used)
    assert left_out == 1


def test_a_translation_that_is_no_number_costs_its_image_alone(tmp_path: Path) -> None:
    layouts.nrgbd(tmp_path / "root")
    file = tmp_path / "root/breakfast_room/poses.txt"
    lines = file.read_text().splitlines()
    lines[4 * 11] = lines[4 * 11].rpartition(" ")[0] + " nan"
    file.write_text("\n".join(lines))
    convert.run(ConvertConfig(out=tmp_path / "out", from_="nrgbd", root=tmp_path / "root"))
    assert len(SceneFile(tmp_path / "out/nrgbd/breakfast_room")) == 2


def test_eth3d_without_its_original_images_is_read_undistorted(tmp_path: Path) -> None:
    import shutil

    layouts.eth3d(tmp_path / "root")
    shutil.rmtree(tmp_path / "root/courtyard/images/dslr_images")
    convert.run(ConvertConfig(out=tmp_path / "out", from_="eth3d", root=tmp_path / "root"))
    scene = SceneFile(tmp_path / "out/eth3d/courtyard")
    assert not scene.has_depth and scene.provenance["source"]["model"] == "dslr_calibration_undistorted"
    np.testing.assert_allclose(scene.camera(0)[0], layouts.K)


def test_the_download_of_da3_bench(tmp_path: Path) -> None:
    layouts.da3_bench(tmp_path / "root")
    convert.run(ConvertConfig(out=tmp_path / "out", from_="da3-bench", root=tmp_path / "root"))
    found = {path.parent.name: len(SceneFile(path)) for path in (tmp_path / "out").rglob("scene.json")}
    assert found == {
        "eth3d_courtyard": 2,
        "7scenes_chess_seq-01": 2,
        "7scenes_chess_seq-02": 2,
        "scannetpp_09c1414f1b": 2,
        "hiroom_data_20241230_828805_cam_sampled_06": 2,
        "dtu_scan1": 2,
        "dtu64_scan105": 2,
    }
    names = SceneFile(tmp_path / "out/da3-bench/scannetpp_09c1414f1b").provenance["source"]["images"]
    assert names == ["iphone/frame_000000.jpg", "iphone/frame_000010.jpg"]


KINDS = ["7scenes", "nrgbd", "scannet", "scannet++", "bonn", "hiroom", "eth3d", "dtu", "sintel", "co3d", "da3-bench"]


@pytest.mark.parametrize("kind", [*KINDS, "colmap", "nerfstudio", "images"])
def test_an_empty_root_is_told_the_layout(tmp_path: Path, kind: str) -> None:
    (tmp_path / "root").mkdir()
    with pytest.raises(ValueError, match="root must hold"):
        convert.run(ConvertConfig(out=tmp_path / "out", from_=kind, root=tmp_path / "root"))  # type: ignore[arg-type]


def test_depth_files_of_benchmarks_are_whole_or_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    depth = rng.uniform(1, 5, (3, 5)).astype(np.float32)
    path = tmp_path / "d.pfm"
    path.write_bytes(layouts.pfm(depth))
    assert np.array_equal(binary_depth.read_pfm(path), depth)
    big = b"Pf\n5 3\n1.0\n" + depth[::-1].astype(">f4").tobytes()
    path.write_bytes(big)
    assert np.array_equal(binary_depth.read_pfm(path), depth)
    for data in (big[:-1], b"PF" + big[2:], b"Pf\n-5 3\n1\n", b"", b"Pf\n999999999 999999999\n1.0\n"):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"PFM|must hold"):
            binary_depth.read_pfm(path)
    for read in (binary_depth.read_dpt, binary_depth.read_sintel_camera):
        path.write_bytes(b"HEIP" + bytes(100))
        with pytest.raises(ValueError, match="tag"):
            read(path)
    with pytest.raises(ValueError, match="must hold 4 x 9 numbers of 4 bytes"):
        binary_depth.read_raw(path, (9, 4))
