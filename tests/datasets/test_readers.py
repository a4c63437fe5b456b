"""Every official layout is read from a small data set in exactly that layout, and compared with the world behind it."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from datasets import official_layouts as layouts
from datasets.plane_world import camera_path, color_error, plane_error

from subspace3d.commands import convert
from subspace3d.commands.convert import ConvertConfig
from subspace3d.datasets.readers.mesh_files import read_obj, read_ply
from subspace3d.formats.scene import SceneFile, load_scene

# half a step of the depth image, and how far a point moves off the plane with it: |NORMAL . ray| / |NORMAL| <= 1.3
MILLIMETRE = 0.5e-3 * 1.3


def settings(kind: str, root: Path, out: Path, **others) -> ConvertConfig:
    return ConvertConfig(out=out, from_=kind, root=root, **others)  # type: ignore[arg-type]


def assert_on_plane(folder: Path, depth_error: float, levels: float = 1.0) -> None:
    """Points lie on the plane up to ``depth_error`` and have its colour up to ``levels`` of 255."""
    scene = load_scene(folder)
    for image, depth, intrinsic, extrinsic in zip(scene.images, scene.depths, scene.intrinsics, scene.extrinsics):
        assert (depth > 0).mean() > 0.5
        assert plane_error(depth, intrinsic, extrinsic) <= depth_error
        assert color_error(image, depth, intrinsic, extrinsic) <= levels


@pytest.fixture
def clearpose(tmp_path: Path) -> Path:
    root = tmp_path / "clearpose"
    layouts.write_clearpose_scene(root / "set1/scene1", [0, 50, 100, 200])
    layouts.write_clearpose_scene(root / "set1/scene5", [100, 200])
    layouts.write_clearpose_scene(root / "set8/scene1", list(range(100, 1400, 100)))
    return root


def test_clearpose_is_read_with_the_papers_splits(clearpose: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    folders = convert.run(settings("clearpose", clearpose, out))
    assert folders == [out / "clearpose_test", out / "clearpose_train"]
    scenes = sorted(str(path.parent.relative_to(out)) for path in out.rglob("scene.json"))
    assert scenes == ["clearpose_test/set1_scene5", "clearpose_test/set8_scene1", "clearpose_train/set1_scene1"]
    # a millimetre of depth moves a point sideways by at most half its size; 120 levels x 3.6 per metre x 1 mm < 1 level
    for name in scenes:
        assert_on_plane(out / name, MILLIMETRE, levels=2)
    file = SceneFile(out / "clearpose_train/set1_scene1")
    assert len(file) == 3 and file.unit == "m" and file.depth_scale == 1e-3
    assert file.provenance["source"]["frames"] == ["000000", "000100", "000200"]
    # 12 of the 13 frames to test on: int(i / 11 * 12)
    tested = SceneFile(out / "clearpose_test/set8_scene1").provenance["source"]["frames"]
    assert tested == [f"{100 + 100 * i:06d}" for i in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12)]
    # of the training split the farthest 2 % do not count, but for those as far as the nearest of them
    assert 0.98 <= (file.valid_depth(0) > 0).mean() < 0.985
    assert (SceneFile(out / scenes[0]).valid_depth(0) > 0).all()
    # images are the originals, byte for byte
    original = (clearpose / "set1/scene1/000100-color.png").read_bytes()
    assert (out / "clearpose_train/set1_scene1/images/0001.png").read_bytes() == original
    assert "3 of 3 scenes" in capsys.readouterr().out


def test_what_is_broken_is_left_out_and_named_and_a_second_run_goes_on(clearpose: Path, tmp_path: Path, capsys) -> None:
    out, scene = tmp_path / "out", clearpose / "set1/scene1"
    image = scene / "000100-color.png"
    whole = image.read_bytes()
    image.write_bytes(whole[:200])
    (scene / "000200-depth_true.png").unlink()
    metadata = clearpose / "set8/scene1/metadata.mat"
    good = metadata.read_bytes()
    metadata.write_bytes(good[: len(good) // 2])
    (clearpose / "set2/scene1").mkdir(parents=True)
    convert.run(settings("clearpose", clearpose, out))
    skipped = json.loads((out / "skipped-clearpose.json").read_text())
    assert "no metadata.mat" in skipped["root"][0]
    assert "000100" in skipped["set1_scene1"][0] and "not a whole image" in skipped["set1_scene1"][0]
    assert skipped["set1_scene1"][1] == "frame 000200: no 000200-depth_true.png"
    assert skipped["set8_scene1"][0].startswith("left out:") and "metadata.mat" in skipped["set8_scene1"][0]
    assert "skipped set8_scene1: left out" in capsys.readouterr().out
    assert len(SceneFile(out / "clearpose_train/set1_scene1")) == 1
    standing = (out / "clearpose_test/set1_scene5/scene.json").stat().st_mtime_ns
    metadata.write_bytes(good)
    left = out / "clearpose_test/.set8_scene1.s3d-abcdefgh.tmp/images"  # as a process that was killed leaves it
    left.mkdir(parents=True)
    convert.run(settings("clearpose", clearpose, out, only=("set8_scene1",)))
    assert not left.parent.exists()
    assert (out / "clearpose_test/set8_scene1/scene.json").is_file()
    assert (out / "clearpose_test/set1_scene5/scene.json").stat().st_mtime_ns == standing
    again = json.loads((out / "skipped-clearpose.json").read_text())
    assert again["set1_scene1"] == skipped["set1_scene1"] and "set8_scene1" not in again
    with pytest.raises(ValueError, match="frame_step 0 there, 50 now"):
        convert.run(settings("clearpose", clearpose, out, frame_step=50))


def test_reduced_images_keep_the_geometry(clearpose: Path, tmp_path: Path) -> None:
    convert.run(settings("clearpose", clearpose, tmp_path / "out", max_side=24, only=("set1_scene5",)))
    (folder,) = [path.parent for path in (tmp_path / "out").rglob("scene.json")]
    scene = load_scene(folder)
    assert scene.images.shape == (2, 18, 24, 3)
    # a depth from half a (coarse) pixel away: its slope over that pixel is at most 2 m x |ray change| / cos
    error = max(plane_error(*view) for view in zip(scene.depths, scene.intrinsics, scene.extrinsics))
    assert error < 2.5 * (1 / (1.1 * 24)) * 0.5


@pytest.mark.parametrize("inverse", [False, True])
def test_soap_bundle(tmp_path: Path, inverse: bool) -> None:
    members, intrinsic, rotations = layouts.soap_bundle(views=4)
    members["motion"]["quaternion"][1::2] *= -1  # the same rotations
    if inverse:  # the other reading of the quaternions
        members["motion"]["quaternion"] = members["motion"]["quaternion"] * [-1, -1, -1, 1]
    (tmp_path / "root/face").mkdir(parents=True)
    np.savez(tmp_path / "root/face/frame_bundle.npz", **members)
    convert.run(settings("soap", tmp_path / "root", tmp_path / "out", allow_pickle=True))
    scene = load_scene(tmp_path / "out/soap/face")
    assert not scene.translation_known and scene.has_depth and scene.images.shape == (4, 64, 48, 3)
    np.testing.assert_allclose(scene.intrinsics, np.repeat(intrinsic[None], 4, 0), atol=1e-12)
    # rotations up to the choice of the world
    for index in range(4):
        found = scene.extrinsics[index, :, :3] @ scene.extrinsics[0, :, :3].T
        np.testing.assert_allclose(found, rotations[index] @ rotations[0].T, atol=1e-9)
    turned = [np.c_[rotation, np.zeros(3)] for rotation in rotations]
    # depth from a quarter of the pixels (2 pixels of 60 away, 2.5 m), as a half (2^-11 relative) of its inverse
    error = max(plane_error(*view) for view in zip(scene.depths, scene.intrinsics, turned))
    assert error < 2.5 * (2 / 60 * 0.25 + 2**-11)


def test_soap_bundle_without_depth_or_motion(tmp_path: Path) -> None:
    members, _, _ = layouts.soap_bundle(views=2)
    members["num_depth_frames"] = 0
    (tmp_path / "root").mkdir()
    np.savez(tmp_path / "root/frame_bundle.npz", **members)
    convert.run(settings("soap", tmp_path / "root", tmp_path / "out", allow_pickle=True))
    assert not load_scene(tmp_path / "out/soap/root").has_depth
    for spoiled, message in (
        ({"motion": None}, "motion must be a record"),
        ({"rgb_1": {**members["rgb_1"], "timestamp": None}}, "a value of an unexpected type"),
        ({"num_rgb_frames": "many"}, "num_rgb_frames must be a number of frames"),
    ):
        np.savez(tmp_path / "root/frame_bundle.npz", **{**members, **spoiled})
        with pytest.raises(ValueError, match=message):
            convert.run(settings("soap", tmp_path / "root", tmp_path / "other", allow_pickle=True))
    assert not list((tmp_path / "other").rglob("scene.json"))


def test_hndr_bundle(tmp_path: Path) -> None:
    (tmp_path / "root/toy").mkdir(parents=True)
    np.savez(tmp_path / "root/toy/frame_bundle.npz", **layouts.hndr_bundle(views=3))
    convert.run(settings("hndr", tmp_path / "root", tmp_path / "out", allow_pickle=True))
    scene = load_scene(tmp_path / "out/hndr/toy")
    assert scene.images.shape == (3, 48, 36, 3) and scene.translation_known
    # low confidence stood in the first column of the landscape image, which is the first row of the portrait
    assert (scene.depths[:, :4] == 0).all() and (scene.depths[:, 4:] > 0).all()
    for image, depth, intrinsic, extrinsic in zip(scene.images, scene.depths, scene.intrinsics, scene.extrinsics):
        # depth pixels are four image pixels wide: up to 2 pixels of 52 away on a slope of at most 0.5 per unit of ray
        assert plane_error(depth, intrinsic, extrinsic) < 2.5 * 2 / 52 * 0.5
        centre = np.zeros_like(depth)
        centre[6::4, 2::4] = depth[6::4, 2::4]
        # half an image pixel from the depth pixel's centre: colours change by at most 120 x 3.9 per metre
        assert color_error(image, centre, intrinsic, extrinsic) < 120 * 3.9 * 2.5 * 0.71 / 52


def test_bundles_are_not_unpickled_unless_allowed_and_never_run_code(tmp_path: Path) -> None:
    members, _, _ = layouts.soap_bundle(views=2)
    (tmp_path / "root").mkdir()
    np.savez(tmp_path / "root/frame_bundle.npz", **members)
    with pytest.raises(ValueError, match="--allow-pickle"):
        convert.run(settings("soap", tmp_path / "root", tmp_path / "out"))
    marker = tmp_path / "ran"

    class Attack:
        def __reduce__(self):
            return Path.touch, (marker,)

    assert pickle.loads(pickle.dumps(Attack())) is None and marker.exists()  # it would run
    marker.unlink()
    members["rgb_1"] = {**members["rgb_1"], "extra": Attack()}
    np.savez(tmp_path / "root/frame_bundle.npz", **members)
    with pytest.raises(ValueError, match="only arrays and plain values"):
        convert.run(settings("soap", tmp_path / "root", tmp_path / "other", allow_pickle=True))
    assert not marker.exists() and not list((tmp_path / "other").rglob("scene.json"))


def test_rgbd_folder_with_matrices(tmp_path: Path) -> None:
    intrinsic = layouts.write_rgbd_folder(tmp_path / "root/kitchen", views=4)
    convert.run(settings("rgbd", tmp_path / "root", tmp_path / "out"))
    assert_on_plane(tmp_path / "out/rgbd/kitchen", MILLIMETRE, levels=2)
    scene = load_scene(tmp_path / "out/rgbd/kitchen")
    np.testing.assert_allclose(scene.intrinsics[0], intrinsic, atol=1e-9)
    np.testing.assert_allclose(scene.extrinsics, camera_path(4), atol=1e-8)


def test_rgbd_folder_with_tum_lists(tmp_path: Path) -> None:
    layouts.write_tum_folder(tmp_path / "root", views=4)
    late = (tmp_path / "root/groundtruth.txt").read_text().replace("100.107", "100.187")
    (tmp_path / "root/groundtruth.txt").write_text(late)
    convert.run(settings("rgbd", tmp_path / "root", tmp_path / "out", name="tum"))
    assert_on_plane(tmp_path / "out/tum/root", MILLIMETRE / 5, levels=2)
    assert len(SceneFile(tmp_path / "out/tum/root")) == 3
    skipped = json.loads((tmp_path / "out/skipped-tum.json").read_text())
    assert skipped == {"root": ["003.png: no pose within 0.02 s"]}


def test_rgbd_folder_without_depth(tmp_path: Path) -> None:
    layouts.write_rgbd_folder(tmp_path / "root/a", views=2, depth=False)
    convert.run(settings("rgbd", tmp_path / "root", tmp_path / "out"))
    scene = load_scene(tmp_path / "out/rgbd/a")
    assert not scene.has_depth and not scene.depths.any()


def _edit(name: str, text: str):
    return lambda root: (root / name).write_text(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "intrinsics.txt").unlink(), "root: left out, it has rgb but no intrinsics.txt"),
        (lambda root: (root / "poses.txt").unlink(), "groundtruth.txt .TUM. or a poses.txt"),
        (lambda root: (root / "rgb").rename(root / "photos"), "folder of images called rgb or images or color"),
        (_edit("intrinsics.txt", "1 2 3"), "fx fy cx cy or a matrix 3x3 or 4x4, got 3"),
        (_edit("intrinsics.txt", "a b c d"), "must hold numbers"),
        (_edit("poses.txt", "1 0 0 0 0 1 0 0 0 0 1 0\n"), "got 1 poses and 2 images"),
        (_edit("poses.txt", "1 0 0 0 0\n"), r"got \[5\]"),
        (_edit("poses.txt", "2 0 0 0 0 2 0 0 0 0 2 0\n" * 2), "must be a rotation"),
    ],
)
def test_a_folder_in_another_layout_is_told_what_is_missing(tmp_path: Path, change, message: str) -> None:
    layouts.write_rgbd_folder(tmp_path / "root", views=2)
    change(tmp_path / "root")
    with pytest.raises(ValueError, match=message):
        convert.run(settings("rgbd", tmp_path / "root", tmp_path / "out"))


@pytest.mark.parametrize("kind", ["thuman", "2k2k", "clearpose", "soap", "hndr", "rgbd"])
def test_an_empty_root_is_told_the_layout(tmp_path: Path, kind: str) -> None:
    (tmp_path / "root").mkdir()
    with pytest.raises(ValueError, match="root must hold"):
        convert.run(settings(kind, tmp_path / "root", tmp_path / "out"))
    with pytest.raises(FileNotFoundError, match="no such folder"):
        convert.run(settings(kind, tmp_path / "absent", tmp_path / "out"))


def ellipsoid_depth(intrinsic: np.ndarray, extrinsic: np.ndarray, size: int) -> np.ndarray:
    """z-depth of the scans' ellipsoid, y up turned to z up, centred on the origin; 0 where it is missed."""
    axes = layouts.AXES[[0, 2, 1]]
    x, y = np.meshgrid(np.arange(size) + 0.5, np.arange(size) + 0.5)
    rays = np.stack([x, y, np.ones_like(x)], -1) @ np.linalg.inv(intrinsic).T @ extrinsic[:, :3] / axes
    centre = -extrinsic[:, :3].T @ extrinsic[:, 3] / axes
    a, b, c = (rays**2).sum(-1), rays @ centre, centre @ centre - 1
    root = b * b - a * c
    return np.where(root > 0, (-b - np.sqrt(np.maximum(root, 0))) / a, 0)


