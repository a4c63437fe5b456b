"""Read coloured triangle meshes: OBJ with one texture or vertex colours, PLY with vertex colours."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from subspace3d.files import inside
from subspace3d.formats.images import read_rgb
from subspace3d.reading import read_bytes

_LARGEST_MESH, _LARGEST_LIBRARY = 1 << 29, 1 << 20  # bytes

_PLY_TYPES = {
    "char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4", "float": "f4",
    "double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4",
    "float32": "f4", "float64": "f8",
}  # fmt: skip


@dataclass
class ColouredMesh:
    """Triangles with either a texture or vertex colours."""

    vertices: np.ndarray  # float64 [V, 3]
    faces: np.ndarray  # int64 [F, 3]
    normals: np.ndarray  # float64 [V, 3], unit length, mean of the faces around a vertex weighted by area
    colors: np.ndarray | None = None  # float32 [V, 3] in 0..1, sRGB
    uv: np.ndarray | None = None  # float64 [V, 2], v upwards
    texture: np.ndarray | None = None  # uint8 [h, w, 3], sRGB, first row on top


def read_obj(path: Path) -> ColouredMesh:
    """Read an OBJ file; its texture (``map_Kd`` of its material file) wins over colours behind the coordinates.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a broken file, several textures, or neither a texture nor vertex colours.
    """
    lines = read_bytes(path, _LARGEST_MESH).replace(b"\\\n", b" ").splitlines()
    vertices = _table(lines, b"v ", path, (3, 4, 6, 7))
    coordinates = _table(lines, b"vt ", path, (2, 3))
    corners = _corners([line[2:] for line in lines if line.startswith(b"f ")], len(vertices), len(coordinates), path)
    normals = vertex_normals(vertices[:, :3], corners[..., 0])
    texture = _texture(lines, path)
    if texture is not None and len(coordinates) and (corners[..., 1] >= 0).all():
        # a vertex on a seam of the texture becomes one vertex per texture coordinate
        pairs, index = np.unique(corners[..., 0] * len(coordinates) + corners[..., 1], return_inverse=True)
        vertex, coordinate = np.divmod(pairs, len(coordinates))
        faces, uv = index.reshape(-1, 3), coordinates[coordinate, :2]
        return ColouredMesh(vertices[vertex, :3], faces, normals[vertex], uv=uv, texture=texture)
    if vertices.shape[1] < 6:
        raise ValueError(f"{path} must have a texture (map_Kd in its material file) or vertex colours, has neither")
    colors = vertices[:, -3:]
    colors = colors / 255 if colors.max() > 1 else colors
    return ColouredMesh(vertices[:, :3], corners[..., 0], normals, colors=colors.astype(np.float32))


def read_ply(path: Path) -> ColouredMesh:
    """Read a PLY file (ascii or binary) with vertex properties x, y, z, red, green, blue and polygon faces.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a broken file, or one without faces or vertex colours.
    """
    data = read_bytes(path, _LARGEST_MESH)
    end = data.find(b"end_header")
    if not data.startswith(b"ply") or end < 0:
        raise ValueError(f"{path} must be a PLY file, has no whole header")
    try:
        start = data.index(b"\n", end) + 1
        kind, elements = _ply_header(data[:end].decode("ascii", "replace"), path)
        tables = _ply_body(data[start:], kind, elements)
    except Exception as error:  # a broken header makes the parser run into anything
        raise ValueError(f"{path} is not a whole PLY file: {error}") from error
    vertex, faces = tables.get("vertex", {}), tables.get("face", {}).get("triangles")
    if any(name not in vertex for name in ("x", "y", "z", "red", "green", "blue")) or faces is None or not len(faces):
        raise ValueError(f"{path} must have faces and vertex properties x, y, z, red, green, blue")
    vertices = np.stack([vertex[name] for name in ("x", "y", "z")], axis=1).astype(np.float64)
    _check_mesh(vertices, faces, path)
    colors = np.stack([vertex[name] for name in ("red", "green", "blue")], axis=1)
    colors = (colors / 255 if colors.dtype.kind in "iu" else colors).astype(np.float32)
    return ColouredMesh(vertices, faces, vertex_normals(vertices, faces), colors=colors)


def vertex_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """n_v = normalised sum over the faces at v of (b - a) x (c - a), which weights them by area; [V, 3]."""
    a, b, c = (vertices[faces[:, corner]] for corner in range(3))
    cross = np.cross(b - a, c - a)
    corner = faces.T.ravel()
    summed = [np.bincount(corner, np.tile(cross[:, axis], 3), minlength=len(vertices)) for axis in range(3)]
    normals = np.stack(summed, axis=1)
    length = np.linalg.norm(normals, axis=1, keepdims=True)
    return np.where(length > 0, normals / np.maximum(length, 1e-300), [0.0, 0.0, 1.0])


def _table(lines: list[bytes], prefix: bytes, path: Path, widths: tuple[int, ...]) -> np.ndarray:
    rows = [line[len(prefix) :] for line in lines if line.startswith(prefix)]
    if not rows:
        return np.zeros((0, widths[0]))
    try:
        table = np.array(b" ".join(rows).split(), np.float64).reshape(len(rows), -1)
    except ValueError as error:
        raise ValueError(f"{path} must have the same count of numbers behind every {prefix.decode()!r}") from error
    if table.shape[1] not in widths or not np.isfinite(table).all():
        raise ValueError(f"{path} must have finite {' or '.join(map(str, widths))} numbers behind {prefix.decode()!r}")
    return table


def _corners(rows: list[bytes], vertices: int, coordinates: int, path: Path) -> np.ndarray:
    """Vertex and texture-coordinate index of every triangle's corners, int64 [F, 3, 2]; -1: no coordinate."""
    parts = [row.split() for row in rows]
    if not vertices or min(map(len, parts), default=0) < 3:
        raise ValueError(f"{path} must have vertices, and faces of at least 3 corners")
    if any(len(part) != 3 for part in parts):  # polygons become fans
        parts = [[part[0], part[i], part[i + 1]] for part in parts for i in range(1, len(part) - 1)]
    tokens = [token for part in parts for token in part]
    slashes = tokens[0].count(b"/")
    try:
        text = b" ".join(tokens).replace(b"//", b"/0/")
        numbers = np.array(text.replace(b"/", b" ").split(), np.int64).reshape(len(tokens), slashes + 1)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path} must have faces that are all written in one of OBJ's forms") from error
    index = np.zeros((len(tokens), 2), np.int64)
    index[:, : min(2, slashes + 1)] = numbers[:, :2]
    # OBJ counts from 1, and from the end with negative numbers
    index = np.where(index > 0, index - 1, np.where(index < 0, index + [vertices, coordinates], -1))
    if index[:, 0].min() < 0 or index[:, 0].max() >= vertices or index[:, 1].max() >= max(1, coordinates):
        raise ValueError(f"{path} must have faces of its {vertices} vertices and {coordinates} texture coordinates")
    return index.reshape(-1, 3, 2)


