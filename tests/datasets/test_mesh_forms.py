"""Forms of OBJ files and of their material files that exporters write: the right mesh and texture, or a named error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from subspace3d.datasets.readers.mesh_files import read_obj

V = "v 0 0 0\nv 1 0 0\nv 0 1 0\n"
T = "vt 0 0\nvt 1 0\nvt 0 1\n"
FACE = "f 1/1 2/2 3/3\n"
USE = "mtllib m.mtl\nusemtl a\n"
LIBRARY = "newmtl a\nmap_Kd t.png\n"
UV = [[0, 0], [1, 0], [0, 1]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, level in (("t.png", 200), ("my tex.png", 100), ("other.png", 50)):
        Image.fromarray(np.full((4, 4, 3), level, np.uint8)).save(tmp_path / name)
    (tmp_path / "m.mtl").write_text(LIBRARY)
    (tmp_path / "second lib.mtl").write_text("newmtl b\nmap_Kd other.png\n")
    return tmp_path


MESHES = {
    "plain": USE + V + T + FACE,
    "counted back from the line": USE + V + T + "f -3/-3 -2/-2 -1/-1\nv 5 5 5\nvt 0.5 0.5\n",
    "tabs": (USE + V + T + FACE).replace(" ", "\t"),
    "byte order mark": "\ufeff" + USE + V + T + FACE,
    "comments": "mtllib m.mtl # lib\nusemtl a # it\n" + V.replace("\n", " # point\n") + T + "f 1/1 2/2 3/3 # f\n",
    "crlf and a continued line": (USE + V + T + "f 1/1 2/2 \\\n3/3\n").replace("\n", "\r\n"),
    "two libraries": "mtllib gone.mtl m.mtl\nusemtl a\n" + V + T + FACE,
    "indented": "\n".join("  " + line for line in (USE + V + T + FACE).splitlines()),
    "no usemtl": "mtllib m.mtl\n" + V + T + FACE,
    "a group of another material without faces": USE + V + T + FACE + "usemtl b\n",
    "normals in some faces": USE + V + T + FACE + "vn 0 0 1\nf 1/1/1 3/3/1 2/2/1\n",
}  # fmt: skip


@pytest.mark.parametrize("form", MESHES)
def test_forms_of_meshes(folder: Path, form: str) -> None:
    path = folder / "x.obj"
    path.write_bytes(MESHES[form].encode())
    mesh = read_obj(path)
    assert mesh.texture is not None and (mesh.texture == 200).all() and mesh.uv is not None
    assert mesh.faces[0].tolist() == [0, 1, 2]
    np.testing.assert_array_equal(mesh.vertices, [[0, 0, 0], [1, 0, 0], [0, 1, 0]])
    np.testing.assert_array_equal(mesh.uv, UV)


LIBRARIES = {
    "a name with blanks": ("newmtl a\nmap_Kd my tex.png\n", 100),
    "quotes": ('newmtl a\nmap_Kd "my tex.png"\n', 100),
    "options": ("newmtl a\nmap_Kd -s 1 1 1 -clamp on my tex.png\n", 100),
    "lower case": ("newmtl a\nmap_kd t.png\n", 200),
    "tabs": ("newmtl\ta\n\tmap_Kd\tt.png\n", 200),
    "byte order mark and crlf": ("\ufeffnewmtl a\r\nmap_Kd t.png\r\n", 200),
    "another material with a texture": ("newmtl b\nmap_Kd other.png\nnewmtl a\nmap_Kd t.png\n", 200),
    "a folder of Windows": ("newmtl a\nmap_Kd .\\t.png\n", 200),
}


@pytest.mark.parametrize("form", LIBRARIES)
def test_forms_of_material_files(folder: Path, form: str) -> None:
    library, level = LIBRARIES[form]
    (folder / "m.mtl").write_bytes(library.encode())
    (folder / "x.obj").write_text(USE + V + T + FACE)
    mesh = read_obj(folder / "x.obj")
    assert mesh.texture is not None and (mesh.texture == level).all()


def test_a_library_whose_name_has_blanks(folder: Path) -> None:
    (folder / "x.obj").write_text("mtllib second lib.mtl\nusemtl b\n" + V + T + FACE)
    mesh = read_obj(folder / "x.obj")
    assert mesh.texture is not None and (mesh.texture == 50).all()


@pytest.mark.parametrize("alpha", ["", " 0.5"])
def test_colours_may_be_followed_by_opacity(folder: Path, alpha: str) -> None:
    rows = [f"v {x} {y} 0 {x} 0.25 {y}{alpha}" for x, y in ((0, 0), (1, 0), (0, 1))]
    (folder / "x.obj").write_text("\n".join(rows) + "\nf 1 2 3\n")
    mesh = read_obj(folder / "x.obj")
    assert mesh.colors is not None
    np.testing.assert_allclose(mesh.colors, [[0, 0.25, 0], [1, 0.25, 0], [0, 0.25, 1]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (USE + V + T + FACE + "usemtl bare\nf 1/1 3/3 2/2\n", "those of the material 'bare' have none"),
        (USE + V + T + "f -4/-3 -2/-2 -1/-1\n", "count back beyond"),
        (USE + V + T + "f 1/1 2/2 9/3\n", "3 vertices"),
        ("mtllib gone.mtl\nusemtl a\n" + V + T + FACE, "has neither; there is no gone.mtl"),
        (USE + V + T + "f 1/1 2/x 3/3\n", "one of OBJ's forms"),
        ("mtllib m.mtl second lib.mtl\n" + V + T + FACE, None),
    ],
)
def test_what_is_not_understood_is_named(folder: Path, text: str, message: str | None) -> None:
    (folder / "x.obj").write_text(text)
    if message is None:
        assert read_obj(folder / "x.obj").texture is not None
        return
    with pytest.raises(ValueError, match=message):
        read_obj(folder / "x.obj")
