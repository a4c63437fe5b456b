"""Scenes from NumPy arrays: write them, check them, train on them.

    python examples/your_own_scenes.py --out data/mine

What a scene needs: images, z-depth (0 where there is none), intrinsics in pixels, and camera-from-world extrinsics with
OpenCV axes (x right, y down, z forward). The pinhole camera's convention is that the centre of the top-left pixel is
(0.5, 0.5). Here the arrays are a plane with a checkerboard on it, seen from a few places.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import subspace3d as s3
from subspace3d.commands import validate
from subspace3d.formats.scene import write_scene
from subspace3d.geometry import camera_rays, intrinsic_matrix, invert_pose, look_at, pixel_centres


def view(position: np.ndarray, intrinsic: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image, depth and extrinsics of a camera above the plane z = 0 that looks at the origin."""
    extrinsic = look_at(position, np.zeros(3))
    directions = camera_rays(intrinsic, pixel_centres(size, size)) @ extrinsic[:, :3]  # to the world
    centre = invert_pose(extrinsic)[:, 3]
    # the ray has z = 1 in the camera, so its length is the depth
    depth = -centre[2] / directions[..., 2]
    points = centre + depth[..., None] * directions
    bright = (np.floor(2 * points[..., 0]) + np.floor(2 * points[..., 1])) % 2
    image = np.repeat((60 + 140 * bright).astype(np.uint8)[..., None], 3, axis=-1)
    return image, depth.astype(np.float32), extrinsic


def main(arguments: Sequence[str] | None = None) -> dict[str, object]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--scenes", type=int, default=2)
    parser.add_argument("--size", type=int, default=112, help="pixels a side")
    options = parser.parse_args(arguments)

    intrinsic = intrinsic_matrix(60, options.size)
    for number in range(options.scenes):
        angles = np.linspace(0, 0.8, 6) + number
        positions = [np.array([2 * np.cos(angle), 2 * np.sin(angle), 1.5]) for angle in angles]
        images, depths, extrinsics = zip(*(view(position, intrinsic, options.size) for position in positions))
        write_scene(
            options.out / f"scene_{number:02d}",
            np.stack(images),
            np.stack(depths),
            np.repeat(intrinsic[None], len(positions), axis=0),
            np.stack(extrinsics),
            provenance={"made by": "your_own_scenes.py"},
        )
    report = validate.run(validate.ValidateConfig(options.out))
    batch = s3.MultiViewDataset(options.out, options.size).batch(seed=0, step=0, frames=(2, 2), images_per_step=4)
    print({name: tuple(value.shape) for name, value in batch.items() if hasattr(value, "shape")})
    print(f"next: subspace3d finetune --scenes {options.out} --out runs/mine --method lora")
    return report


if __name__ == "__main__":
    main()