def _texture(lines: list[bytes], path: Path) -> np.ndarray | None:
    maps: set[str] = set()
    for line in lines:
        if not line.startswith(b"mtllib "):
            continue
        try:
            library = inside(path.parent, line[7:].strip().decode("utf-8", "replace"), f"{path}: mtllib")
        except FileNotFoundError:
            continue
        text = read_bytes(library, _LARGEST_LIBRARY).decode("utf-8", errors="replace")
        rows = [row.split() for row in text.splitlines() if row.strip().startswith("map_Kd")]
        maps |= {os.path.abspath(library.parent / row[-1]) for row in rows}
    if len(maps) > 1:
        raise ValueError(f"{path} must have one texture, got {len(maps)}")
    return read_rgb(inside(path.parent, maps.pop(), f"{path}: map_Kd")) if maps else None


def _ply_header(text: str, path: Path) -> tuple[str, list[tuple[str, int, list[list[str]]]]]:
    kind = ""
    elements: list[tuple[str, int, list[list[str]]]] = []
    for line in text.splitlines():
        words = line.split()
        if words[:1] == ["format"]:
            kind = words[1]
        elif words[:1] == ["element"]:
            elements.append((words[1], int(words[2]), []))
            if elements[-1][1] < 0:
                raise ValueError(f"element {words[1]} has a count of {words[2]}")
        elif words[:1] == ["property"] and elements:
            elements[-1][2].append(words[1:])
    if kind not in ("ascii", "binary_little_endian", "binary_big_endian"):
        raise ValueError(f"{path} must be an ascii or binary PLY file, got format {kind!r}")
    return kind, elements


