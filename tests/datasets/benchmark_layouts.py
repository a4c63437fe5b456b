"""The plane in the official layouts of the benchmarks that people report on, and of Co3D as VGGT's trainer has it."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pycolmap
from datasets.official_layouts import FLIP, quaternion_of, save_image, to_c2w
from datasets.own_captures import seen_by
from datasets.plane_world import camera_path, view
from PIL import Image

SIZE = (60, 80)
K = np.array([[88.0, 0, 42], [0, 92, 28], [0, 0, 1]])  # from the corner
CENTRED = K - [[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]]
POSES = camera_path(4)


def seen(index: int, intrinsic: np.ndarray = K, size: tuple[int, int] = SIZE) -> tuple[np.ndarray, np.ndarray]:
    return view(intrinsic, POSES[index], *size)


def rows(matrix: np.ndarray) -> str:
    return "\n".join(" ".join(f"{value:.12g}" for value in row) for row in matrix) + "\n"


def write(path: Path, data: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)


def millimetres(path: Path, depth: np.ndarray, per_metre: float = 1000) -> None:
    save_image(path, np.rint(per_metre * depth).astype(np.uint16))


def seven_scenes(root: Path, base: str = "") -> None:
    intrinsic = np.array([[585.0, 0, 320], [0, 585, 240], [0, 0, 1]])
    for sequence in ("seq-01", "seq-02"):
        folder = root / base / "chess" / sequence
        for index in range(2):
            image, depth = seen(index, intrinsic, (480, 640))
            stem = f"frame-{index:06d}"
            save_image(folder / f"{stem}.color.png", image)
            steps = np.rint(1000 * depth).astype(np.uint16)
            steps[:3] = 65535  # without depth
            save_image(folder / f"{stem}.depth.png", steps)
            write(folder / f"{stem}.pose.txt", rows(to_c2w(POSES[index])).replace(" ", "\t "))
    write(root / base / "chess/TrainSplit.txt", "sequence1\n")
    write(root / base / "chess/TestSplit.txt", "sequence2\n")


def nrgbd(root: Path) -> None:
    folder = root / "breakfast_room"
    intrinsic = np.array([[90.0, 0, 40], [0, 90, 30], [0, 0, 1]])
    poses = []
    for index in range(4):
        image, depth = seen(index, intrinsic)
        save_image(folder / f"images/img{9 + index}.png", image)
        millimetres(folder / f"depth/depth{9 + index}.png", depth)
        pose = to_c2w(POSES[index])
        pose[:3, :3] = pose[:3, :3] @ FLIP
        poses.append(rows(pose if index != 1 else np.full((4, 4), np.nan)))
    write(folder / "poses.txt", rows(np.eye(4)) * 9 + "".join(poses))
    write(folder / "focal.txt", "90.0\n")


def scannet(root: Path) -> None:
    folder = root / "scans/scene0000_00"
    whole = np.eye(4)
    whole[:3, :3] = CENTRED
    for index in range(4):
        image, depth = seen(index)
        path = folder / f"color/{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path, quality=98, subsampling=0)
        millimetres(folder / f"depth/{index}.png", depth)
        write(folder / f"pose/{index}.txt", rows(to_c2w(POSES[index]) if index != 2 else np.full((4, 4), -np.inf)))
    write(folder / "intrinsic/intrinsic_color.txt", rows(whole))
    write(folder / "intrinsic/intrinsic_depth.txt", rows(whole))


def _colmap(folder: Path, camera: pycolmap.Camera, names: list[str]) -> None:
    model = pycolmap.Reconstruction()
    model.add_camera_with_trivial_rig(camera)
    for index, name in enumerate(names):
        pose = pycolmap.Rigid3d(pycolmap.Rotation3d(POSES[index][:, :3]), POSES[index][:, 3])
        image = pycolmap.Image(name=name, camera_id=1, image_id=index + 1)
        model.add_image_with_trivial_frame(image, pose)
    folder.mkdir(parents=True, exist_ok=True)
    model.write_text(str(folder))


def camera(model: str, extra: list[float]) -> pycolmap.Camera:
    params = [K[0, 0], K[1, 1], K[0, 2], K[1, 2], *extra]
    return pycolmap.Camera(model=model, width=SIZE[1], height=SIZE[0], params=params, camera_id=1)


def scannetpp(root: Path) -> None:
    folder = root / "data/09c1414f1b"
    fisheye = camera("OPENCV_FISHEYE", [0.04, -0.01, 0, 0])
    for index in range(2):
        image, depth = seen_by(fisheye, POSES[index])
        save_image(folder / f"dslr/resized_images/DSC0{index}.JPG", image)
        millimetres(folder / f"dslr/render_depth/DSC0{index}.png", depth)
        image, depth = seen(index)
        save_image(folder / f"iphone/rgb/frame_00000{index}.jpg", image)
        millimetres(folder / f"iphone/depth/frame_00000{index}.png", depth)
    _colmap(folder / "dslr/colmap", fisheye, ["DSC00.JPG", "DSC01.JPG"])
    _colmap(folder / "iphone/colmap", camera("OPENCV", [0, 0, 0, 0]), ["frame_000000.jpg", "frame_000001.jpg"])


def bonn(root: Path) -> None:
    folder = root / "rgbd_bonn_balloon"
    intrinsic = np.array([[542.822841, 0, 316.09352], [0, 542.57687, 238.256098], [0, 0, 1]])
    lists: dict[str, list[str]] = {"rgb": [], "depth": [], "groundtruth": []}
    for index in range(2):
        image, depth = seen(index, intrinsic, (480, 640))
        time = 1548266469.88633 + index / 30
        save_image(folder / f"rgb/{time:.5f}.png", image)
        millimetres(folder / f"depth/{time + 0.01:.5f}.png", depth, 5000)
        pose = to_c2w(POSES[index])
        lists["rgb"].append(f"{time:.5f} rgb/{time:.5f}.png")
        lists["depth"].append(f"{time + 0.01:.5f} depth/{time + 0.01:.5f}.png")
        numbers = " ".join(f"{n:.9f}" for n in [*pose[:3, 3], *quaternion_of(pose[:3, :3])])
        lists["groundtruth"].append(f"{time + 0.002:.5f} {numbers}")
    for name, lines in lists.items():
        write(folder / f"{name}.txt", "# list\n" + "\n".join(lines) + "\n")


def hiroom(root: Path, base: str = "") -> None:
    folder = root / base / "20241230/828805/cam_sampled_06"
    for index in range(2):
        image, depth = seen(index)
        save_image(folder / f"image/{index:04d}.jpg", image)
        save_image(folder / f"depth/{index:04d}.png", np.rint(depth / 100 * 65535).astype(np.uint16))
        mask = np.zeros(SIZE, np.uint8)
        mask[:, :5] = 255
        save_image(folder / f"aliasing_mask/{index:04d}.png", mask)
        (folder / "pose").mkdir(exist_ok=True)
        np.save(folder / f"pose/{index:04d}.npy", np.vstack([POSES[index], [0, 0, 0, 1]]))
    np.save(folder / "cam_K.npy", K)


def eth3d(root: Path, undistorted: bool = True) -> None:
    folder = root / "courtyard"
    lens = camera("THIN_PRISM_FISHEYE", [0.02, -0.01, 0.001, 0.001, 0, 0, 0.001, 0.001])
    names = [f"DSC_000{index}.JPG" for index in range(2)]
    for index, name in enumerate(names):
        image, depth = seen_by(lens, POSES[index])
        save_image(folder / "images/dslr_images" / name, image)
        depth[0] = np.inf
        write(folder / "ground_truth_depth/dslr_images" / name, depth.astype("<f4").tobytes())
        mask = np.zeros(SIZE, np.uint8)
        mask[:, :10] = 1
        save_image(folder / f"masks_for_images/dslr_images/{Path(name).stem}.png", mask)
        if undistorted:
            save_image(folder / "images/dslr_images_undistorted" / name, seen(index)[0])
    _colmap(folder / "dslr_calibration_jpg", lens, [f"dslr_images/{name}" for name in names])
    if undistorted:
        pinhole = camera("PINHOLE", [])
        _colmap(folder / "dslr_calibration_undistorted", pinhole, [f"dslr_images_undistorted/{name}" for name in names])


def _cam(path: Path, index: int, intrinsic: np.ndarray) -> None:
    pose = np.vstack([POSES[index], [0, 0, 0, 1]])
    pose[:3, 3] *= 1000
    write(path, f"extrinsic\n{rows(pose)}\nintrinsic\n{rows(intrinsic)}\n425.0 2.5\n")


def pfm(depth: np.ndarray) -> bytes:
    return f"Pf\n{depth.shape[1]} {depth.shape[0]}\n-1.000000\n".encode() + depth[::-1].astype("<f4").tobytes()


def dtu(root: Path, layout: str) -> None:
    """Layouts of MVSNet: test (scan1/images), rectified (Rectified/scan1) and train (Rectified/scan1_train)."""
    for index in range(2):
        image, depth = seen(index)
        if layout == "test":
            save_image(root / f"scan1/images/{index:08d}.jpg", image)
            _cam(root / f"scan1/cams/{index:08d}_cam.txt", index, CENTRED)
        elif layout == "dtu64":
            save_image(root / f"scan105/image/{index:06d}.png", image)
            _cam(root / f"Cameras/{index:08d}_cam.txt", index, CENTRED)
        else:
            train = layout == "train"
            scan = "scan1_train" if train else "scan1"
            for light in range(7):
                save_image(root / f"Rectified/{scan}/rect_{index + 1:03d}_{light}_r5000.png", image)
            quarter = np.diag([0.25, 0.25, 1]) @ CENTRED
            cameras = root / "Cameras" / ("train" if train else "")
            _cam(cameras / f"{index:08d}_cam.txt", index, quarter if train else CENTRED)
            depths = "Depths" if train else "Depths_raw"
            write(root / f"{depths}/{scan}/depth_map_{index:04d}.pfm", pfm(1000 * depth))
            save_image(root / f"{depths}/{scan}/depth_visual_{index:04d}.png", image[..., 0])


def sintel(root: Path) -> None:
    for index in range(2):
        image, depth = seen(index)
        stem = f"frame_{index + 1:04d}"
        for kind in ("final", "clean"):
            save_image(root / f"training/{kind}/alley_1/{stem}.png", image)
        tag = struct.pack("<f", 202021.25)
        size = struct.pack("<ii", SIZE[1], SIZE[0])
        write(root / f"training/depth/alley_1/{stem}.dpt", tag + size + depth.astype("<f4").tobytes())
        numbers = CENTRED.astype("<f8").tobytes() + POSES[index].astype("<f8").tobytes()
        write(root / f"training/camdata_left/alley_1/{stem}.cam", tag + numbers)


def co3d(root: Path, at: str = "annotations") -> None:
    frames = []
    for index in range(4):
        image, depth = seen(index)
        name = f"apple/110_13051_23361/images/frame{index + 1:06d}.jpg"
        save_image(root / name, image)
        sequence = root / "apple/110_13051_23361"
        bits = depth.astype(np.float16).view(np.uint16)
        save_image(sequence / f"depths/frame{index + 1:06d}.jpg.geometric.png", bits)
        mask = np.full(SIZE, 255, np.uint8)
        mask[:, :20] = 0
        save_image(sequence / f"depth_masks/frame{index + 1:06d}.png", mask)
        frames.append({"filepath": name, "extri": POSES[index].tolist(), "intri": K.tolist()})
    frames[3]["extri"][0][0] = float("nan")
    write(root / at / "apple_train.jgz", gzip.compress(json.dumps({"110_13051_23361": frames}).encode()))


def da3_bench(root: Path) -> None:
    eth3d(root / "eth3d", undistorted=False)
    seven_scenes(root / "7scenes", "7Scenes")
    hiroom(root / "hiroom", "data")
    dtu(root / "dtu", "rectified")
    dtu(root / "dtu64", "dtu64")
    folder = root / "scannetpp/09c1414f1b/merge_dslr_iphone"
    names = ["iphone/frame_000000.jpg", "dslr/DSC0.JPG", "iphone/frame_000010.jpg"]
    for index, name in enumerate(names):
        image, depth = seen(index)
        save_image(folder / "images" / name, image)
        millimetres(folder / f"render_depth/{Path(name).stem}.png", depth)
    _colmap(folder / "colmap/sparse_render_rgb", camera("OPENCV", [0, 0, 0, 0]), names)
