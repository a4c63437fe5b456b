"""Scene folders: round trip, resizing, and what bad input gets."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from subspace3d.formats.scene import (
    DEPTH_SCALE,
    Frame,
    SceneFile,
    find_scenes,
    load_images,
    load_scene,
    write_frames,
    write_scene,
)


def make_scene(folder: Path, rng: np.random.Generator, height: int = 6, width: int = 6, masks=None) -> dict:
    arrays = {
        "images": rng.integers(0, 256, (2, height, width, 3), dtype=np.uint8),
        "depths": rng.uniform(1, 5, (2, height, width)).astype(np.float32),
        "intrinsics": np.stack([np.array([[7.0, 0, width / 2], [0, 8.0, height / 2], [0, 0, 1]])] * 2),
        "extrinsics": np.stack([np.eye(3, 4), np.array([[0.0, -1, 0, 1], [1, 0, 0, 2], [0, 0, 1, 3]])]),
    }
    arrays["depths"][0, 0, 0] = 0
    write_scene(folder, **arrays, provenance={"seeds": {"texture": 1}}, masks=masks)
    return arrays


def edit(folder: Path, change) -> None:
    record = json.loads((folder / "scene.json").read_text())
    change(record)
    (folder / "scene.json").write_text(json.dumps(record))


def test_round_trip(tmp_path, rng):
    arrays = make_scene(tmp_path / "a" / "scene", rng)
    scene = load_scene(tmp_path / "a" / "scene")
    assert scene.name == "scene" and scene.provenance == {"seeds": {"texture": 1}}
    assert np.array_equal(scene.images, arrays["images"]) and scene.images.dtype == np.uint8
    assert np.abs(scene.depths - arrays["depths"]).max() <= 0.501 * DEPTH_SCALE and scene.depths.dtype == np.float32
    assert np.array_equal(scene.intrinsics, arrays["intrinsics"])
    assert np.array_equal(scene.extrinsics, arrays["extrinsics"])
    assert scene.depths[0, 0, 0] == 0


def test_frames_come_in_the_order_asked_for(tmp_path, rng):
    arrays = make_scene(tmp_path / "scene", rng)
    assert np.array_equal(load_scene(tmp_path / "scene", frames=[1, 0]).images, arrays["images"][::-1])
    with pytest.raises(ValueError, match=r"frames must lie in 0\.\.1"):
        load_scene(tmp_path / "scene", frames=[2])


def test_find_scenes_is_sorted_and_skips_hidden_folders(tmp_path, rng):
    for name in ("b/one", "a/two", ".c.tmp/three"):
        make_scene(tmp_path / name, rng)
    assert find_scenes(tmp_path) == [tmp_path / "a/two", tmp_path / "b/one"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="at least one folder"):
        find_scenes(tmp_path / "empty")
    with pytest.raises(FileNotFoundError):
        find_scenes(tmp_path / "missing")


@pytest.mark.parametrize("size", [3, 12])
def test_resizing_keeps_points_where_they_are(tmp_path, rng, size):
    """A plane z = 2 + x / 4 seen in 6 x 10 pixels: resized depth still lies on it through the new intrinsics."""
    height, width = 6, 10
    intrinsic = np.array([[9.0, 0, 5], [0, 9, 3], [0, 0, 1]])
    ray_x = (np.arange(width) + 0.5 - 5) / 9
    depth = np.broadcast_to(2 / (1 - ray_x / 4), (1, height, width)).astype(np.float32)
    images = rng.integers(0, 256, (1, height, width, 3), dtype=np.uint8)
    write_scene(tmp_path / "s", images, depth, intrinsic[None], np.eye(3, 4)[None], {})
    scene = load_scene(tmp_path / "s", image_size=size)
    assert scene.images.shape == (1, size, size, 3) and scene.depths.shape == (1, size, size)
    ray = (np.arange(size) + 0.5 - scene.intrinsics[0, 0, 2]) / scene.intrinsics[0, 0, 0]
    # a nearest pixel is at most half a source pixel away: |dz| <= 0.5 / 9 * dz/dray, about 0.6 here
    assert np.abs(scene.depths[0] - 2 / (1 - ray / 4)).max() < 0.5 / 9 * 0.65
    assert scene.intrinsics[0, 0, 0] == pytest.approx(9 * size / 6)
    if size < 6:
        blocks = images[0, :, 2:8].reshape(3, 2, 3, 2, 3).mean(axis=(1, 3))
        assert np.abs(scene.images[0] - blocks).max() <= 1


def test_masks_invalidate_depth(tmp_path, rng):
    masks = np.zeros((2, 6, 6), bool)
    masks[:, 2:] = True
    make_scene(tmp_path / "s", rng, masks=masks)
    assert np.array_equal(load_scene(tmp_path / "s").depths > 0, masks)


def test_frames_without_depth_are_all_invalid(tmp_path, rng):
    arrays = make_scene(tmp_path / "s", rng)
    assert load_scene(tmp_path / "s").has_depth and load_scene(tmp_path / "s").translation_known
    edit(tmp_path / "s", lambda record: record["frames"][0].update(depth=None))
    scene = load_scene(tmp_path / "s")
    assert scene.has_depth and not scene.depths[0].any() and scene.depths[1].all()
    edit(tmp_path / "s", lambda record: record["frames"][1].update(depth=None))
    assert not load_scene(tmp_path / "s").has_depth
    frames = [Frame(*view) for view in zip(arrays["images"], arrays["intrinsics"], arrays["extrinsics"])]
    assert write_frames(tmp_path / "t", frames, {}, unit="m", translation_known=False) == 2
    scene = load_scene(tmp_path / "t")
    assert not scene.has_depth and not scene.translation_known and SceneFile(tmp_path / "t").unit == "m"


def test_a_scene_that_breaks_off_leaves_nothing(tmp_path, rng):
    arrays = make_scene(tmp_path / "s", rng)

    def frames():
        yield Frame(arrays["images"][0], arrays["intrinsics"][0], arrays["extrinsics"][0])
        yield Frame(arrays["images"][1, :3], arrays["intrinsics"][1], arrays["extrinsics"][1])

    with pytest.raises(ValueError, match=r"frame 1 .* image must be uint8 .6, 6, 3., got uint8 .3, 6, 3."):
        write_frames(tmp_path / "t", frames(), {})
    with pytest.raises(ValueError, match="at least one"):
        write_frames(tmp_path / "t", [], {})
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_npy_depth_is_read_in_scene_units(tmp_path, rng):
    make_scene(tmp_path / "s", rng)
    depth = rng.uniform(1, 50, (6, 6)).astype(np.float32)
    depth[0, 0] = np.nan
    np.save(tmp_path / "s/depth/0000.npy", depth)
    edit(tmp_path / "s", lambda record: record["frames"][0].update(depth="depth/0000.npy"))
    assert np.array_equal(load_scene(tmp_path / "s").depths[0], np.nan_to_num(depth))


def test_npy_depth_is_never_unpickled(tmp_path, rng):
    make_scene(tmp_path / "s", rng)
    np.save(tmp_path / "s/depth/0000.npy", np.array([[{}]], dtype=object), allow_pickle=True)
    edit(tmp_path / "s", lambda record: record["frames"][0].update(depth="depth/0000.npy"))
    with pytest.raises(ValueError, match=r"0000\.npy is not a whole"):
        load_scene(tmp_path / "s")


def test_exr_depth_is_read(tmp_path, rng):
    from subspace3d.mitsuba_variant import load_mitsuba

    make_scene(tmp_path / "s", rng)
    depth = rng.uniform(1, 5, (6, 6)).astype(np.float32)
    depth[0, 0] = 1e10
    load_mitsuba().Bitmap(depth[..., None]).write(str(tmp_path / "s/depth/0000.exr"))
    edit(tmp_path / "s", lambda record: record["frames"][0].update(depth="depth/0000.exr"))
    loaded = load_scene(tmp_path / "s").depths[0]
    assert loaded[0, 0] == 0 and np.array_equal(loaded[1:], depth[1:])


def test_exr_is_read_on_a_machine_with_one_core(tmp_path):
    script = (
        "import os, sys; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from subspace3d.mitsuba_variant import load_mitsuba\n"
        "import numpy as np; from pathlib import Path\n"
        "from subspace3d.formats.images import read_raw_depth\n"
        "load_mitsuba().Bitmap(np.full((3, 4, 1), 2.5, np.float32)).write(sys.argv[1])\n"
        "assert (read_raw_depth(Path(sys.argv[1]), 1.0) == np.full((3, 4), 2.5)).all()\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "a.exr")], check=True, timeout=60)


REFUSED = {
    "format": (lambda r: r.update(format="other"), '"format": "subspace3d-scene"'),
    "version": (lambda r: r.update(version=2), '"version": 1'),
    "depth_scale": (lambda r: r.update(depth_scale=0), "depth_scale must be a positive number"),
    "width": (lambda r: r.update(width=7), "must be 7 x 6 pixels"),
    "frames": (lambda r: r.update(frames=[]), "frames must be a list"),
    "outside": (lambda r: r["frames"][0].update(image="../../etc/passwd"), "must stay inside"),
    "absolute": (lambda r: r["frames"][0].update(image="/etc/passwd"), "must stay inside"),
    "no image": (lambda r: r["frames"][0].pop("image"), "must be a path"),
    "4x4": (lambda r: r["frames"][0].update(extrinsics_w2c=np.eye(4).tolist()), "extrinsics_w2c must be 3x4"),
    "scaled": (lambda r: r["frames"][0].update(extrinsics_w2c=(2 * np.eye(3, 4)).tolist()), "R a rotation"),
    "mirrored": (lambda r: r["frames"][0].update(extrinsics_w2c=(-np.eye(3, 4)).tolist()), "det R = -1"),
    "skew": (lambda r: r["frames"][0]["intrinsics"][0].__setitem__(1, 0.5), "fx, fy > 0"),
    "translation": (lambda r: r.update(translation_known="no"), "translation_known must be true or false"),
    "ragged": (lambda r: r["frames"][0].update(intrinsics=[[1, 2], [3]]), "must be a matrix of numbers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_record_is_refused(tmp_path, rng, case):
    change, message = REFUSED[case]
    make_scene(tmp_path / "s", rng)
    edit(tmp_path / "s", change)
    with pytest.raises(ValueError, match=message) as error:
        load_scene(tmp_path / "s")
    assert str(tmp_path / "s") in str(error.value)


def test_bad_files_are_refused(tmp_path, rng):
    make_scene(tmp_path / "s", rng, 64, 64)
    image = tmp_path / "s/images/0001.png"
    whole = image.read_bytes()
    image.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"images/0001\.png is not a whole image"):
        load_scene(tmp_path / "s")
    image.unlink()
    with pytest.raises(FileNotFoundError, match=r"0001\.png"):
        load_scene(tmp_path / "s")
    image.write_bytes(whole)
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(tmp_path / "s/depth/0000.png")
    with pytest.raises(ValueError, match="16-bit greyscale"):
        load_scene(tmp_path / "s")
    (tmp_path / "s/scene.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_scene(tmp_path / "s")


def test_write_refuses_what_cannot_be_stored(tmp_path, rng):
    arrays = make_scene(tmp_path / "s", rng)
    cases = {
        "depths": (np.full((2, 6, 6), 13.2, np.float32), "at most 13.107"),
        "images": (arrays["images"].astype(np.float32), "must be uint8"),
        "extrinsics": (arrays["extrinsics"] * 1.1, "R a rotation"),
        "intrinsics": (arrays["intrinsics"][:1], "must be .2, 3, 3. beside the images"),
    }
    for name, (value, message) in cases.items():
        with pytest.raises(ValueError, match=message):
            write_scene(tmp_path / "new", **{**arrays, name: value}, provenance={})
    negative = arrays["depths"].copy()
    negative[0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="finite"):
        write_scene(tmp_path / "new", **{**arrays, "depths": negative}, provenance={})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s"]


def test_images_without_cameras_are_read_as_images_and_refused_by_name_elsewhere(tmp_path, rng):
    images = rng.integers(0, 256, (3, 6, 9, 3), dtype=np.uint8)
    intrinsic = np.array([[9.0, 0, 5.5], [0, 9, 3], [0, 0, 1]])
    write_frames(tmp_path / "s", [Frame(images[0], intrinsic), Frame(images[1]), Frame(images[2])], {})
    scene = SceneFile(tmp_path / "s")
    assert not scene.has_cameras and not scene.has_depth
    assert np.array_equal(scene.intrinsic(0), intrinsic)
    assert scene.intrinsic(1) is None and scene.extrinsic(0) is None
    assert np.array_equal(load_images(tmp_path / "s"), images)
    # of 6 x 8 pixels without a principal point the middle 6 x 6 are cut out
    write_frames(tmp_path / "t", [Frame(images[2][:, :8])], {})
    assert np.array_equal(load_images(tmp_path / "t", 6)[0], images[2][:, 1:7])
    assert load_images(tmp_path / "s", 6).shape == (3, 6, 6, 3)
    with pytest.raises(ValueError, match=r"frames\[0\] must have a camera here, it has no extrinsics_w2c"):
        load_scene(tmp_path / "s")
    with pytest.raises(ValueError, match=r"it has no intrinsics and extrinsics_w2c"):
        scene.camera(1)