def _ply_body(body: bytes, kind: str, elements: list[tuple[str, int, list[list[str]]]]) -> dict[str, dict[str, Any]]:
    tables: dict[str, dict[str, Any]] = {}
    order = {"binary_little_endian": "<", "binary_big_endian": ">"}.get(kind)
    words = body.split() if order is None else []
    offset = 0
    for name, count, properties in elements:
        lists = [words_[-1] for words_ in properties if words_[0] == "list"]
        if lists and len(properties) > 1:
            raise ValueError(f"element {name} with a list beside other properties is not read")
        if not lists:
            types = [(words_[1], (order or "<") + _PLY_TYPES[words_[0]]) for words_ in properties]
            if order is None:
                columns = np.array(words[offset : offset + count * len(types)], np.float64).reshape(count, len(types)).T
                tables[name] = {key: column.astype(dtype) for (key, dtype), column in zip(types, columns)}
                offset += count * len(types)
            else:
                rows = np.frombuffer(body, np.dtype(types), count, offset)
                tables[name] = {key: rows[key] for key, _ in types}
                offset += rows.nbytes
        elif order is None:
            triangles, offset = _ascii_polygons(words, count, offset)
            tables[name] = {"triangles": triangles}
        else:
            sizes = (order + _PLY_TYPES[properties[0][1]], order + _PLY_TYPES[properties[0][2]])
            triangles, offset = _binary_polygons(body, count, offset, *sizes)
            tables[name] = {"triangles": triangles}
    return tables


def _ascii_polygons(words: list[bytes], count: int, offset: int) -> tuple[np.ndarray, int]:
    triangles: list[list[int]] = []
    for _ in range(count):
        corners = int(words[offset])
        if corners < 0:
            raise ValueError(f"a face has {corners} corners")
        polygon = [int(word) for word in words[offset + 1 : offset + 1 + corners]]
        if len(polygon) < corners:
            raise ValueError("faces end early")
        triangles += _fan(polygon)
        offset += 1 + corners
    return np.array(triangles, np.int64).reshape(-1, 3), offset


def _binary_polygons(body: bytes, count: int, offset: int, length: str, index: str) -> tuple[np.ndarray, int]:
    row = np.dtype([("corners", length), ("index", index, (3,))])
    if len(body) - offset >= count * row.itemsize:
        rows = np.frombuffer(body, row, count, offset)
        if (rows["corners"] == 3).all():
            return rows["index"].astype(np.int64), offset + rows.nbytes
    triangles: list[list[int]] = []
    for _ in range(count):
        corners = int(np.frombuffer(body, length, 1, offset)[0])
        if corners < 0:
            raise ValueError(f"a face has {corners} corners")
        offset += np.dtype(length).itemsize
        polygon = np.frombuffer(body, index, corners, offset)
        offset += polygon.nbytes
        triangles += _fan(polygon.tolist())
    return np.array(triangles, np.int64).reshape(-1, 3), offset


def _fan(polygon: list[int]) -> list[list[int]]:
    return [[polygon[0], polygon[i], polygon[i + 1]] for i in range(1, len(polygon) - 1)]


def _check_mesh(vertices: np.ndarray, faces: np.ndarray, path: Path) -> None:
    if not np.isfinite(vertices).all():
        raise ValueError(f"{path} must have finite vertices")
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise ValueError(f"{path} must have faces of its {len(vertices)} vertices, got index {faces.max()}")
