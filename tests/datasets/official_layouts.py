"""Tiny data sets in the official layouts of the real ones, made from a plane or an ellipsoid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from datasets.plane_world import camera_matrix, camera_path, rotation, view
from PIL import Image

SIZE = (36, 48)  # height and width of the RGB-D frames
FLIP = np.diag([1.0, -1.0, -1.0])


def save_image(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def to_c2w(extrinsic: np.ndarray) -> np.ndarray:
    return np.linalg.inv(np.vstack([extrinsic, [0, 0, 0, 1]]))


def write_clearpose_scene(folder: Path, numbers: list[int]) -> None:
    from scipy.io import savemat

    intrinsic = camera_matrix(SIZE[1], SIZE[0])
    centred = intrinsic.copy()
    centred[:2, 2] -= 0.5  # from the centre of the first pixel
    metadata = {}
    for number, extrinsic in zip(numbers, camera_path(len(numbers))):
        image, depth = view(intrinsic, extrinsic, *SIZE)
        key = f"{number:06d}"
        steps = np.rint(1000 * depth).astype(np.uint16)
        save_image(folder / f"{key}-color.png", image)
        save_image(folder / f"{key}-depth_true.png", steps)
        save_image(folder / f"{key}-depth.png", np.zeros_like(steps))
        save_image(folder / f"{key}-label.png", np.zeros(SIZE, np.uint8))
        save_image(folder / f"{key}-normal_true.png", image)
        metadata[key] = {
            "cls_indexes": np.array([[3], [7]], np.uint8),
            "intrinsic_matrix": centred,
            "factor_depth": np.array([[1000]], np.uint16),
            "rotation_translation_matrix": to_c2w(extrinsic)[:3],
            "poses": np.zeros((3, 4, 2)),
            "center": np.zeros((2, 2)),
            "bbox": np.zeros((2, 4)),
        }
    savemat(folder / "metadata.mat", metadata)


def soap_bundle(views: int, portrait: tuple[int, int] = (64, 48)) -> tuple[dict, np.ndarray, list[np.ndarray]]:
    """Members of a bundle whose cameras only turn, the portrait K, and the true w2c rotations."""
    height, width = portrait
    intrinsic = np.array([[60.0, 0, 25], [0, 62, 33], [0, 0, 1]])
    poses = [np.c_[rotation(0.02 * i, -0.015 * i, 0.01 * i), np.zeros(3)] for i in range(views)]
    # the phone's world has z up; the plane lies ahead of a phone held upright
    upright = np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])  # scene (x right, y down, z ahead) from phone world
    members: dict = {"num_raw_frames": 0, "num_rgb_frames": views, "num_depth_frames": views}
    stored = np.array([[62.0, 0, 0], [0, 60, 0], [32.5, 24.5, 1]])  # [[fy, 0, 0], [0, fx, 0], [cy, cx, 1]], centred
    quaternions, gravity = [], []
    for index, pose in enumerate(poses):
        image, _ = view(intrinsic, pose, height, width)
        small = 1 / view(intrinsic / [[4], [4], [1]], pose, height // 4, width // 4)[1]
        rgba = np.dstack([image, np.full((height, width), 255, np.uint8)])
        members[f"rgb_{index}"] = {"timestamp": 0.05 * index, "intrinsics": stored, "rgb": rgba}
        members[f"depth_{index}"] = {"timestamp": 0.05 * index + 0.004, "depth": small.astype(np.float16)}
        # world from device = world from scene, scene from camera, camera from device
        turn = upright @ pose[:, :3].T @ FLIP
        quaternions.append(quaternion_of(turn))
        gravity.append(9.81 * turn.T @ np.array([0, 0, -1.0]))
    members["motion"] = {
        "timestamp": 0.05 * np.arange(views),
        "quaternion": np.array(quaternions),
        "gravity": np.array(gravity),
    }
    return members, intrinsic, [pose[:, :3] for pose in poses]


def hndr_bundle(views: int, landscape: tuple[int, int] = (36, 48)) -> dict:
    """Images turned to portrait, K and poses of the landscape sensor, in the phone's axes."""
    height, width = landscape
    intrinsic = camera_matrix(width, height)
    members: dict = {"num_frames": views}
    for index, pose in enumerate(camera_path(views, 0.05)):
        image, _ = view(intrinsic, pose, height, width)
        small = view(intrinsic / [[4], [4], [1]], pose, height // 4, width // 4)[1].astype(np.float32)
        confidence = np.full(small.shape, 2, np.uint8)
        confidence[:, 0] = 0
        world_to_camera = np.vstack([FLIP @ pose, [0, 0, 0, 1]])
        members[f"img_{index}"] = np.rot90(image, -1)
        members[f"depth_{index}"] = np.rot90(small, -1)
        members[f"conf_{index}"] = np.rot90(confidence, -1)
        members[f"info_{index}"] = {
            "timestamp": index / 60,
            "euler_angles": np.zeros(3),
            "world_pose": np.linalg.inv(world_to_camera),
            "intrinsics": intrinsic,
            "world_to_camera": world_to_camera,
        }
    return members


def write_rgbd_folder(folder: Path, views: int, depth: bool = True) -> np.ndarray:
    """Plain layout with c2w matrices; returns K from the corner."""
    intrinsic = camera_matrix(SIZE[1], SIZE[0])
    poses = []
    for index, extrinsic in enumerate(camera_path(views)):
        image, truth = view(intrinsic, extrinsic, *SIZE)
        save_image(folder / f"rgb/{index:03d}.png", image)
        if depth:
            save_image(folder / f"depth/{index:03d}.png", np.rint(1000 * truth).astype(np.uint16))
        poses.append(" ".join(f"{value:.9f}" for value in to_c2w(extrinsic).ravel()))
    (folder / "poses.txt").write_text("\n".join(poses) + "\n")
    fx, fy, cx, cy = intrinsic[0, 0], intrinsic[1, 1], intrinsic[0, 2] - 0.5, intrinsic[1, 2] - 0.5
    (folder / "intrinsics.txt").write_text(f"# fx fy cx cy\n{fx} {fy} {cx} {cy}\n")
    return intrinsic


def write_tum_folder(folder: Path, views: int) -> None:
    """TUM's three lists, with the depth 4 ms and the pose 7 ms behind the image, 5000 steps to the metre."""
    write_rgbd_folder(folder, views, depth=False)
    intrinsic = camera_matrix(SIZE[1], SIZE[0])
    lists: dict[str, list[str]] = {"rgb": ["# color images"], "depth": ["# depth maps"], "groundtruth": ["# poses"]}
    for index, extrinsic in enumerate(camera_path(views)):
        time = 100 + index / 30
        depth = np.rint(5000 * view(intrinsic, extrinsic, *SIZE)[1]).astype(np.uint16)
        save_image(folder / f"depth/{time + 0.004:.6f}.png", depth)
        pose = to_c2w(extrinsic)
        numbers = [*pose[:3, 3], *quaternion_of(pose[:3, :3])]
        lists["rgb"].append(f"{time:.6f} rgb/{index:03d}.png")
        lists["depth"].append(f"{time + 0.004:.6f} depth/{time + 0.004:.6f}.png")
        lists["groundtruth"].append(f"{time + 0.007:.6f} " + " ".join(f"{number:.9f}" for number in numbers))
    (folder / "poses.txt").unlink()
    for name, lines in lists.items():
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")


def quaternion_of(turn: np.ndarray) -> np.ndarray:
    """x, y, z, w of a rotation, from the eigenvector of its eigenvalue 1 and its trace."""
    values, vectors = np.linalg.eig(turn)
    axis = np.real(vectors[:, np.argmin(np.abs(values - 1))])
    sine = np.array([turn[2, 1] - turn[1, 2], turn[0, 2] - turn[2, 0], turn[1, 0] - turn[0, 1]]) @ axis / 2
    angle = np.arctan2(sine, (np.trace(turn) - 1) / 2)
    return np.append(np.sin(angle / 2) * axis, np.cos(angle / 2))


AXES = np.array([0.25, 0.45, 0.15])  # half axes of the scans' ellipsoid; y is up, as in the files


def ellipsoid(rows: int = 24, columns: int = 48) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vertices [V, 3], texture coordinates [V, 2] and triangles [F, 3]; the seam has its vertices twice."""
    u, v = np.meshgrid(np.linspace(0, 1, columns + 1), np.linspace(0, 1, rows + 1))
    angle, polar = 2 * np.pi * u, np.pi * v
    unit = np.stack([np.sin(polar) * np.cos(angle), np.cos(polar), np.sin(polar) * np.sin(angle)], -1)
    a = (np.arange(rows)[:, None] * (columns + 1) + np.arange(columns)).ravel()
    faces = np.concatenate(
        [np.stack([a, a + 1, a + columns + 1], 1), np.stack([a + 1, a + columns + 2, a + columns + 1], 1)]
    )
    return (unit * AXES).reshape(-1, 3), np.stack([u, 1 - v], -1).reshape(-1, 2), faces


def write_thuman_scan(folder: Path, offset: tuple[float, float, float] = (0.1, 0.5, -0.2)) -> None:
    """An ellipsoid away from the origin whose texture is red where y is positive and green below, in linear halves."""
    vertices, uv, faces = ellipsoid()
    lines = ["mtllib material0.mtl", "usemtl material0"]
    lines += [f"v {x:.6f} {y:.6f} {z:.6f}" for x, y, z in vertices + offset]
    lines += [f"vt {u:.6f} {v:.6f}" for u, v in uv]
    lines += [f"f {a}/{a} {b}/{b} {c}/{c}" for a, b, c in faces + 1]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{folder.name}.obj").write_text("\n".join(lines) + "\n")
    (folder / "material0.mtl").write_text("newmtl material0\nKd 1 1 1\nmap_Kd material0.jpeg\n")
    texture = np.zeros((64, 64, 3), np.uint8)
    texture[:32, :, 0] = texture[32:, :, 1] = 200
    Image.fromarray(texture).save(folder / "material0.jpeg", quality=95)


def write_2k2k_scan(folder: Path, binary: bool = True) -> None:
    """The ellipsoid with vertex colours: red above, green below."""
    vertices, _, faces = ellipsoid()
    colors = np.where(vertices[:, 1:2] > 0, [200, 0, 0], [0, 200, 0]).astype(np.uint8)
    kind = "binary_little_endian" if binary else "ascii"
    header = [
        "ply", f"format {kind} 1.0", f"element vertex {len(vertices)}", "property float x", "property float y",
        "property float z", "property uchar red", "property uchar green", "property uchar blue",
        f"element face {len(faces)}", "property list uchar int vertex_indices", "end_header",
    ]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    if binary:
        rows = np.zeros(len(vertices), [("xyz", "<f4", 3), ("rgb", "u1", 3)])
        rows["xyz"], rows["rgb"] = vertices, colors
        polygons = np.zeros(len(faces), [("n", "u1"), ("index", "<i4", 3)])
        polygons["n"], polygons["index"] = 3, faces
        body = rows.tobytes() + polygons.tobytes()
    else:
        lines = [f"{x} {y} {z} {r} {g} {b}" for (x, y, z), (r, g, b) in zip(vertices, colors)]
        body = "\n".join([*lines, *(f"3 {a} {b} {c}" for a, b, c in faces)]).encode() + b"\n"
    (folder / f"{folder.name}.ply").write_bytes("\n".join(header).encode() + b"\n" + body)