SCANS = {
    "thuman": (lambda root: layouts.write_thuman_scan(root / "model/0003"), "thuman_train/0003", 1.1),
    "2k2k": (lambda root: layouts.write_2k2k_scan(root / "test/07184"), "2k2k_test/07184", 1.5),
}


@pytest.mark.parametrize("kind", SCANS)
def test_scans_are_rendered_by_the_protocol(tmp_path: Path, kind: str) -> None:
    write, name, distance = SCANS[kind]
    write(tmp_path / "root")
    size = 48
    convert.run(
        settings(kind, tmp_path / "root", tmp_path / "out", scan_views=4, resolution=size, spp=4, variant="scalar")
    )
    scene = load_scene(tmp_path / "out" / name)
    assert scene.images.shape == (4, size, size, 3)
    # lens 35 on a sensor of 32
    np.testing.assert_allclose(scene.intrinsics[0], [[size * 35 / 32, 0, 24], [0, size * 35 / 32, 24], [0, 0, 1]])
    centres = -np.einsum("sji,sj->si", scene.extrinsics[:, :, :3], scene.extrinsics[:, :, 3])
    quarters = distance * np.array([[1, 0, 0], [0, 1, 0], [-1, 0, 0], [0, -1, 0]])
    np.testing.assert_allclose(centres, quarters, atol=1e-12)
    for image, depth, extrinsic in zip(scene.images, scene.depths, scene.extrinsics):
        expected = ellipsoid_depth(scene.intrinsics[0], extrinsic, size)
        both = (expected > 0) & (depth > 0)
        assert ((expected > 0) != (depth > 0)).mean() < 0.02  # the polygon's outline lies inside the ellipsoid's
        # a chord of 1/24 of half a turn sinks by 1 - cos(pi / 48) of a half axis, more where seen at a slant
        assert np.median(np.abs(depth - expected)[both]) < 0.45 * (1 - np.cos(np.pi / 48)) + 1e-4
        assert (image[depth == 0].mean(axis=0) > 240).all()  # white around, edges mixed
        upper, lower = image[14:20, 20:28].reshape(-1, 3).mean(axis=0), image[28:34, 20:28].reshape(-1, 3).mean(axis=0)
        assert upper[0] > 2 * upper[1] and lower[1] > 2 * lower[0]  # red above, green below


