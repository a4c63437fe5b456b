"""The usual dirt of own captures: turned and portrait photos, a depth map too few, a broken pose, names with accents.

Each kind of capture goes through convert and validate, once with a pose that is no number, once with one that is wrong.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pycolmap
import pytest
from datasets import own_captures as captures
from datasets.official_layouts import FLIP, save_image, to_c2w
from datasets.plane_world import camera_path, plane_error, rotation
from PIL import Image

from subspace3d.commands import convert, validate
from subspace3d.commands.convert import ConvertConfig
from subspace3d.commands.validate import ValidateConfig
from subspace3d.formats.scene import SceneFile, load_scene

VIEWS, TURNED, PORTRAIT, BARE, BROKEN = 9, 2, 3, 4, 5
SIZES = {index: (80, 60) if index == PORTRAIT else (60, 80) for index in range(VIEWS)}
MATRIX = {(60, 80): [88.0, 92, 42.4, 27.6], (80, 60): [92.0, 88, 32.4, 42.4]}
WRONG = np.c_[rotation(0.1, 0.15, 0.3), [0.3, -0.2, 0.5]]


def name_of(index: int) -> str:
    return f"été à la plage {index + 8}.jpg"


def pixels(index: int, pose: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    size = SIZES[index]
    fx, fy, cx, cy = MATRIX[size]
    return captures.seen_by(
        pycolmap.Camera(model="PINHOLE", width=size[1], height=size[0], params=[fx, fy, cx, cy]), pose, size
    )


def save_photo(path: Path, image: np.ndarray, turned: bool) -> None:
    """A jpg; ``turned``: its pixels a quarter left, and the tag that tells viewers to turn them right."""
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = 6 if turned else 1
    stored = np.rot90(image) if turned else image
    Image.fromarray(np.ascontiguousarray(stored)).save(path, quality=98, subsampling=0, exif=exif)


def numbers(pose: np.ndarray, bad: float | None) -> np.ndarray:
    return np.full_like(pose, bad) if bad is not None else WRONG


def write_colmap(folder: Path, bad: float | None) -> None:
    cameras = [(1, (60, 80)), (2, (80, 60))]
    lines = [f"{number} PINHOLE {size[1]} {size[0]} " + " ".join(map(str, MATRIX[size])) for number, size in cameras]
    (folder / "sparse/0").mkdir(parents=True)
    (folder / "sparse/0/cameras.txt").write_text("# Camera list\n" + "\n".join(lines) + "\n")
    lines = ["# Image list"]
    for index, pose in enumerate(camera_path(VIEWS)):
        image, depth = pixels(index, pose)
        save_photo(folder / "images" / name_of(index), image, index == TURNED)
        if index != BARE:
            captures.write_depth(folder, name_of(index), ".PNG", depth)
        written = numbers(pose, bad) if index == BROKEN else pose
        turn = written[:, :3] if bad is None or index != BROKEN else np.eye(3)
        x, y, z, w = pycolmap.Rotation3d(turn).quat
        t = " ".join(map(str, written[:, 3]))
        lines += [f"{index + 1} {w} {x} {y} {z} {t} {2 if index == PORTRAIT else 1} {name_of(index)}", "1.5 2.5 -1"]
    (folder / "sparse/0/images.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "sparse/0/points3D.txt").write_text("")


def write_nerfstudio(folder: Path, bad: float | None) -> None:
    frames = []
    for index, pose in enumerate(camera_path(VIEWS)):
        image, depth = pixels(index, pose)
        save_photo(folder / "images" / name_of(index), image, index == TURNED)
        height, width = SIZES[index]
        c2w = to_c2w(numbers(pose, None) if index == BROKEN else pose)
        c2w[:3, :3] = c2w[:3, :3] @ FLIP
        if index == BROKEN and bad is not None:
            c2w[:] = bad
        fx, fy, cx, cy = MATRIX[SIZES[index]]
        frame = {"file_path": f"images/{name_of(index)}", "transform_matrix": c2w.tolist(), "w": width, "h": height}
        frame |= {"fl_x": fx, "fl_y": fy, "cx": cx, "cy": cy}
        if index != BARE:
            frame["depth_file_path"] = f"depths/{index}.png"
            save_image(folder / frame["depth_file_path"], np.rint(1000 * depth).astype(np.uint16))
        frames.append(frame)
    (folder / "transforms.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({"frames": frames}).encode())


def write_phone(folder: Path, bad: float | None) -> None:
    """Photos of one camera held upright, their pixels turned; depth a quarter as large; one photo of another size."""
    size = (80, 60)
    fx, fy, cx, cy = MATRIX[size]
    camera = pycolmap.Camera(model="PINHOLE", width=60, height=80, params=[fx, fy, cx, cy])
    small = pycolmap.Camera(model="PINHOLE", width=15, height=20, params=[fx / 4, fy / 4, cx / 4, cy / 4])
    poses = []
    for index, pose in enumerate(camera_path(VIEWS)):
        image, _ = captures.seen_by(camera, pose, size)
        save_photo(folder / "images" / name_of(index), image[:, :40] if index == PORTRAIT else image, True)
        if index != BARE:
            depth = captures.seen_by(small, pose, (20, 15))[1]
            save_image(folder / f"depth/depth_{Path(name_of(index)).stem}.png", np.rint(1000 * depth).astype(np.uint16))
        c2w = to_c2w(numbers(pose, None) if index == BROKEN else pose)
        if index == BROKEN and bad is not None:
            c2w[:] = bad
        poses.append(" ".join(f"{value:.9f}" for value in c2w.ravel()) + "  # frame")
    (folder / "poses.txt").write_text("\ufeff" + "\n".join(poses), encoding="utf-8")
    (folder / "intrinsics.txt").write_text(f"{fx} 0 {cx - 0.5} 0\n0 {fy} {cy - 0.5} 0\n0 0 1 0\n0 0 0 1 # 4x4\n")


WRITERS = {"colmap": write_colmap, "nerfstudio": write_nerfstudio, "rgbd": write_phone}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, None], ids=["nan", "inf", "wrong"])
def test_dirt_costs_what_is_dirty_and_is_told(tmp_path: Path, kind: str, bad: float | None, capsys) -> None:
    root = tmp_path / "mes photos"
    WRITERS[kind](root / "été", bad)
    convert.run(ConvertConfig(out=tmp_path / "out", from_=kind, root=root))  # type: ignore[arg-type]
    told = capsys.readouterr().out
    folder = tmp_path / "out" / kind / "été"
    scene = SceneFile(folder)
    # the phone's photo of another size cannot have the camera of the others
    lost = {BROKEN} if bad is not None else set()
    lost |= {PORTRAIT} if kind == "rgbd" else set()
    kept = [index for index in range(VIEWS) if index not in lost]
    names = [Path(name).name for name in scene.provenance["source"]["images"]]
    assert names == [name_of(index) for index in kept]
    counts = f"{VIEWS} images found, {len(kept)} used"
    counts += f", {len(lost)} left out" if lost else ""
    assert counts in told
    assert f"{len(kept) - 1} used" in told and "used without depth" in told
    for index in lost:
        assert f"{name_of(index)}: " in told
    loaded = load_scene(folder)
    assert [bool((depth > 0).any()) for depth in loaded.depths] == [index != BARE for index in kept]
    for place, index in enumerate(kept):
        if index not in (BARE, BROKEN):
            # the phone's depth pixels are four wide: up to 2 of 88 pixels away, and what is cut out of the portrait
            error = plane_error(loaded.depths[place], loaded.intrinsics[place], loaded.extrinsics[place])
            assert error < (2.5 * 0.5 * 2 * 1.41 / 88 if kind == "rgbd" or index == PORTRAIT else 1e-3), index
    # no tag that would turn them is left
    for path in (folder / "images").iterdir():
        assert Image.open(path).getexif().get(0x0112, 1) == 1
    config = ValidateConfig(scenes=tmp_path / "out")
    if bad is not None:
        assert validate.run(config)["with_errors"] == 0
        return
    with pytest.raises(ValueError, match="1 of 1 scenes"):
        validate.run(config)
    told = capsys.readouterr().out
    assert f"frame {kept.index(BROKEN)}" in told
