"""COLMAP and nerfstudio captures and folders of images against the world behind them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pycolmap
import pytest
from datasets import own_captures as captures
from datasets.plane_world import color_error, plane_error
from PIL import Image

from subspace3d.commands import convert
from subspace3d.commands.convert import ConvertConfig
from subspace3d.datasets.readers import colmap_model
from subspace3d.formats.scene import SceneFile, load_images, load_scene

# half a millimetre of depth, and how far a point moves off the plane with it, see test_readers
MILLIMETRE = 0.5e-3 * 1.3
# a plane's depth from the middle of the pixel in which a direction lies: half a pixel's diagonal away, where depth
# changes by at most 0.5 per unit of ray and 2.5 units deep
RESAMPLED = 2.5 * 0.5 * 0.71 / 88 + MILLIMETRE


def run(kind: str, root: Path, out: Path, **others) -> list[Path]:
    return convert.run(ConvertConfig(out=out, from_=kind, root=root, **others))  # type: ignore[arg-type]


def relative(poses: np.ndarray) -> np.ndarray:
    """From the first camera, [S, 3, 4]."""
    whole = np.array([np.vstack([pose, [0, 0, 0, 1]]) for pose in poses])
    return (whole @ np.linalg.inv(whole[0]))[:, :3]


def assert_on_plane(folder: Path, depth_error: float, levels: float) -> None:
    scene = load_scene(folder)
    for view in zip(scene.images, scene.depths, scene.intrinsics, scene.extrinsics):
        image, depth, intrinsic, extrinsic = view
        assert (depth > 0).all()
        assert plane_error(depth, intrinsic, extrinsic) <= depth_error
        assert color_error(image, depth, intrinsic, extrinsic) <= levels


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("at", ["sparse/0", "sparse", ".", "colmap"])
def test_colmap_is_read_from_wherever_the_model_lies(tmp_path: Path, binary: bool, at: str, capsys) -> None:
    # as text, names are counted: 2 stands before 10
    poses = captures.write_colmap(tmp_path / "root/desk", 12, binary=binary, depth=".png", at=at)
    run("colmap", tmp_path / "root", tmp_path / "out")
    folder = tmp_path / "out/colmap/desk"
    assert_on_plane(folder, MILLIMETRE, levels=2)
    scene = load_scene(folder)
    np.testing.assert_allclose(scene.extrinsics, poses, atol=1e-9)
    np.testing.assert_allclose(scene.intrinsics[0], [[88, 0, 42.4], [0, 92, 27.6], [0, 0, 1]])
    file = SceneFile(folder)
    assert file.provenance["source"]["images"] == [f"{index}.png" for index in range(12)]
    original = (tmp_path / "root/desk/images/10.png").read_bytes()
    assert (folder / "images/0010.png").read_bytes() == original
    out = capsys.readouterr().out
    assert "12 images found, 12 used; 12 depths found, 12 used; 12 cameras found, 12 used\n" in out


@pytest.mark.parametrize("model", ["SIMPLE_RADIAL", "OPENCV", "OPENCV_FISHEYE"])
def test_distorted_cameras_become_pinhole_cameras(tmp_path: Path, model: str) -> None:
    captures.write_colmap(tmp_path / "root/a", 3, model=model, depth=".tiff")
    run("colmap", tmp_path / "root", tmp_path / "out")
    # bilinear between pixels: an eighth of the colours' second derivative, 120 x 3.6^2 per metre^2 x (2.5 / 88)^2, and
    # the shift of the depth's pixel, 120 x 3.6 per metre x 2.5 x 0.71 / 88
    levels = 1 + 120 * 3.6**2 * (2.5 / 88) ** 2 / 8 * 2 + 120 * 3.6 * 2.5 * 0.71 / 88 / 5
    assert_on_plane(tmp_path / "out/colmap/a", RESAMPLED, levels)
    # what the lens bent is seen: undistorted as if it had not been, points would lie elsewhere
    intrinsic = SceneFile(tmp_path / "out/colmap/a").camera(0)[0]
    assert intrinsic[0, 1] == 0 and 0.7 < intrinsic[0, 0] / 88 < 1.4


def test_every_model_of_colmap_is_known_by_its_number() -> None:
    for number, (name, count) in colmap_model.MODELS.items():
        assert int(getattr(pycolmap.CameraModelId, name)) == number
        assert len(pycolmap.Camera.create_from_model_name(1, name, 50.0, 80, 60).params) == count


@pytest.mark.parametrize("suffix", [".PNG", ".tif", ".npy", ".npz", "dense"])
def test_depth_of_every_kind_is_read(tmp_path: Path, suffix: str) -> None:
    captures.write_colmap(tmp_path / "root/a", 3, depth=suffix)
    run("colmap", tmp_path / "root", tmp_path / "out")
    assert_on_plane(tmp_path / "out/colmap/a", MILLIMETRE, levels=2)


def test_a_capture_without_depth_says_what_it_serves(tmp_path: Path, capsys) -> None:
    captures.write_colmap(tmp_path / "root/a", 3)
    run("colmap", tmp_path / "root", tmp_path / "out")
    assert not SceneFile(tmp_path / "out/colmap/a").has_depth
    assert "no depth: cameras can be trained and evaluated, depth and points cannot" in capsys.readouterr().out


def test_rigs_and_cameras_of_several_sizes(tmp_path: Path, capsys) -> None:
    """Two cameras mounted together, in folders of their own, one of which has smaller images of another aspect."""
    rec = pycolmap.Reconstruction()
    left, right = captures.camera_of("PINHOLE", 1), captures.camera_of("PINHOLE", 2, (40, 60))
    rig = pycolmap.Rig(rig_id=1)
    rig.add_ref_sensor(left.sensor_id)
    mount = pycolmap.Rigid3d(pycolmap.Rotation3d(), np.array([-0.1, 0, 0]))
    rig.add_sensor(right.sensor_id, mount)
    for camera in (left, right):
        rec.add_camera(camera)
    rec.add_rig(rig)
    poses = captures.camera_path(3)
    for index, pose in enumerate(poses):
        frame = pycolmap.Frame(
            frame_id=index + 1, rig_id=1, rig_from_world=pycolmap.Rigid3d(pycolmap.Rotation3d(pose[:, :3]), pose[:, 3])
        )
        images = [
            pycolmap.Image(name=f"{side}/{index}.png", camera_id=number, image_id=10 * number + index)
            for number, side in ((1, "left"), (2, "right"))
        ]
        for image in images:
            image.frame_id = frame.frame_id
            frame.add_data_id(image.data_id)
        rec.add_frame(frame)
        for image, camera, size in zip(images, (left, right), (captures.SIZE, (40, 60))):
            rec.add_image(image)
            seen = pose if camera is left else np.c_[pose[:, :3], pose[:, 3] + [-0.1, 0, 0]]
            picture, depth = captures.seen_by(camera, seen, size)
            captures.save_image(tmp_path / "root/rig/images" / image.name, picture)
            captures.write_depth(tmp_path / "root/rig", image.name, ".npy", depth)
        rec.register_frame(frame.frame_id)
    (tmp_path / "root/rig/sparse/0").mkdir(parents=True)
    rec.write_binary(str(tmp_path / "root/rig/sparse/0"))
    run("colmap", tmp_path / "root", tmp_path / "out")
    scene = load_scene(tmp_path / "out/colmap/rig")
    assert scene.images.shape == (6, 60, 80, 3)
    np.testing.assert_allclose(scene.extrinsics[3:, :, 3], np.array(poses)[:, :, 3] + [-0.1, 0, 0], atol=1e-9)
    # enlarged by 1.5: a depth pixel is 1.5 wide
    assert_on_plane(tmp_path / "out/colmap/rig", 2 * RESAMPLED, levels=10)
    assert "3 x used, cut from N x N to the scene's N x N" in capsys.readouterr().out


@pytest.mark.parametrize("per_frame", [False, True])
def test_nerfstudio_is_read(tmp_path: Path, per_frame: bool) -> None:
    poses = captures.write_nerfstudio(tmp_path / "root/desk", 12, per_frame=per_frame)
    run("nerfstudio", tmp_path / "root", tmp_path / "out")
    assert_on_plane(tmp_path / "out/nerfstudio/desk", MILLIMETRE, levels=2)
    scene = load_scene(tmp_path / "out/nerfstudio/desk")
    np.testing.assert_allclose(scene.extrinsics, poses, atol=1e-9)


@pytest.mark.parametrize(("inside", "scale"), [(False, 1.0), (True, 0.25)])
def test_renderings_of_the_authors_scripts_are_read(tmp_path: Path, inside: bool, scale: float, capsys) -> None:
    poses = captures.write_renderings(tmp_path / "root/0001/project", inside=inside, scale=scale)
    (tmp_path / "root/0002/renderings").mkdir(parents=True)
    run("renderings", tmp_path / "root", tmp_path / "out")
    scene = load_scene(tmp_path / "out/renderings/0001_project")
    np.testing.assert_allclose(scene.extrinsics, poses, atol=1e-9)
    assert (scene.depths[0, :5, :5] == 0).all() and (scene.depths[1:] > 0).all()
    for view in zip(scene.images, scene.depths, scene.intrinsics, scene.extrinsics):
        image, depth, intrinsic, extrinsic = view
        assert plane_error(depth, intrinsic, extrinsic) <= 1e-5 and color_error(image, depth, intrinsic, extrinsic) <= 2
    out = capsys.readouterr().out
    assert "0002/renderings: left out, there is no opencv_cameras.json" in out


def test_a_rendering_that_is_not_understood_costs_its_frame(tmp_path: Path, capsys) -> None:
    captures.write_renderings(tmp_path / "root/a", views=4)
    path = tmp_path / "root/a/opencv_cameras.json"
    record = json.loads(path.read_text())
    record["frames"][0]["w2c"] = [*[[0.0] * 4] * 3, [0.0, 0.0, 0.0, 1.0]]
    record["frames"][1]["fx"] = 0
    path.write_text(json.dumps(record))
    (tmp_path / "root/a/renderings/00000002_depth.exr").unlink()
    run("renderings", tmp_path / "root", tmp_path / "out")
    out = capsys.readouterr().out
    assert "frames[0]: 00000000_rgba.png: w2c must have a rotation" in out and "fx and fy must be positive" in out
    assert "4 images found, 2 used, 2 left out; 3 depths found, 1 used, 2 left out; 4 cameras found, 2 used" in out
    assert SceneFile(tmp_path / "out/renderings/a").has_cameras
    (tmp_path / "root/a/opencv_cameras.json").unlink()
    with pytest.raises(ValueError, match=r"root must hold renderings/ and opencv_cameras\.json"):
        run("renderings", tmp_path / "root", tmp_path / "other")


@pytest.mark.parametrize("model", ["OPENCV", "OPENCV_FISHEYE"])
def test_nerfstudios_distortion_is_colmaps(tmp_path: Path, model: str) -> None:
    captures.write_nerfstudio(tmp_path / "root/a", 2, model=model)
    captures.write_colmap(tmp_path / "root/b", 2, model=model, depth=".png")
    run("nerfstudio", tmp_path / "root/a", tmp_path / "out")
    run("colmap", tmp_path / "root/b", tmp_path / "out")
    ours, theirs = load_scene(tmp_path / "out/nerfstudio/a"), load_scene(tmp_path / "out/colmap/b")
    np.testing.assert_allclose(ours.intrinsics, theirs.intrinsics, atol=1e-9)
    assert np.array_equal(ours.images, theirs.images) and np.array_equal(ours.depths, theirs.depths)


def test_a_folder_of_images_is_a_scene_without_cameras(tmp_path: Path, capsys) -> None:
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (3, 20, 30, 3), dtype=np.uint8)
    for index, picture in enumerate(pictures):
        captures.save_image(tmp_path / f"root/my trip/{9 + index}.png", picture)
    (tmp_path / "root/my trip/12.heic").write_bytes(b"x")
    run("images", tmp_path / "root", tmp_path / "out")
    folder = tmp_path / "out/images/my trip"
    assert np.array_equal(load_images(folder), pictures)
    file = SceneFile(folder)
    assert not file.has_cameras and not file.has_depth
    out = capsys.readouterr().out
    assert "4 images found, 3 used, 1 left out; 0 depths found, 0 used; 0 cameras found, 0 used\n" in out
    assert "left out: 1 x images of the kind .heic are not read" in out
    assert "no cameras: the images serve tuning that needs none" in out


def test_far_coordinates_lose_nothing(tmp_path: Path) -> None:
    """Coordinates of a map, 5.4e6 m from the origin, up to 1e-9 of them (float64), and what is used as float32."""
    import torch

    from subspace3d.datasets.multiview import MultiViewDataset

    origin = np.array([5e5, 5.4e6, 120.0])
    poses = captures.write_colmap(tmp_path / "root/a", 4, offset=origin)
    run("colmap", tmp_path / "root", tmp_path / "out")
    scene = load_scene(tmp_path / "out/colmap/a")
    np.testing.assert_allclose(relative(scene.extrinsics), relative(np.array(poses)), atol=1e-8)
    record = json.loads((tmp_path / "out/colmap/a/scene.json").read_text())
    first = -poses[0][:, :3].T @ poses[0][:, 3]
    np.testing.assert_allclose(record["provenance"]["origin"], origin + first, rtol=1e-12)
    # and a scene that was written with such coordinates by somebody else
    far = tmp_path / "far"
    (tmp_path / "out/colmap/a").rename(far)
    for frame, pose in zip(record["frames"], poses):
        frame["extrinsics_w2c"] = np.c_[pose[:, :3], pose[:, 3] - pose[:, :3] @ origin].tolist()
    (far / "scene.json").write_text(json.dumps(record))
    batch = MultiViewDataset(far, 28).batch(0, 0, (4, 4), 4)
    got = batch["extrinsics"][0].double().numpy()
    assert batch["extrinsics"].dtype == torch.float32
    dataset = MultiViewDataset(far, 28)
    from subspace3d.datasets.multiview import draw_frames

    request = dataset.plan(0, 0, (4, 4), 4)[0]
    chosen = draw_frames(4, 4, 0.0, torch.Generator().manual_seed(request.seed))
    np.testing.assert_allclose(relative(got), relative(np.array(poses)[chosen]), atol=1e-6)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_without_cameras_are_turned_as_they_are_shown(tmp_path: Path, orientation: int) -> None:
    from PIL import ImageOps

    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 256, (10, 16, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "root").mkdir()
    image.save(tmp_path / "root/a.png", exif=exif)
    run("images", tmp_path / "root", tmp_path / "out")
    shown = ImageOps.exif_transpose(Image.open(tmp_path / "root/a.png"))
    assert np.array_equal(load_images(tmp_path / "out/images/root")[0], np.array(shown))


def test_depth_in_another_scale_than_colmaps_is_asked_for_with_the_factor(tmp_path: Path) -> None:
    captures.write_colmap(tmp_path / "root/a", 5, depth="dense")
    captures.save_image(tmp_path / "root/a/images/a stray one.png", np.zeros((60, 80, 3), np.uint8))
    for path in (tmp_path / "root/a/stereo/depth_maps").iterdir():
        values = np.frombuffer(path.read_bytes().removeprefix(b"80&60&1&"), "<f4")
        path.write_bytes(b"80&60&1&" + (values / 2.5).tobytes())
    # the first reason is what cost the scene, not what cost a frame of it before
    with pytest.raises(ValueError, match="first: depth is in another unit than the cameras") as error:
        run("colmap", tmp_path / "root", tmp_path / "out")
    told = float(str(error.value).split("give --depth-scale ")[1].split()[0])
    assert told == pytest.approx(2.5, rel=0.005)
    assert not (tmp_path / "out/colmap").exists()
    # what is asked for can be said: settings that made nothing are no settings of scenes
    run("colmap", tmp_path / "root", tmp_path / "out", depth_scale=2.5)
    assert_on_plane(tmp_path / "out/colmap/a", MILLIMETRE, levels=2)
    with pytest.raises(ValueError, match=r"depth_scale 2\.5 there, 2\.0 now"):
        run("colmap", tmp_path / "root", tmp_path / "out", depth_scale=2.0)