def test_a_scan_in_another_unit_is_left_out_with_advice(tmp_path: Path) -> None:
    layouts.write_2k2k_scan(tmp_path / "root/00003")
    others = {"scan_views": 1, "resolution": 8, "spp": 1, "variant": "scalar"}
    with pytest.raises(ValueError, match=r"try --scan-scale 1\.37"):
        convert.run(settings("2k2k", tmp_path / "root", tmp_path / "out", scan_scale=0.01, **others))


def test_ply_forms_agree(tmp_path: Path) -> None:
    layouts.write_2k2k_scan(tmp_path / "a", binary=True)
    layouts.write_2k2k_scan(tmp_path / "b", binary=False)
    first, second = read_ply(tmp_path / "a/a.ply"), read_ply(tmp_path / "b/b.ply")
    assert np.array_equal(first.faces, second.faces) and np.array_equal(first.colors, second.colors)
    np.testing.assert_allclose(first.vertices, second.vertices, atol=1e-7)
    data = (tmp_path / "a/a.ply").read_bytes()
    (tmp_path / "a/a.ply").write_bytes(data[:-100])
    with pytest.raises(ValueError, match="not a whole PLY"):
        read_ply(tmp_path / "a/a.ply")


def test_obj_forms(tmp_path: Path) -> None:
    """Quads, counting from the end, vertex colours; normals of a cube's corners point along its diagonals."""
    corners = [(x, y, z) for x in (0, 1) for y in (0, 1) for z in (0, 1)]
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    lines = [f"v {x} {y} {z} {255 * x} 0 128" for x, y, z in corners]
    lines += ["f " + " ".join(f"{index - 8}//1" for index in quad) for quad in quads]
    path = tmp_path / "cube.obj"
    path.write_text("\n".join(lines))
    mesh = read_obj(path)
    assert mesh.faces.shape == (12, 3) and mesh.uv is None and mesh.colors is not None
    np.testing.assert_allclose(mesh.colors[:, 0], [c[0] for c in corners])
    outward = np.array(corners) - 0.5
    assert (np.sum(mesh.normals * outward, axis=1) > 0.7).all()
    path.write_text("\n".join([*lines, "f 1 2 99"]))
    with pytest.raises(ValueError, match="8 vertices"):
        read_obj(path)
    path.write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
    with pytest.raises(ValueError, match="neither"):
        read_obj(path)
    path.write_text("v 0 0 0 1 1 1\nv 1 0 0 1 1 1\nf 1 2 3\n")
    with pytest.raises(ValueError, match="2 vertices"):
        read_obj(path)


