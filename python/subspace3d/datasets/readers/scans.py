"""THuman2.1 and 2K2K: human scans, rendered from 96 azimuths around them.

THuman2.1: ROOT/model/0000/0000.obj with material0.mtl and material0.jpeg beside it (the folder ``model`` may be ROOT
itself). 2K2K: <id>/<id>.ply with vertex colours anywhere below ROOT; folders ``train`` and ``test`` give the split.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from subspace3d.choices import Variant
from subspace3d.datasets.readers.config import ReaderConfig
from subspace3d.datasets.readers.folders import some
from subspace3d.datasets.readers.mesh_files import ColouredMesh, read_obj, read_ply
from subspace3d.datasets.readers.source import Content, Report, SourceScene
from subspace3d.files import walk
from subspace3d.formats.scene import Frame

_DISTANCE = {"thuman": 1.1, "2k2k": 1.5}  # of the camera from the centre of the scan, in its unit
_TEST_SCANS = 100  # of THuman2.1: the last hundred by id
_THUMAN_SCANS = 2445


def find_thuman(config: ReaderConfig, root: Path, report: Report) -> list[SourceScene]:
    """Scans by id; those from 2345 on are the test split."""
    base = root / "model" if (root / "model").is_dir() else root
    scenes = []
    for folder in sorted(base.iterdir()):
        if not (folder.is_dir() and re.fullmatch(r"\d{4}", folder.name)):
            continue
        file = folder / f"{folder.name}.obj"
        if not file.is_file():
            report(f"{folder}: no {file.name} in it")
            continue
        split = "test" if int(folder.name) >= _THUMAN_SCANS - _TEST_SCANS else "train"
        scenes.append(SourceScene(folder.name, split, partial(_read, file, read_obj)))
    return some(scenes, "THuman2.1 scans, model/0000/0000.obj and so on", root, report)


def find_2k2k(config: ReaderConfig, root: Path, report: Report) -> list[SourceScene]:
    """Scans by id; the split is the name of a folder train or test above them, else test."""
    scenes = []
    for file in (folder / name for folder, _, names in walk(root) for name in names if name.endswith(".ply")):
        if file.stem != file.parent.name or not re.fullmatch(r"\d{5}", file.stem):
            report(f"{file}: not a scan, whose file is called <id>/<id>.ply with five digits")
            continue
        above = [part for part in file.relative_to(root).parts if part in ("train", "test")]
        scenes.append(SourceScene(file.stem, above[-1] if above else "test", partial(_read, file, read_ply)))
    return some(scenes, "2K2K scans, 00003/00003.ply and so on", root, report)


def _read(file: Path, read_mesh: Callable[[Path], ColouredMesh], config: ReaderConfig, report: Report) -> Content:
    from subspace3d.datasets.readers.mesh_render import circle_cameras, grey_level

    distance, level = _DISTANCE[config.from_], grey_level(file.stem)
    mesh = _place(read_mesh(file), config.scan_scale, distance, file)
    extrinsics = circle_cameras(config.scan_views, distance)
    provenance = {
        "source": {"kind": config.from_, "scan": file.stem},
        "distance": distance,
        "environment": level,
        "scale": config.scan_scale,
        "spp": config.spp,
    }
    return Content(_render(mesh, level, extrinsics, config, file.stem), provenance, unit="scan")


def _place(mesh: ColouredMesh, scale: float, distance: float, file: Path) -> ColouredMesh:
    """y up to z up, the bounding box centred on the origin, times ``scale``.

    Raises:
        ValueError: the scan is so large or small beside the camera's distance that its unit must be another.
    """
    from subspace3d.datasets.readers.mesh_render import FOCAL

    def upright(vectors: np.ndarray) -> np.ndarray:
        return np.stack([vectors[:, 0], -vectors[:, 2], vectors[:, 1]], axis=1)

    vertices = upright(mesh.vertices)
    low, high = vertices.min(axis=0), vertices.max(axis=0)
    vertices = (vertices - (low + high) / 2) * scale
    height, visible = float((high - low)[2] * scale), distance / FOCAL
    if not visible / 5 <= height <= 2 * visible:
        raise ValueError(
            f"{file}: the scan is {height:.3g} units tall, but the camera at distance {distance} sees {visible:.3g}; "
            f"its unit must be another: try --scan-scale {scale * 0.9 * visible / max(height, 1e-9):.3g}"
        )
    return ColouredMesh(vertices, mesh.faces, upright(mesh.normals), mesh.colors, mesh.uv, mesh.texture)


def _render(
    mesh: ColouredMesh, level: float, extrinsics: np.ndarray, config: ReaderConfig, name: str
) -> Iterator[Frame]:
    from subspace3d.datasets.readers.mesh_render import MeshRenderer, develop, scan_intrinsic
    from subspace3d.mitsuba_variant import choose_variant

    variant: Variant = choose_variant(config.variant)
    renderer = MeshRenderer(mesh, level, config.resolution, variant)
    views = [renderer.render(extrinsic, config.spp, seed) for seed, extrinsic in enumerate(extrinsics)]
    images = develop([radiance for radiance, _ in views], [depth for _, depth in views])
    for image, (_, depth), extrinsic in zip(images, views, extrinsics):
        yield Frame(image, scan_intrinsic(config.resolution), extrinsic, depth)
