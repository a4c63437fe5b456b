"""Render a `SceneSpec` with Mitsuba: sRGB images and z-depth of the same pixels.

All parts are one mesh with one BSDF that reads an atlas, and the scene's bounding box is pinned: Mitsuba's just-in-time
kernels then hold nothing of a particular scene but the kinds of its lamps, and are compiled once instead of per scene.
"""

from __future__ import annotations

import gc
from types import ModuleType
from typing import Any

import numpy as np

from subspace3d.configs import Variant
from subspace3d.scenes.cameras import intrinsic_matrix
from subspace3d.scenes.lights import LampSpec, environment_image
from subspace3d.scenes.materials import GROUND_CELL, PALETTE, WALL_CELL, bake_atlas
from subspace3d.scenes.sampler import SceneSpec
from subspace3d.scenes.shapes import Mesh, build_mesh
from subspace3d.scenes.variant import load_mitsuba

MAX_BOUNCES = 12
_LANES = 1 << 22  # samples traced in one launch: bounds memory
_HALF_EXTENT = 16.0  # of the pinned bounding box: holds every lamp
_FIREFLY = 30.0  # greatest radiance one sample may carry; surfaces lie around 1


class SceneRenderer:
    """A scene loaded into Mitsuba.

    Args:
        spec (SceneSpec): what to render.
        resolution (int): width and height of the images in pixels.
        variant (str): cuda, llvm or scalar, known to work here.
    """

    def __init__(self, spec: SceneSpec, resolution: int, variant: Variant) -> None:
        self.spec, self.resolution, self.variant = spec, resolution, variant
        self.extrinsics = np.array(spec.camera.extrinsics_w2c)
        self.intrinsics = np.stack([intrinsic_matrix(spec.camera.hfov, resolution)] * len(self.extrinsics))
        self._mi = load_mitsuba(variant)
        gc.collect()  # frees the ids of an earlier scene's objects, which are constants in the kernels
        self._scene = _load(self._mi, spec, resolution)

    def depths(self) -> np.ndarray:
        """z-depth float32 [S, H, W] of the first surface on each pixel's centre ray, glass included; 0: none."""
        depths = self._depths_scalar() if self.variant == "scalar" else self._depths_vector()
        return np.nan_to_num(depths, nan=0.0, posinf=0.0)

    def radiance(self, spp: int, seed: int) -> np.ndarray:
        """Linear RGB float32 [S, H, W, 3] by path tracing with ``spp`` samples in every pixel's square."""
        image = self._radiance_scalar(spp, seed) if self.variant == "scalar" else self._radiance_vector(spp, seed)
        return np.nan_to_num(image, nan=0.0, posinf=_FIREFLY, neginf=0.0)

    def _radiance_vector(self, spp: int, seed: int) -> np.ndarray:
        import drjit as dr

        mi = self._mi
        pixels = len(self.extrinsics) * self.resolution**2
        integrator = mi.load_dict({"type": "path", "max_depth": MAX_BOUNCES})
        sampler = mi.load_dict({"type": "multijitter", "sample_count": spp})
        spp = int(sampler.sample_count())  # a prime count is rounded up to a grid
        sampler.set_samples_per_wavefront(spp)
        step = max(1, _LANES // spp)
        result = np.empty((pixels, 3), np.float32)
        for chunk, start in enumerate(range(0, pixels, step)):
            count = min(step, pixels - start)
            sampler.seed((seed + chunk) % 2**32, count * spp)
            pixel = dr.arange(mi.UInt32, count * spp) // dr.opaque(mi.UInt32, spp) + dr.opaque(mi.UInt32, start)
            ray, _ = self._rays(pixel, sampler.next_2d())
            color, _, _ = integrator.sample(self._scene, sampler, ray)
            color = dr.minimum(color, _FIREFLY)
            dr.eval(color)  # all three channels from one launch
            for channel in range(3):
                result[start : start + count, channel] = np.array(dr.block_sum(color[channel], spp)) / spp
        return result.reshape(len(self.extrinsics), self.resolution, self.resolution, 3)

    def _depths_vector(self) -> np.ndarray:
        import drjit as dr

        mi = self._mi
        pixels = len(self.extrinsics) * self.resolution**2
        result = np.empty(pixels, np.float32)
        for start in range(0, pixels, _LANES):
            count = min(_LANES, pixels - start)
            pixel = dr.arange(mi.UInt32, count) + dr.opaque(mi.UInt32, start)
            ray, cosine = self._rays(pixel, mi.Point2f(0.5, 0.5))
            hit = self._scene.ray_intersect(ray)
            surface = hit.is_valid() & ~hit.shape.is_emitter()
            result[start : start + count] = np.array(dr.select(surface, hit.t * cosine, 0))
        return result.reshape(len(self.extrinsics), self.resolution, self.resolution)

    def _rays(self, pixel: Any, offset: Any) -> tuple[Any, Any]:
        """Rays through the point ``offset`` in [0, 1]^2 of each pixel, and z-depth per unit of ray length.

        Pixels count through the rows of the first view, then the second. Cameras are read from arrays: as constants
        they would make every scene's kernel a new one.
        """
        import drjit as dr

        mi, size = self._mi, self.resolution
        view = pixel // (size * size)
        row = (pixel - view * (size * size)) // size
        column = pixel - view * (size * size) - row * size
        rotation, translation = self.extrinsics[:, :, :3], self.extrinsics[:, :, 3]
        origin = -np.einsum("sij,si->sj", rotation, translation)

        def of_view(values: np.ndarray) -> Any:
            return dr.gather(mi.Vector3f, mi.Vector3f(np.ascontiguousarray(values.T, np.float32)), view)

        focal = dr.gather(mi.Float, mi.Float(self.intrinsics[:, 0, 0].astype(np.float32)), view)
        x = (mi.Float(column) + offset.x - size / 2) / focal
        y = (mi.Float(row) + offset.y - size / 2) / focal
        right, down, forward = (of_view(rotation[:, axis]) for axis in range(3))
        direction = right * x + down * y + forward
        length = dr.norm(direction)
        return mi.Ray3f(mi.Point3f(of_view(origin)), direction / length), 1 / length

    def _radiance_scalar(self, spp: int, seed: int) -> np.ndarray:
        mi, size = self._mi, self.resolution
        integrator = mi.load_dict({"type": "path", "max_depth": MAX_BOUNCES})
        film = {"type": "hdrfilm", "width": size, "height": size, "pixel_format": "rgb", "rfilter": {"type": "box"}}
        images = []
        for index, extrinsic in enumerate(self.extrinsics):
            pose = np.eye(4)
            # a Mitsuba camera has x to the left and y up
            pose[:3, :3] = extrinsic[:, :3].T * np.array([-1, -1, 1])
            pose[:3, 3] = -extrinsic[:, :3].T @ extrinsic[:, 3]
            sensor = {
                "type": "perspective",
                "fov": self.spec.camera.hfov,
                "fov_axis": "x",
                "near_clip": 1e-3,
                "to_world": mi.ScalarTransform4f(pose),
                "film": film,
                "sampler": {"type": "multijitter", "sample_count": spp},
            }
            view_seed = (seed + index) % 2**32
            images.append(mi.render(self._scene, sensor=mi.load_dict(sensor), integrator=integrator, seed=view_seed))
        return np.minimum(np.stack([np.array(image, dtype=np.float32) for image in images]), _FIREFLY)

    def _depths_scalar(self) -> np.ndarray:
        mi, size = self._mi, self.resolution
        column, row = np.meshgrid(np.arange(size) + 0.5, np.arange(size) + 0.5)
        result = np.zeros((len(self.extrinsics), size, size), np.float32)
        for index, (extrinsic, intrinsic) in enumerate(zip(self.extrinsics, self.intrinsics)):
            pixel = np.stack([column.ravel(), row.ravel(), np.ones(size * size)])
            inside = np.linalg.solve(intrinsic, pixel)
            length = np.linalg.norm(inside, axis=0)
            directions = (extrinsic[:, :3].T @ (inside / length)).T.tolist()
            origin = mi.Point3f((-extrinsic[:, :3].T @ extrinsic[:, 3]).tolist())
            depth = result[index].reshape(-1)
            for number, direction in enumerate(directions):
                hit = self._scene.ray_intersect(mi.Ray3f(origin, mi.Vector3f(direction)))
                if hit.is_valid() and not hit.shape.is_emitter():
                    depth[number] = hit.t / length[number]
        return result


def tone_map(radiance: np.ndarray, depths: np.ndarray) -> np.ndarray:
    """sRGB((L - low) / (high - low)) in 8 bits, with one exposure for all views of a scene.

    low and high are the means over views of the 1st and 99th percentile of the radiance on surfaces.

    Args:
        radiance (float32 [S, H, W, 3]): linear RGB.
        depths (float32 [S, H, W]): 0 where a view shows no surface.

    Returns:
        uint8 [S, H, W, 3]: sRGB.
    """
    percentiles = [
        np.percentile(view[depth > 0], (1, 99)) for view, depth in zip(radiance, depths) if (depth > 0).any()
    ]
    low, high = np.mean(percentiles, axis=0) if percentiles else (0.0, 1.0)
    linear = np.clip((radiance - low) / max(high - low, 1e-6), 0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 1e-9) ** (1 / 2.4) - 0.055)
    return np.rint(encoded * 255).astype(np.uint8)


