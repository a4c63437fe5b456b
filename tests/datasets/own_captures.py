"""Captures of the plane as people have them: COLMAP models, nerfstudio's transforms.json, folders of images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap
from datasets.official_layouts import FLIP, save_image, to_c2w
from datasets.plane_world import NORMAL, OFFSET, camera_matrix, camera_path, color
from PIL import Image

SIZE = (60, 80)  # height and width
PARAMETERS = {
    "SIMPLE_RADIAL": [88, 42.4, 27.6, -0.08],
    "OPENCV": [88, 92, 42.4, 27.6, -0.1, 0.02, 0.002, -0.003],
    "OPENCV_FISHEYE": [88, 92, 42.4, 27.6, 0.05, -0.02, 0.004, -0.001],
    "PINHOLE": [88, 92, 42.4, 27.6],
}


def camera_of(model: str, number: int = 1, size: tuple[int, int] = SIZE) -> pycolmap.Camera:
    return pycolmap.Camera(model=model, width=size[1], height=size[0], params=PARAMETERS[model], camera_id=number)


def seen_by(
    camera: pycolmap.Camera, extrinsic: np.ndarray, size: tuple[int, int] = SIZE
) -> tuple[np.ndarray, np.ndarray]:
    """Image and z-depth of the plane through any of COLMAP's cameras, by its own inverse."""
    x, y = np.meshgrid(np.arange(size[1]) + 0.5, np.arange(size[0]) + 0.5)
    flat = np.asarray(camera.cam_from_img(np.stack([x.ravel(), y.ravel()], axis=1)))
    rays = np.concatenate([flat, np.ones((len(flat), 1))], axis=1)
    world = rays @ extrinsic[:, :3]
    centre = -extrinsic[:, :3].T @ extrinsic[:, 3]
    depth = (OFFSET - NORMAL @ centre) / (world @ NORMAL)
    return color(centre + depth[:, None] * world).reshape(*size, 3), depth.reshape(size)


def write_colmap(
    folder: Path,
    views: int = 4,
    model: str = "PINHOLE",
    binary: bool = True,
    depth: str = "",
    names: Callable[[int], str] = lambda index: f"{index}.png",
    at: str = "sparse/0",
    offset: np.ndarray | None = None,
) -> list[np.ndarray]:
    """A capture; ``depth`` is the suffix of its depth maps, or "dense" for COLMAP's own; returns w2c."""
    reconstruction = pycolmap.Reconstruction()
    camera = camera_of(model)
    reconstruction.add_camera_with_trivial_rig(camera)
    poses = camera_path(views)
    for index, pose in enumerate(poses):
        image, truth = seen_by(camera, pose)
        save_image(folder / "images" / names(index), image)
        if depth:
            write_depth(folder, names(index), depth, truth)
        moved = pose if offset is None else np.c_[pose[:, :3], pose[:, 3] - pose[:, :3] @ offset]
        record = pycolmap.Image(name=names(index), camera_id=1, image_id=index + 1)
        reconstruction.add_image_with_trivial_frame(
            record, pycolmap.Rigid3d(pycolmap.Rotation3d(moved[:, :3]), moved[:, 3])
        )
    (folder / at).mkdir(parents=True, exist_ok=True)
    (reconstruction.write_binary if binary else reconstruction.write_text)(str(folder / at))
    return poses


def write_depth(folder: Path, name: str, kind: str, depth: np.ndarray) -> None:
    stem = Path(name).with_suffix("")
    if kind == "dense":
        path = folder / "stereo/depth_maps" / f"{name}.geometric.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"{depth.shape[1]}&{depth.shape[0]}&1&".encode() + depth.astype("<f4").tobytes())
        return
    path = folder / "depth" / f"{stem}{kind}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind.lower() == ".png":
        Image.fromarray(np.rint(1000 * depth).astype(np.uint16)).save(path, format="PNG")
    elif kind.lower() in (".tif", ".tiff"):
        Image.fromarray(depth.astype(np.float32)).save(path, format="TIFF")
    elif kind == ".npz":
        np.savez_compressed(path, depth=depth.astype(np.float32))
    elif kind == ".npy":
        np.save(path, depth.astype(np.float32)[..., None])
    else:
        raise ValueError(kind)


def write_nerfstudio(
    folder: Path,
    views: int = 4,
    model: str = "PINHOLE",
    depth: bool = True,
    per_frame: bool = False,
    names: Callable[[int], str] = lambda index: f"images/frame_{index}.png",
) -> list[np.ndarray]:
    """transforms.json as ns-process-data writes it, from 1 on in file names; returns w2c."""
    camera = camera_of(model)
    fx, fy, cx, cy, *bent = PARAMETERS[model]
    shared: dict[str, Any] = {"fl_x": fx, "fl_y": fy, "cx": cx, "cy": cy, "w": SIZE[1], "h": SIZE[0]}
    shared |= dict(zip(("k1", "k2", "k3", "k4") if "FISHEYE" in model else ("k1", "k2", "p1", "p2"), bent))
    shared["camera_model"] = model if bent else "OPENCV"
    poses = camera_path(views)
    frames = []
    for index, pose in enumerate(poses):
        image, truth = seen_by(camera, pose)
        save_image(folder / names(index), image)
        c2w = to_c2w(pose)
        c2w[:3, :3] = c2w[:3, :3] @ FLIP
        frame: dict[str, Any] = {"file_path": names(index), "transform_matrix": c2w.tolist()}
        if depth:
            path = f"depths/{Path(names(index)).stem}.png"
            save_image(folder / path, np.rint(1000 * truth).astype(np.uint16))
            frame["depth_file_path"] = path
        frames.append(frame | (shared if per_frame else {}))
    record = {**({} if per_frame else shared), "frames": frames}
    (folder / "transforms.json").write_text(json.dumps(record))
    return poses


def write_renderings(folder: Path, views: int = 3, inside: bool = False, scale: float = 1.0) -> list[np.ndarray]:
    """What the authors' rendering scripts leave, the corner of the first depth map without depth; returns w2c."""
    from subspace3d.mitsuba_variant import load_mitsuba

    camera = camera_of("PINHOLE")
    fx, fy, cx, cy = PARAMETERS["PINHOLE"]
    poses = camera_path(views)
    frames = []
    for index, pose in enumerate(poses):
        image, truth = seen_by(camera, pose)
        opaque = np.concatenate([image, np.full((*image.shape[:2], 1), 255, np.uint8)], axis=2)
        save_image(folder / f"renderings/{index:08d}_rgba.png", opaque)
        depth = truth.astype(np.float32)
        if index == 0:
            depth[:5, :5] = 1e10
        bitmap = load_mitsuba().Bitmap(np.repeat(depth[..., None], 3, axis=2))
        bitmap.write(str(folder / f"renderings/{index:08d}_depth.exr"))
        w2c = np.vstack([scale * pose, [0, 0, 0, 1]])
        numbers = {"w": SIZE[1], "h": SIZE[0], "fx": fx, "fy": fy, "cx": cx, "cy": cy}
        frames.append({**numbers, "w2c": w2c.tolist(), "file_path": f"renderings/{index:08d}_rgba.png"})
    place = folder / "renderings" if inside else folder
    (place / "opencv_cameras.json").write_text(json.dumps({"frames": frames}))
    return poses


def camera_matrix_of(size: tuple[int, int] = SIZE) -> np.ndarray:
    return camera_matrix(size[1], size[0])
