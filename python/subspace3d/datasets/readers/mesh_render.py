"""Render a coloured mesh under an even grey environment, by the protocol of the human scans.

The camera circles the mesh at one height: lens 35 on a sensor of 32 (49.13 degrees), looking at the origin, on which
the mesh's bounding box is centred.
"""

from __future__ import annotations

import hashlib
from types import ModuleType
from typing import Any

import numpy as np

from subspace3d.choices import Variant
from subspace3d.datasets.readers.mesh_files import ColouredMesh
from subspace3d.geometry import look_at
from subspace3d.mitsuba_variant import load_mitsuba

FOCAL = 35 / 32  # focal length per image width
_BOUNCES = 6


def circle_cameras(views: int, distance: float) -> np.ndarray:
    """w2c [views, 3, 4]: azimuth 360 i / views degrees, elevation 0, z up, looking at the origin."""
    azimuth = 2 * np.pi * np.arange(views) / views
    positions = distance * np.stack([np.cos(azimuth), np.sin(azimuth), np.zeros(views)], axis=1)
    return np.stack([look_at(position, np.zeros(3)) for position in positions])


def scan_intrinsic(resolution: int) -> np.ndarray:
    focal = FOCAL * resolution
    return np.array([[focal, 0, resolution / 2], [0, focal, resolution / 2], [0, 0, 1]])


def grey_level(name: str) -> float:
    """0.55 + 0.2 md5(name)[:8] / 0xffffffff: the environment's level, one per scan."""
    return 0.55 + 0.2 * int(hashlib.md5(name.encode(), usedforsecurity=False).hexdigest()[:8], 16) / 0xFFFFFFFF


class MeshRenderer:
    """A mesh loaded into Mitsuba.

    Args:
        mesh (ColouredMesh): z up, around the origin.
        level (float): radiance of the environment.
        resolution (int): width and height of the images in pixels.
        variant (str): cuda, llvm or scalar, known to work here.
    """

    def __init__(self, mesh: ColouredMesh, level: float, resolution: int, variant: Variant) -> None:
        self._mi = load_mitsuba(variant)
        self.resolution = resolution
        environment = {"type": "constant", "radiance": {"type": "rgb", "value": [level] * 3}}
        self._scene = self._mi.load_dict(
            {"type": "scene", "environment": environment, "mesh": _to_mitsuba(self._mi, mesh)}
        )

    def render(self, extrinsic: np.ndarray, spp: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Linear RGB and coverage float32 [H, W, 4] of one view (colour times coverage), and its z-depth.

        Depth float32 [H, W] is taken on the centre ray of every pixel; 0 where there is no surface.

        Args:
            extrinsic (float [3, 4]): camera-from-world, OpenCV.
            spp (int): samples per pixel.
            seed (int): of the noise.
        """
        mi = self._mi
        path = mi.load_dict({"type": "path", "max_depth": _BOUNCES, "hide_emitters": True})
        sampler = {"type": "independent", "sample_count": spp}
        color = mi.render(self._scene, sensor=self._sensor(extrinsic, sampler, "rgba"), integrator=path, seed=seed)
        aov = mi.load_dict({"type": "aov", "aovs": "position:position"})
        # one sample without jitter lies in the middle of the pixel
        centre = {"type": "stratified", "sample_count": 1, "jitter": False}
        seen = mi.render(self._scene, sensor=self._sensor(extrinsic, centre, "rgba"), integrator=aov, spp=1)
        position = np.array(seen, dtype=np.float32)[..., -3:]
        depth = position @ extrinsic[2, :3].astype(np.float32) + np.float32(extrinsic[2, 3])
        hit = np.any(position != 0, axis=-1)
        return np.array(color, dtype=np.float32), np.where(hit, depth, np.float32(0))

    def _sensor(self, extrinsic: np.ndarray, sampler: dict[str, Any], pixel_format: str) -> Any:
        pose = np.eye(4)
        # a Mitsuba camera has x to the left and y up
        pose[:3, :3] = extrinsic[:, :3].T * np.array([-1, -1, 1])
        pose[:3, 3] = -extrinsic[:, :3].T @ extrinsic[:, 3]
        film = {
            "type": "hdrfilm",
            "width": self.resolution,
            "height": self.resolution,
            "pixel_format": pixel_format,
            "rfilter": {"type": "box"},
        }
        return self._mi.load_dict(
            {
                "type": "perspective",
                "fov": float(np.rad2deg(2 * np.arctan(0.5 / FOCAL))),
                "fov_axis": "x",
                "near_clip": 1e-3,
                "to_world": self._mi.ScalarTransform4f(pose),
                "film": film,
                "sampler": sampler,
            }
        )


def develop(radiance: list[np.ndarray], depths: list[np.ndarray]) -> list[np.ndarray]:
    """((L - low) / (high - low))^(1 / 2.2) over white in 8 bits, with one exposure for all views of a scan.

    low and high are the means over views of the 1st and 99th percentile of L where a pixel is covered by surface.

    Args:
        radiance (list of float32 [H, W, 4]): linear RGB times coverage, and coverage.
        depths (list of float32 [H, W]): 0 where a view shows no surface.

    Returns:
        list of uint8 [H, W, 3].
    """
    percentiles = []
    for view, depth in zip(radiance, depths):
        covered = (depth > 0) & (view[..., 3] > 0.95)
        if covered.any():
            percentiles.append(np.percentile(view[..., :3][covered], (1, 99)))
    low, high = np.mean(percentiles or [(0.0, 1.0)], axis=0).astype(np.float32)
    images = []
    for view in radiance:
        alpha = np.clip(view[..., 3:], 0, 1)
        color = view[..., :3] / np.maximum(alpha, 1e-6)
        encoded = np.clip((color - low) / max(high - low, np.float32(1e-6)), 0, 1) ** np.float32(1 / 2.2)
        images.append(np.rint(255 * (alpha * encoded + 1 - alpha)).astype(np.uint8))
    return images


def _to_mitsuba(mi: ModuleType, mesh: ColouredMesh) -> Any:
    properties = mi.Properties()
    if mesh.uv is not None and mesh.texture is not None:
        bitmap = mi.Bitmap(np.ascontiguousarray(mesh.texture))  # 8-bit bitmaps are taken as sRGB
        reflectance: dict[str, Any] = {"type": "bitmap", "bitmap": bitmap}
    else:
        reflectance = {"type": "mesh_attribute", "name": "vertex_color"}
    properties["bsdf"] = mi.load_dict({"type": "twosided", "bsdf": {"type": "diffuse", "reflectance": reflectance}})
    result = mi.Mesh(
        "scan",
        len(mesh.vertices),
        len(mesh.faces),
        props=properties,
        has_vertex_normals=True,
        has_vertex_texcoords=mesh.uv is not None,
    )
    if mesh.uv is None:
        assert mesh.colors is not None
        result.add_attribute("vertex_color", 3, _linear(mesh.colors).astype(np.float32).ravel())
    parameters = mi.traverse(result)
    parameters["vertex_positions"] = mesh.vertices.astype(np.float32).ravel()
    parameters["vertex_normals"] = mesh.normals.astype(np.float32).ravel()
    if mesh.uv is not None:
        # Mitsuba counts v from the bitmap's first row
        parameters["vertex_texcoords"] = (mesh.uv * [1, -1] + [0, 1]).astype(np.float32).ravel()
    parameters["faces"] = mesh.faces.astype(np.uint32).ravel()
    parameters.update()
    return result


def _linear(color: np.ndarray) -> np.ndarray:
    return np.where(color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4)