def _load(mi: ModuleType, spec: SceneSpec, resolution: int) -> Any:
    mesh = build_mesh(spec.geometry)
    parts = sum(len(box.parts) for box in spec.geometry.boxes)
    used = set(range(min(parts, PALETTE))) | ({GROUND_CELL, WALL_CELL} if spec.geometry.ground else set())
    cell_size = next((size for size in (128, 256) if resolution <= size), 512)
    color, surface = bake_atlas(spec.texture, cell_size, used)
    names = ("metallic", "roughness", "spec_trans")
    textures: dict[str, Any] = {
        name: _bitmap(mi, np.ascontiguousarray(surface[..., index : index + 1]), "nearest")
        for index, name in enumerate(names)
    }
    bsdf = {"type": "principled", "base_color": _bitmap(mi, color, "bilinear"), **textures}
    scene: dict[str, Any] = {
        "type": "scene",
        "environment": {"type": "envmap", "bitmap": mi.Bitmap(environment_image(spec.lighting)), "to_world": _z_up(mi)},
        "objects": _to_mitsuba(mi, mesh, mi.load_dict(bsdf)),
    }
    for index, lamp in enumerate(spec.lighting.lamps):
        if lamp.kind != "glow":
            scene[f"lamp{index}"] = _lamp(mi, lamp)
    # in parallel, the objects' ids, which are constants in the kernels, would differ from load to load
    return mi.load_dict(scene, parallel=False)