def test_images_that_are_links_out_of_root_are_left_out(tmp_path: Path, capsys) -> None:
    layouts.write_rgbd_folder(tmp_path / "root/a", views=4)
    (tmp_path / "root/shared").mkdir()
    moved = {"000": tmp_path / "outside.png", "001": tmp_path / "root/shared/001.png"}
    for stem, target in moved.items():
        image = tmp_path / f"root/a/rgb/{stem}.png"
        image.rename(target)
        image.symlink_to(target)
    image = tmp_path / "root/a/rgb/002.png"
    image.unlink()
    image.symlink_to(image.name)
    convert.run(settings("rgbd", tmp_path / "root", tmp_path / "out"))
    out = capsys.readouterr().out
    assert "000.png is a link out of" in out and "002.png" in out
    (scene,) = (tmp_path / "out").rglob("scene.json")
    assert len(SceneFile(scene)) == 2


def test_a_list_that_names_a_loop_of_links_is_refused(tmp_path: Path, capsys) -> None:
    layouts.write_tum_folder(tmp_path / "root/a", 2)
    (tmp_path / "root/a/loop").symlink_to("loop")
    (tmp_path / "root/a/rgb.txt").write_text("100.0 loop/a.png\n")
    with pytest.raises((SystemExit, ValueError)):
        convert.run(settings("rgbd", tmp_path / "root", tmp_path / "out"))
    assert "rgb.txt must name files inside its folder, got 'loop/a.png'" in capsys.readouterr().out
