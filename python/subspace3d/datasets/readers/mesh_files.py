"""Read coloured triangle meshes: OBJ with one texture or vertex colours, PLY with vertex colours.

These are our own readers because trimesh 5.2 loses textures without a word (names in quotes or with options, the second
of two libraries, a library with a byte order mark), counts negative texture coordinates from the end of the file, finds
no mesh where tabs part the words, and reads whatever files a mesh names. It reads OBJ about twice as fast.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from subspace3d.files import inside
from subspace3d.formats.images import read_rgb
from subspace3d.reading import read_bytes

_COMMENT, _INDENT = re.compile(rb"(?m)(^|(?<= ))#[^\n]*"), re.compile(rb"(?m)^ +")
# of map_Kd, like -s 1 1 1 or -clamp on, before the name
_OPTIONS = re.compile(r"^\s*(-[a-zA-Z]\w*(\s+(on|off|-?[\d.]+(?=\s)))*\s+)+")
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
    lines = _lines(path, _LARGEST_MESH)
    vertices = _table(lines, b"v ", path, (3, 4, 6, 7))
    coordinates = _table(lines, b"vt ", path, (2, 3))
    corners = _corners(lines, len(vertices), len(coordinates), path)
    normals = vertex_normals(vertices[:, :3], corners[..., 0])
    texture, missing = _texture(lines, path)
    if texture is not None and len(coordinates) and (corners[..., 1] >= 0).all():
        # a vertex on a seam of the texture becomes one vertex per texture coordinate
        pairs, index = np.unique(corners[..., 0] * len(coordinates) + corners[..., 1], return_inverse=True)
        vertex, coordinate = np.divmod(pairs, len(coordinates))
        faces, uv = index.reshape(-1, 3), coordinates[coordinate, :2]
        return ColouredMesh(vertices[vertex, :3], faces, normals[vertex], uv=uv, texture=texture)
    if vertices.shape[1] < 6:
        raise ValueError(
            f"{path} must have a texture (map_Kd in its material file) or vertex colours, has neither"
            + (f"; there is no {', '.join(missing)}" if missing else "")
        )
    colors = vertices[:, 3:6]  # behind them may stand how opaque the vertex is
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


def _lines(path: Path, largest: int) -> list[bytes]:
    """Lines with words parted by blanks, without byte order mark, comments, and with continued lines joined."""
    data = read_bytes(path, largest).removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\\\n", b" ")
    data = data.replace(b"\t", b" ")
    if b"#" in data:
        data = _COMMENT.sub(b"", data)
    if b"\n " in data or data.startswith(b" "):
        data = _INDENT.sub(b"", data)
    return data.splitlines()


def _corners(lines: list[bytes], vertices: int, coordinates: int, path: Path) -> np.ndarray:
    """Vertex and texture-coordinate index of every triangle's corners, int64 [F, 3, 2]; -1: no coordinate."""
    at = [index for index, line in enumerate(lines) if line.startswith(b"f ")]
    parts = [lines[index][2:].split() for index in at]
    if not vertices or min(map(len, parts), default=0) < 3:
        raise ValueError(f"{path} must have vertices, and faces of at least 3 corners")
    face = np.arange(len(parts))
    if any(len(part) != 3 for part in parts):  # polygons become fans
        face = np.repeat(face, [len(part) - 2 for part in parts])
        parts = [[part[0], part[i], part[i + 1]] for part in parts for i in range(1, len(part) - 1)]
    index = _indices([token for part in parts for token in part], path)
    if (index < 0).any():  # counted back from the line they stand in
        before = [np.cumsum([line.startswith(prefix) for line in lines])[at] for prefix in (b"v ", b"vt ")]
        back = np.repeat(np.stack(before, axis=1)[face], 3, axis=0)
        if ((index < 0) & (index + back < 0)).any():
            raise ValueError(f"{path} has faces that count back beyond its first vertex or texture coordinate")
        index = np.where(index < 0, index + back + 1, index)
    index = index - 1  # counted from 1; 0: none is given
    if index[:, 0].min() < 0 or index[:, 0].max() >= vertices or index[:, 1].max() >= max(1, coordinates):
        raise ValueError(f"{path} must have faces of its {vertices} vertices and {coordinates} texture coordinates")
    return index.reshape(-1, 3, 2)


def _indices(tokens: list[bytes], path: Path) -> np.ndarray:
    """The first two numbers, int64 [N, 2], of corners like 1, 1/2, 1/2/3 or 1//3; 0: not given."""
    index = np.zeros((len(tokens), 2), np.int64)
    slashes = tokens[0].count(b"/")
    try:
        text = b" ".join(tokens).replace(b"//", b"/0/")
        if all(token.count(b"/") == slashes for token in tokens):
            numbers = np.array(text.replace(b"/", b" ").split(), np.int64).reshape(len(tokens), slashes + 1)
            index[:, : min(2, slashes + 1)] = numbers[:, :2]
        else:
            for row, token in enumerate(tokens):
                index[row, : token.count(b"/") + 1] = [int(word or 0) for word in token.split(b"/")][:2]
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path} must have faces written in one of OBJ's forms: {error}") from error
    return index


def _texture(lines: list[bytes], path: Path) -> tuple[np.ndarray | None, list[str]]:
    """The one texture of the materials that faces use, and the names of files that are not there."""
    missing: list[str] = []
    maps: dict[str, str | None] = {}
    for line in lines:
        if line.startswith(b"mtllib "):
            for library in _named(line[7:], path.parent, missing, f"{path}: mtllib"):
                maps |= _materials(library)
    uses = [index for index, line in enumerate(lines) if line.startswith(b"usemtl ")]
    used = set(maps)
    if uses:
        names = [lines[index][7:].strip().decode("utf-8", "replace") for index in uses]
        faces = [index for index, line in enumerate(lines) if line.startswith(b"f ")]
        places = np.searchsorted(uses, faces)  # 0: before the first
        used = {names[place - 1] for place in np.unique(places) if place}
    found = {maps.get(name) for name in used} if maps else set()
    textures = {name for name in found if name is not None}
    if len(textures) > 1:
        raise ValueError(f"{path} must have one texture, got {len(textures)}")
    if not textures:
        return None, missing
    if None in found and uses:
        bare = sorted(name for name in used if maps.get(name) is None)
        raise ValueError(f"{path} must have a texture on every face, those of the material {bare[0]!r} have none")
    return read_rgb(inside(path.parent, textures.pop(), f"{path}: map_Kd")), missing


def _materials(library: Path) -> dict[str, str | None]:
    """The texture of each material, as an absolute path; none: it has none."""
    maps: dict[str, str | None] = {}
    name = ""
    for line in _lines(library, _LARGEST_LIBRARY):
        word, _, rest = line.partition(b" ")
        if word.lower() == b"newmtl":
            name = rest.strip().decode("utf-8", "replace")
            maps[name] = None
        elif word.lower() == b"map_kd":
            text = _OPTIONS.sub("", rest.decode("utf-8", "replace")).strip().strip("\"'")
            maps[name] = os.path.abspath(library.parent / text.replace("\\", "/"))
    return maps


def _named(text: bytes, folder: Path, missing: list[str], where: str) -> list[Path]:
    """The files a line names: one whose name may have blanks, or several; ``missing`` gets those that are not there."""
    whole = text.strip().decode("utf-8", "replace").strip("\"'")
    for names in ([whole], whole.split()):
        found = []
        for name in names:
            try:
                found.append(inside(folder, name, where))
            except FileNotFoundError:
                continue
        if found:
            missing += [name for name in names if not (folder / name).is_file()]
            return found
    missing.append(whole)
    return []


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