def _bitmap(mi: ModuleType, image: np.ndarray, filter_type: str) -> dict[str, Any]:
    return {"type": "bitmap", "bitmap": mi.Bitmap(image), "raw": True, "filter_type": filter_type, "wrap_mode": "clamp"}


def _z_up(mi: ModuleType) -> Any:
    return mi.ScalarTransform4f().rotate([1, 0, 0], 90)


def _to_mitsuba(mi: ModuleType, mesh: Mesh, bsdf: Any) -> Any:
    corner = np.full((1, 3), _HALF_EXTENT)
    last = len(mesh.vertices)
    vertices = np.concatenate([mesh.vertices, -corner, corner])
    normals = np.concatenate([mesh.normals, np.tile([[0.0, 0.0, 1.0]], (2, 1))])
    uv = np.concatenate([mesh.uv, np.zeros((2, 2))])
    # a triangle without area spans the bounding box
    faces = np.concatenate([mesh.faces, [[last, last + 1, last]]])
    properties = mi.Properties()
    properties["bsdf"] = bsdf
    result = mi.Mesh(
        "objects", len(vertices), len(faces), props=properties, has_vertex_normals=True, has_vertex_texcoords=True
    )
    parameters = mi.traverse(result)
    parameters["vertex_positions"] = vertices.astype(np.float32).ravel()
    parameters["vertex_normals"] = normals.astype(np.float32).ravel()
    parameters["vertex_texcoords"] = uv.astype(np.float32).ravel()
    parameters["faces"] = faces.astype(np.uint32).ravel()
    parameters.update()
    return result


def _lamp(mi: ModuleType, lamp: LampSpec) -> dict[str, Any]:
    position = np.array(lamp.position)
    distance = float(np.linalg.norm(position))
    irradiance = lamp.energy * np.array(lamp.color)
    if lamp.kind == "sun":
        value = {"type": "rgb", "value": irradiance.tolist()}
        return {"type": "directional", "direction": (-position / distance).tolist(), "irradiance": value}
    if lamp.kind == "point":
        value = {"type": "rgb", "value": (irradiance * distance**2).tolist()}
        return {"type": "point", "position": position.tolist(), "intensity": value}
    up = [0.0, 0.0, 1.0] if abs(position[2]) < 0.9 * distance else [1.0, 0.0, 0.0]
    pose = mi.ScalarTransform4f().look_at(origin=position.tolist(), target=[0.0, 0.0, 0.0], up=up)
    value = {"type": "rgb", "value": (irradiance * distance**2 / lamp.size**2).tolist()}
    return {
        "type": "rectangle",
        "to_world": pose @ mi.ScalarTransform4f().scale(lamp.size / 2),
        "emitter": {"type": "area", "radiance": value},
    }
