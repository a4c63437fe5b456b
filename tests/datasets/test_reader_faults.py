"""What data sets have done to readers before: each kind gives the right value, or an error or a count that names it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from datasets import official_layouts as layouts
from datasets.own_captures import write_colmap, write_nerfstudio
from datasets.plane_world import camera_matrix, camera_path, color_error, plane_error, view
from PIL import Image

from subspace3d.commands import convert
from subspace3d.commands.convert import ConvertConfig
from subspace3d.datasets.multiview import MultiViewDataset
from subspace3d.datasets.readers.source import finite_number
from subspace3d.formats.images import read_depth
from subspace3d.formats.scene import Frame, SceneFile, find_scenes, load_scene, write_frames

MILLIMETRE = 0.5e-3 * 1.3  # as in test_readers


def run(root: Path, out: Path, kind: str = "rgbd", **others) -> Path:
    convert.run(ConvertConfig(out=out, from_=kind, root=root, **others))  # type: ignore[arg-type]
    return out / kind


def assert_on_plane(folder: Path, frames: int, depth_error: float = MILLIMETRE, levels: float = 2) -> None:
    scene = load_scene(folder)
    assert len(scene.images) == frames
    for image, depth, intrinsic, extrinsic in zip(scene.images, scene.depths, scene.intrinsics, scene.extrinsics):
        assert (depth > 0).all()
        assert plane_error(depth, intrinsic, extrinsic) <= depth_error
        assert color_error(image, depth, intrinsic, extrinsic) <= levels


def renumber(folder: Path, views: int, name: str) -> None:
    for index in range(views):
        for part in ("rgb", "depth"):
            path = folder / f"{part}/{index:03d}.png"
            if path.is_file():
                path.rename(path.with_name(name.format(index) + ".png"))


@pytest.mark.parametrize("name", ["{0}", "frame_{0}", "{0}.5", "img{0}_color"])
def test_images_are_counted_not_spelled(tmp_path: Path, name: str) -> None:
    layouts.write_rgbd_folder(tmp_path / "root/a", views=12)
    renumber(tmp_path / "root/a", 12, name)
    assert_on_plane(run(tmp_path / "root", tmp_path / "out") / "a", 12)


def test_times_are_numbers(tmp_path: Path) -> None:
    """100.5 comes after 100.45, though 5 is less than 45."""
    layouts.write_rgbd_folder(tmp_path / "root/a", views=3)
    for index, time in enumerate(("99.9", "100.45", "100.5")):
        for part in ("rgb", "depth"):
            (tmp_path / f"root/a/{part}/{index:03d}.png").rename(tmp_path / f"root/a/{part}/{time}.png")
    assert_on_plane(run(tmp_path / "root", tmp_path / "out") / "a", 3)


def replace_depth(folder: Path, views: int, save) -> None:
    intrinsic = camera_matrix(layouts.SIZE[1], layouts.SIZE[0])
    for index, pose in enumerate(camera_path(views)):
        (folder / f"depth/{index:03d}.png").unlink()
        save(folder / f"depth/{index:03d}", view(intrinsic, pose, *layouts.SIZE)[1])


def _npy(scale: float, dtype, shape=lambda depth: depth):
    return lambda stem, depth: np.save(f"{stem}.npy", shape((scale * depth).astype(dtype)))


DEPTHS = {
    "PNG": lambda stem, depth: Image.fromarray(np.rint(1000 * depth).astype(np.uint16)).save(f"{stem}.PNG"),
    "tiff": lambda stem, depth: Image.fromarray(depth.astype(np.float32)).save(f"{stem}.tiff"),
    "tiff of 16 bits": lambda stem, depth: Image.fromarray((1000 * depth + 0.5).astype(np.uint16)).save(f"{stem}.tif"),
    "npz": lambda stem, depth: np.savez(f"{stem}.npz", depth=depth, valid=depth > 0),
    "npz of one": lambda stem, depth: np.savez(f"{stem}.npz", depth),
    "npy": _npy(1, np.float32),
    "float64": _npy(1, np.float64),
    "integers": _npy(1000, np.uint16, lambda depth: depth),
    "trailing axis": _npy(1, np.float32, lambda depth: depth[..., None]),
    "leading axis": _npy(1, np.float32, lambda depth: depth[None]),
}


@pytest.mark.parametrize("kind", DEPTHS)
def test_depth_of_every_kind(tmp_path: Path, kind: str) -> None:
    layouts.write_rgbd_folder(tmp_path / "root/a", views=2)
    replace_depth(tmp_path / "root/a", 2, DEPTHS[kind])
    (tmp_path / "root/a/depth").rename(tmp_path / "root/a/depths")
    # integers are cut off, not rounded, by the second way of writing them
    assert_on_plane(run(tmp_path / "root", tmp_path / "out") / "a", 2, 2 * MILLIMETRE)


def test_depth_of_eight_bits_has_its_step_given(tmp_path: Path) -> None:
    layouts.write_rgbd_folder(tmp_path / "root/a", views=2)
    replace_depth(
        tmp_path / "root/a",
        2,
        lambda stem, depth: Image.fromarray(np.rint(50 * depth).astype(np.uint8)).save(f"{stem}.png"),
    )
    folder = run(tmp_path / "root", tmp_path / "out", depth_scale=0.02) / "a"
    assert_on_plane(folder, 2, 20 * MILLIMETRE, levels=20)


@pytest.mark.parametrize(("scale", "dtype"), [(1000, np.float32), (0.2, np.float32), (10_000, np.uint16)])
def test_a_unit_that_does_not_fit_is_asked_for(tmp_path: Path, scale: float, dtype) -> None:
    layouts.write_rgbd_folder(tmp_path / "root/a", views=4)
    replace_depth(tmp_path / "root/a", 4, _npy(scale, dtype))
    with pytest.raises(ValueError, match="--depth-scale"):
        run(tmp_path / "root", tmp_path / "out")
    folder = run(tmp_path / "root", tmp_path / "again", depth_scale=1 / scale) / "a"
    assert_on_plane(folder, 4)


def test_depth_beyond_a_png_and_marks_of_no_depth_are_kept(tmp_path: Path) -> None:
    layouts.write_rgbd_folder(tmp_path / "root/a", views=2)
    far = np.full(layouts.SIZE, 150.0, np.float32)
    far[0], far[1, 0], far[1, 1], far[2] = -1, np.nan, np.inf, 1234.5
    replace_depth(tmp_path / "root/a", 2, lambda stem, depth: np.save(f"{stem}.npy", far))
    folder = run(tmp_path / "root", tmp_path / "out", depth_scale=1) / "a"
    expected = far.copy()
    expected[0] = expected[1, :2] = 0
    assert np.array_equal(load_scene(folder).depths[0], expected)
    np.save(tmp_path / "d.npy", far - 200)
    with pytest.raises(ValueError, match=r"depths of at least 0 \(-1: invalid\)"):
        read_depth(tmp_path / "d.npy", 1.0)


def test_depth_whose_names_do_not_fit_is_refused_and_a_prefix_does(tmp_path: Path) -> None:
    layouts.write_rgbd_folder(tmp_path / "root/a", views=2)
    for index in range(2):
        path = tmp_path / f"root/a/depth/{index:03d}.png"
        path.rename(path.with_name(f"depth_{path.name}"))
    assert_on_plane(run(tmp_path / "root", tmp_path / "out") / "a", 2)
    for index in range(2):
        path = tmp_path / f"root/a/depth/depth_{index:03d}.png"
        path.rename(path.with_name(f"x{index}.png"))
    with pytest.raises(ValueError, match=r"has 2 depth files like x0\.png, none of which has the name of an image"):
        run(tmp_path / "root", tmp_path / "other")


def test_stray_files_are_counted(tmp_path: Path, capsys) -> None:
    layouts.write_rgbd_folder(tmp_path / "root/a", views=3)
    (tmp_path / "root/a/depth/notes.pfm").write_text("x")
    (tmp_path / "root/a/rgb/more.heic").write_text("x")
    run(tmp_path / "root", tmp_path / "out")
    out = capsys.readouterr().out
    assert "notes.pfm: a file in depth that is no depth of a kind that is read" in out
    assert "4 images found, 3 used, 1 left out" in out


BAD_POSES = {
    "not a number": "nan 0 0 0 0 1 0 0 0 0 1 0",
    "no rotation": "2 0 0 0 0 2 0 0 0 0 2 0",
    "short": "1 0 0 0",
    "words": "one 0 0 0 0 1 0 0 0 0 1 0",
}


@pytest.mark.parametrize("bad", BAD_POSES)
def test_one_bad_pose_costs_that_frame(tmp_path: Path, bad: str) -> None:
    layouts.write_rgbd_folder(tmp_path / "root/a", views=5)
    path = tmp_path / "root/a/poses.txt"
    lines = path.read_text().splitlines()
    lines[2] = BAD_POSES[bad] if bad == "short" else " ".join([*BAD_POSES[bad].split(), *["0", "0", "0", "1"]])
    path.write_text("\n".join(lines))
    assert_on_plane(run(tmp_path / "root", tmp_path / "out") / "a", 4)
    skipped = json.loads((tmp_path / "out/skipped-rgbd.json").read_text())
    assert len(skipped["a"]) == 1 and skipped["a"][0].startswith("002.png: ")


def test_a_quaternion_of_zeros_costs_that_frame(tmp_path: Path) -> None:
    layouts.write_tum_folder(tmp_path / "root/a", views=4)
    path = tmp_path / "root/a/groundtruth.txt"
    lines = path.read_text().splitlines()
    lines[1] = " ".join([*lines[1].split()[:4], "0", "0", "0", "0"])
    path.write_text("\n".join(lines))
    assert_on_plane(run(tmp_path / "root", tmp_path / "out") / "a", 3, MILLIMETRE / 5)


@pytest.mark.parametrize("shape", ["4", "3x3", "3x4", "4x4"])
def test_intrinsics_of_every_shape_with_comments_and_marks(tmp_path: Path, shape: str) -> None:
    intrinsic = layouts.write_rgbd_folder(tmp_path / "root/a", views=2)
    centred = intrinsic.copy()
    centred[:2, 2] -= 0.5
    whole = np.eye(4)
    whole[:3, :3] = centred
    matrix = {"3x3": centred, "3x4": whole[:3], "4x4": whole}.get(shape)
    if matrix is None:
        text = f"{centred[0, 0]}, {centred[1, 1]}, {centred[0, 2]}, {centred[1, 2]} # pixels"
    else:
        text = "\r\n".join(" ".join(map(str, row)) + "  # row" for row in matrix.tolist())
    (tmp_path / "root/a/intrinsics.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    folder = run(tmp_path / "root", tmp_path / "out") / "a"
    np.testing.assert_allclose(load_scene(folder).intrinsics[0], intrinsic, atol=1e-9)


def test_a_transposed_camera_is_refused_and_a_skewed_one_straightened(tmp_path: Path) -> None:
    intrinsic = layouts.write_rgbd_folder(tmp_path / "root/a", views=2)
    centred = intrinsic.copy()
    centred[:2, 2] -= 0.5
    file = tmp_path / "root/a/intrinsics.txt"
    file.write_text("\n".join(" ".join(map(str, row)) for row in centred.T.tolist()))
    with pytest.raises(ValueError, match="are they transposed"):
        run(tmp_path / "root", tmp_path / "out")
    skewed = intrinsic + [[0, 8.0, 0], [0, 0, 0], [0, 0, 0]]
    for index, pose in enumerate(camera_path(2)):
        image, depth = view(skewed, pose, *layouts.SIZE)
        layouts.save_image(tmp_path / f"root/a/rgb/{index:03d}.png", image)
        layouts.save_image(tmp_path / f"root/a/depth/{index:03d}.png", np.rint(1000 * depth).astype(np.uint16))
    skewed[:2, 2] -= 0.5
    file.write_text("\n".join(" ".join(map(str, row)) for row in skewed.tolist()))
    folder = run(tmp_path / "root", tmp_path / "out2") / "a"
    # a direction's pixel is up to half a pixel's diagonal away
    assert_on_plane(folder, 2, 2.5 * 0.5 * 0.71 / 52, levels=120 * 3.9 * 2.5 * 0.71 / 52)


def test_a_principal_point_at_the_border_is_refused_by_the_name_of_the_frame(tmp_path: Path) -> None:
    image = np.zeros((60, 80, 3), np.uint8)
    intrinsic = np.array([[80.0, 0, 1], [0, 80, 30], [0, 0, 1]])
    write_frames(tmp_path / "set/kitchen", [Frame(image, intrinsic, np.eye(3, 4))], {})
    with pytest.raises(ValueError, match=r"kitchen/scene\.json: frames\[0\]: principal point must be at least 5%"):
        load_scene(tmp_path / "set/kitchen", image_size=28)
    with pytest.raises(ValueError, match=r"kitchen/scene\.json: frames\[0\]: principal point"):
        MultiViewDataset(tmp_path / "set", 28).batch(0, 0, (1, 1), 1)


def test_linked_scenes_are_found_once(tmp_path: Path) -> None:
    image = np.zeros((6, 8, 3), np.uint8)
    write_frames(tmp_path / "far/kitchen", [Frame(image)], {})
    (tmp_path / "set").mkdir()
    (tmp_path / "set/link").symlink_to(tmp_path / "far/kitchen")
    (tmp_path / "set/again").symlink_to(tmp_path / "far")
    (tmp_path / "set/loop").symlink_to(tmp_path / "set")
    assert find_scenes(tmp_path / "set") == [tmp_path / "set/again/kitchen"]
    assert len(SceneFile(tmp_path / "set/again/kitchen")) == 1


def test_a_linked_capture_is_followed_and_a_linked_image_named(tmp_path: Path, capsys) -> None:
    layouts.write_rgbd_folder(tmp_path / "disk/a", views=3)
    (tmp_path / "root").mkdir()
    (tmp_path / "root/a").symlink_to(tmp_path / "disk/a")
    image = tmp_path / "disk/a/rgb/001.png"
    image.rename(tmp_path / "elsewhere.png")
    image.symlink_to(tmp_path / "elsewhere.png")
    assert_on_plane(run(tmp_path / "root", tmp_path / "out") / "a", 2)
    out = capsys.readouterr().out
    assert "001.png is a link out of" in out and f"to {(tmp_path / 'elsewhere.png').resolve()}" in out


@pytest.mark.parametrize("kind", ["colmap", "nerfstudio"])
def test_images_nobody_names_and_names_without_images(tmp_path: Path, kind: str, capsys) -> None:
    write = write_colmap if kind == "colmap" else write_nerfstudio
    write(tmp_path / "root/a", 4)
    images = sorted((tmp_path / "root/a/images").iterdir())
    images[1].rename(images[1].with_name("spare.png"))
    images[2].write_bytes(images[2].read_bytes()[:300])
    run(tmp_path / "root", tmp_path / "out", kind)
    out = capsys.readouterr().out
    assert "5 images found, 2 used, 3 left out" in out
    assert "spare.png: " in out and "no such file" in out and "is not a whole image" in out


def test_a_model_that_is_no_model_is_named(tmp_path: Path) -> None:
    write_colmap(tmp_path / "root/a", 2)
    file = tmp_path / "root/a/sparse/0/images.bin"
    whole = file.read_bytes()
    for data in (whole[:40], b"\xff" * 200, whole[:8] + b"\xff" * 100, b""):
        file.write_bytes(data)
        with pytest.raises(ValueError, match=r"images\.bin is not a whole list of COLMAP's images"):
            run(tmp_path / "root", tmp_path / "out", "colmap")


def test_cameras_of_another_size_than_their_image(tmp_path: Path, capsys) -> None:
    """Reduced images (images_2 beside a model of the whole ones) are used, with the camera reduced; others are not."""
    write_colmap(tmp_path / "root/a", 3)
    for index in range(3):
        path = tmp_path / f"root/a/images/{index}.png"
        image = Image.open(path)
        size = (40, 30) if index < 2 else (40, 40)
        image.resize(size, Image.Resampling.BOX if index < 2 else Image.Resampling.BICUBIC).save(path)
    folder = run(tmp_path / "root", tmp_path / "out", "colmap") / "a"
    scene = load_scene(folder)
    np.testing.assert_allclose(scene.intrinsics[0], [[44, 0, 21.2], [0, 46, 13.8], [0, 0, 1]])
    assert (
        "2.png: the image of 40 x 40 pixels is not the one of its camera, which has 80 x 60" in capsys.readouterr().out
    )


@pytest.mark.parametrize("value", [None, True, "1", float("nan"), float("inf"), 10**400])
def test_what_is_no_finite_number_is_refused_by_name(value: object) -> None:
    with pytest.raises(ValueError, match="fl_x must be a finite number, got "):
        finite_number({"fl_x": value}, "fl_x")
    assert finite_number({}, "cx", 2) == 2.0
