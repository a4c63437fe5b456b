"""A folder of the user's own materials: base colour, roughness, metallic and normal maps as images.

A material is a folder with ``basecolor.png``, or a file ``<name>_basecolor.png``; jpg works too. Beside it may stand
``roughness``, ``metallic`` and ``normal`` (tangent space, green up) under the same rule. An image whose name says none
of these is a material of its own: a picture.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from subspace3d.formats.images import eight_bits, open_image

MAPS = {
    "basecolor": ("basecolor", "base_color", "albedo", "diffuse", "diff", "color", "col"),
    "roughness": ("roughness", "rough"),
    "metallic": ("metallic", "metalness", "metal"),
    "normal": ("normal_gl", "normalgl", "nor_gl", "normal"),
}
# parts of common material downloads that are read by nothing here, and are no pictures either
_IGNORED = (
    "height",
    "displacement",
    "disp",
    "ao",
    "ambientocclusion",
    "opacity",
    "specular",
    "arm",
    "normaldx",
    "nor_dx",
)
_SUFFIXES = (".png", ".jpg", ".jpeg")
_KIND = {word: kind for kind, words in MAPS.items() for word in words} | dict.fromkeys(_IGNORED, "")
_WORDS = "|".join(sorted(_KIND, key=len, reverse=True))
_NAME = re.compile(rf"(?:(.*)[_\-. ])?({_WORDS})(?:[_\-. ]\d+k)?", re.IGNORECASE)  # the last: a resolution, "_4k"


@dataclass(frozen=True)
class TextureMaps:
    """Image files of one material; ``name`` is its path below the folder."""

    name: str
    files: dict[str, Path]  # keys of MAPS, basecolor always among them


@functools.lru_cache(maxsize=4)
def find_textures(root: Path) -> tuple[TextureMaps, ...]:
    """The materials at or below ``root``, sorted by name; hidden folders are left out. A large folder is read once.

    Raises:
        FileNotFoundError: ``root`` is no folder.
        ValueError: it holds no base colour image.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"textures: no such folder: {root}")
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        if path.suffix.lower() not in _SUFFIXES or any(part.startswith(".") for part in relative.parts):
            continue
        match = _NAME.fullmatch(path.stem)
        stem, kind = (match[1] or "", _KIND[match[2].lower()]) if match else (path.stem, "basecolor")
        if kind:
            found.setdefault(str(relative.parent / stem) if stem else str(relative.parent), {}).setdefault(kind, path)
    result = tuple(TextureMaps(name, files) for name, files in sorted(found.items()) if "basecolor" in files)
    if not result:
        raise ValueError(f"textures must hold base colour images such as <name>_basecolor.png, {root} holds none")
    return result


@functools.lru_cache(maxsize=32)
def load_maps(root: Path, name: str, size: int) -> dict[str, np.ndarray]:
    """The maps of one material, float32, brought to ``size`` pixels a side.

    Returns:
        dict: basecolor [n, n, 3] linear RGB; and where there are such files roughness and metallic [n, n] in [0, 1],
        normal [n, n, 3] unit vectors with x to the right, y up and z out of the surface.

    Raises:
        ValueError: a file that is not a whole image, or a material that ``root`` does not hold.
    """
    material = next((maps for maps in find_textures(root) if maps.name == name), None)
    if material is None:
        raise ValueError(f"textures must hold the material {name!r}, {root} does not")
    result = {}
    for kind, path in material.files.items():
        pixels = read_picture(path, size, grey=kind in ("roughness", "metallic"))
        if kind == "basecolor":
            pixels = srgb_to_linear(pixels)
        elif kind == "normal":
            pixels = pixels * 2 - 1
            pixels /= np.maximum(np.linalg.norm(pixels, axis=-1, keepdims=True), 1e-6)
        result[kind] = pixels.astype(np.float32)
    return result


def read_picture(path: Path, size: int, grey: bool = False) -> np.ndarray:
    """An image file as float64 [size, size, 3] (``grey``: [size, size]) in [0, 1], as encoded, squeezed to a square.

    Raises:
        ValueError: the file is not a whole image.
    """
    from PIL import Image

    image = eight_bits(open_image(path), path).convert("L" if grey else "RGB")
    filter_ = Image.Resampling.BOX if min(image.size) >= size else Image.Resampling.BICUBIC
    return np.asarray(image.resize((size, size), filter_), dtype=np.float64) / 255


def srgb_to_linear(encoded: np.ndarray) -> np.ndarray:
    """c / 12.92 up to 0.04045, else ((c + 0.055) / 1.055)^2.4."""
    return np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
