"""Render a `SceneSpec` with Mitsuba: sRGB images and z-depth of the same pixels.

All objects are one mesh with one BSDF that reads an atlas, and the scene's bounding box is pinned: Mitsuba's
just-in-time kernels then hold nothing of a particular scene but the kinds of its lamps, and are compiled once instead
of per scene.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from subspace3d.choices import Variant
from subspace3d.geometry import intrinsic_matrix, unproject
from subspace3d.mitsuba_variant import load_mitsuba
from subspace3d.scenes.geometry.mesh import Mesh
from subspace3d.scenes.geometry.shapes import SceneMeshes
from subspace3d.scenes.lights import LampSpec, environment_image
from subspace3d.scenes.materials.atlas import Surface, bake_atlas
from subspace3d.scenes.sampler import SceneSpec

MAX_BOUNCES = 12
_LANES = 1 << 22  # samples traced in one launch: bounds memory
_HALF_EXTENT = 16.0  # of the pinned bounding box: holds every lamp
_FIREFLY = 6.0  # greatest radiance one sample may carry; surfaces lie around 1


class SceneRenderer:
    """A scene loaded into Mitsuba.

    Args:
        spec (SceneSpec): materials, cameras and lighting.
        meshes (SceneMeshes): its geometry, built.
        resolution (int): width of the images in pixels; their height follows from the cameras' aspect.
        variant (str): cuda, llvm or scalar, known to work here.
        library (Path | None): folder of the texture maps that materials name.
        pictures (dict): atlas cell -> linear RGB [h, w, 3], shown instead of that cell's own colours.
    """

    def __init__(
        self,
        spec: SceneSpec,
        meshes: SceneMeshes,
        resolution: int,
        variant: Variant,
        library: Path | None = None,
        pictures: Mapping[int, np.ndarray] | None = None,
    ) -> None:
        self.spec, self.variant = spec, variant
        self.width, self.height = resolution, round(resolution * spec.camera.aspect)
        self.extrinsics = np.array(spec.camera.extrinsics_w2c)
        matrix = intrinsic_matrix(spec.camera.hfov, self.width, self.height)
        self.intrinsics = np.stack([matrix] * len(self.extrinsics))
        self._mi = load_mitsuba(variant)
        gc.collect()  # frees the ids of an earlier scene's objects, which are constants in the kernels
        cell_size = next((size for size in (128, 256) if resolution <= size), 512)
        atlas = bake_atlas(spec.texture, cell_size, meshes.cells, library, pictures)
        self._scene, self._surfaces = _load(self._mi, spec, meshes, atlas)

    def depths(self) -> np.ndarray:
        """z-depth float32 [S, H, W] of the first surface on each pixel's centre ray, glass included; 0: none.

        Lamps are no surfaces.
        """
        return self._trace_centres(self._surfaces)

    def points(self, depths: np.ndarray) -> np.ndarray:
        """World points float64 [S, H, W, 3] of the pixel centres at z-depth ``depths`` [S, H, W]."""
        return unproject(depths, self.extrinsics, self.intrinsics)

    def exposed(self) -> np.ndarray:
        """Bool [S, H, W]: pixels whose centre ray meets a surface that does not shine; the exposure follows them."""
        return self._trace_centres(self._scene, dull_only=True) > 0

    def _trace_centres(self, scene: Any, dull_only: bool = False) -> np.ndarray:
        """z-depth float32 [S, H, W] on the centre rays; 0: no surface, or with ``dull_only`` one that shines."""
        trace = self._trace_scalar if self.variant == "scalar" else self._trace_vector
        return np.nan_to_num(trace(scene, dull_only), nan=0.0, posinf=0.0)

    def radiance(self, spp: int, seed: int) -> np.ndarray:
        """Linear RGB and alpha, float32 [S, H, W, 4], by path tracing with ``spp`` samples in every pixel's square.

        Alpha is 1 where the environment is the background; before white it is the share of samples that hit a surface,
        and RGB is that share's light.
        """
        image = self._radiance_scalar(spp, seed) if self.variant == "scalar" else self._radiance_vector(spp, seed)
        return np.nan_to_num(image, nan=0.0, posinf=_FIREFLY, neginf=0.0)

    def _integrator(self) -> Any:
        hidden = self.spec.lighting.background == "white"
        return self._mi.load_dict({"type": "path", "max_depth": MAX_BOUNCES, "hide_emitters": hidden})

    def _radiance_vector(self, spp: int, seed: int) -> np.ndarray:
        import drjit as dr

        mi = self._mi
        pixels = len(self.extrinsics) * self.height * self.width
        integrator = self._integrator()
        sampler = mi.load_dict({"type": "multijitter", "sample_count": spp})
        spp = int(sampler.sample_count())  # a prime count is rounded up to a grid
        sampler.set_samples_per_wavefront(spp)
        step = max(1, _LANES // spp)
        result = np.empty((pixels, 4), np.float32)
        for chunk, start in enumerate(range(0, pixels, step)):
            count = min(step, pixels - start)
            sampler.seed((seed + chunk) % 2**32, count * spp)
            pixel = dr.arange(mi.UInt32, count * spp) // dr.opaque(mi.UInt32, spp) + dr.opaque(mi.UInt32, start)
            ray, _ = self._rays(pixel, sampler.next_2d())
            color, valid, _ = integrator.sample(self._scene, sampler, ray)
            color = dr.minimum(color, _FIREFLY)
            alpha = dr.select(valid, mi.Float(1), mi.Float(0))
            dr.eval(color, alpha)  # all channels from one launch
            for channel, values in enumerate((color[0], color[1], color[2], alpha)):
                result[start : start + count, channel] = np.array(dr.block_sum(values, spp)) / spp
        return result.reshape(len(self.extrinsics), self.height, self.width, 4)

    def _trace_vector(self, scene: Any, dull_only: bool) -> np.ndarray:
        import drjit as dr

        mi = self._mi
        pixels = len(self.extrinsics) * self.height * self.width
        result = np.empty(pixels, np.float32)
        for start in range(0, pixels, _LANES):
            count = min(_LANES, pixels - start)
            pixel = dr.arange(mi.UInt32, count) + dr.opaque(mi.UInt32, start)
            ray, cosine = self._rays(pixel, mi.Point2f(0.5, 0.5))
            hit = scene.ray_intersect_preliminary(ray)
            surface = hit.is_valid() & ~hit.shape.is_emitter() if dull_only else hit.is_valid()
            result[start : start + count] = np.array(dr.select(surface, hit.t * cosine, 0))
        return result.reshape(len(self.extrinsics), self.height, self.width)

    def _rays(self, pixel: Any, offset: Any) -> tuple[Any, Any]:
        """Rays through the point ``offset`` in [0, 1]^2 of each pixel, and z-depth per unit of ray length.

        Pixels count through the rows of the first view, then the second. Cameras are read from arrays: as constants
        they would make every scene's kernel a new one.
        """
        import drjit as dr

        mi, area = self._mi, self.height * self.width
        view = pixel // area
        row = (pixel - view * area) // self.width
        column = pixel - view * area - row * self.width
        rotation, translation = self.extrinsics[:, :, :3], self.extrinsics[:, :, 3]
        origin = -np.einsum("sij,si->sj", rotation, translation)

        def of_view(values: np.ndarray) -> Any:
            return dr.gather(mi.Vector3f, mi.Vector3f(np.ascontiguousarray(values.T, np.float32)), view)

        focal = dr.gather(mi.Float, mi.Float(self.intrinsics[:, 0, 0].astype(np.float32)), view)
        x = (mi.Float(column) + offset.x - self.width / 2) / focal
        y = (mi.Float(row) + offset.y - self.height / 2) / focal
        right, down, forward = (of_view(rotation[:, axis]) for axis in range(3))
        direction = right * x + down * y + forward
        length = dr.norm(direction)
        return mi.Ray3f(mi.Point3f(of_view(origin)), direction / length), 1 / length

    def _radiance_scalar(self, spp: int, seed: int) -> np.ndarray:
        mi, integrator = self._mi, self._integrator()
        film = {"type": "hdrfilm", "width": self.width, "height": self.height, "pixel_format": "rgba"}
        film["rfilter"] = {"type": "box"}
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

    def _trace_scalar(self, scene: Any, dull_only: bool) -> np.ndarray:
        mi = self._mi
        column, row = np.meshgrid(np.arange(self.width) + 0.5, np.arange(self.height) + 0.5)
        result = np.zeros((len(self.extrinsics), self.height, self.width), np.float32)
        for index, (extrinsic, intrinsic) in enumerate(zip(self.extrinsics, self.intrinsics)):
            pixel = np.stack([column.ravel(), row.ravel(), np.ones(column.size)])
            inside = np.linalg.solve(intrinsic, pixel)
            length = np.linalg.norm(inside, axis=0)
            directions = (extrinsic[:, :3].T @ (inside / length)).T.tolist()
            origin = mi.Point3f((-extrinsic[:, :3].T @ extrinsic[:, 3]).tolist())
            depth = result[index].reshape(-1)
            for number, direction in enumerate(directions):
                hit = scene.ray_intersect_preliminary(mi.Ray3f(origin, mi.Vector3f(direction)))
                if hit.is_valid() and not (dull_only and hit.shape.is_emitter()):
                    depth[number] = hit.t / length[number]
        return result


def tone_map(radiance: np.ndarray, exposed: np.ndarray) -> np.ndarray:
    """sRGB((L - low) / (high - low)) in 8 bits over white, with one exposure for all views of a scene.

    low and high are the means over views of the 1st and 99th percentile of the radiance where ``exposed``.

    Args:
        radiance (float32 [S, H, W, 4]): linear RGB, times the alpha that follows it.
        exposed (bool [S, H, W]): the pixels that matter, surfaces that do not shine.

    Returns:
        uint8 [S, H, W, 3]: sRGB.
    """
    color, alpha = radiance[..., :3], radiance[..., 3:]
    percentiles = [np.percentile(view[mask], (1, 99)) for view, mask in zip(color, exposed) if mask.any()]
    low, high = np.mean(percentiles, axis=0) if percentiles else (0.0, 1.0)
    linear = np.clip((color - alpha * low) / max(high - low, 1e-6), 0, alpha) + 1 - alpha
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 1e-9) ** (1 / 2.4) - 0.055)
    return np.rint(encoded * 255).astype(np.uint8)


def _load(mi: ModuleType, spec: SceneSpec, meshes: SceneMeshes, atlas: Surface) -> tuple[Any, Any]:
    """The scene that is path-traced, and the one of its surfaces alone that depth is taken from."""
    objects = _to_mitsuba(mi, meshes.objects, _material(mi, spec, atlas))
    surfaces: dict[str, Any] = {"type": "scene", "objects": objects}
    if meshes.shining is not None:
        radiance = {"type": "rgb", "value": spec.lighting.stick_radiance}
        emitter = mi.load_dict({"type": "area", "radiance": radiance})
        surfaces["shining"] = _to_mitsuba(mi, meshes.shining, mi.load_dict({"type": "diffuse"}), emitter)
    scene = dict(surfaces)
    environment = mi.Bitmap(environment_image(spec.lighting))
    scene["environment"] = {"type": "envmap", "bitmap": environment, "to_world": _z_up(mi)}
    for index, lamp in enumerate(spec.lighting.lamps):
        if lamp.kind != "glow":
            scene[f"lamp{index}"] = _lamp(mi, lamp)
    # in parallel, the objects' ids, which are constants in the kernels, would differ from load to load
    return mi.load_dict(scene, parallel=False), mi.load_dict(surfaces, parallel=False)


def _material(mi: ModuleType, spec: SceneSpec, atlas: Surface) -> Any:
    # a Mitsuba shading frame has its second axis against the rows of an image
    normal = (atlas.normal * np.array([1, -1, 1], np.float32) + 1) / 2
    maps = {"metallic": atlas.metallic, "roughness": atlas.roughness, "spec_trans": atlas.transmission}
    principled = {
        "type": "principled",
        "eta": spec.texture.ior,
        "base_color": _bitmap(mi, atlas.color),
        **{name: _bitmap(mi, values[..., None]) for name, values in maps.items()},
    }
    return mi.load_dict({"type": "normalmap", "normalmap": _bitmap(mi, normal), "bsdf": principled})


def _bitmap(mi: ModuleType, image: np.ndarray) -> dict[str, Any]:
    bitmap = mi.Bitmap(np.ascontiguousarray(image, np.float32))
    return {"type": "bitmap", "bitmap": bitmap, "raw": True, "filter_type": "bilinear", "wrap_mode": "clamp"}


def _z_up(mi: ModuleType) -> Any:
    return mi.ScalarTransform4f().rotate([1, 0, 0], 90)


def _to_mitsuba(mi: ModuleType, mesh: Mesh, bsdf: Any, emitter: Any = None) -> Any:
    corner = np.full((1, 3), _HALF_EXTENT)
    last = len(mesh.vertices)
    vertices = np.concatenate([mesh.vertices, -corner, corner])
    normals = np.concatenate([mesh.normals, np.tile([[0.0, 0.0, 1.0]], (2, 1))])
    uv = np.concatenate([mesh.uv, np.zeros((2, 2))])
    # a triangle without area spans the bounding box
    faces = np.concatenate([mesh.faces, [[last, last + 1, last]]])
    properties = mi.Properties()
    properties["bsdf"] = bsdf
    if emitter is not None:
        properties["emitter"] = emitter
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
    pose = mi.ScalarTransform4f().look_at(origin=position.tolist(), target=lamp.target, up=up)
    value = {"type": "rgb", "value": (irradiance * distance**2 / lamp.size**2).tolist()}
    return {
        "type": "rectangle",
        "to_world": pose @ mi.ScalarTransform4f().scale(lamp.size / 2),
        "emitter": {"type": "area", "radiance": value},
    }
