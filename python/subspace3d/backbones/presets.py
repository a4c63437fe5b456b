"""The names of the backbones that come with the package, and where each is described."""

from __future__ import annotations

PRESETS: dict[str, str] = {
    "vggt-nano": "subspace3d.backbones.vggt_preset",
    "vggt-1b": "subspace3d.backbones.vggt_preset",
    "da3-small": "subspace3d.backbones.depth_anything_3",
    "da3-base": "subspace3d.backbones.depth_anything_3",
    "da3-large": "subspace3d.backbones.depth_anything_3",
    "vggt-omega": "subspace3d.backbones.omega",
    "pi3": "subspace3d.backbones.pi3",
    "pi3x": "subspace3d.backbones.pi3",
    "mapanything": "subspace3d.backbones.mapanything",
    "mapanything-apache": "subspace3d.backbones.mapanything",
}
"""Name -> module with a function ``preset(name)`` that returns the backbone."""
