"""What the pipeline asks of a network, VGGT in two sizes, and the networks of other installed packages.

`build_vggt` is imported on first use, so that importing this package does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from subspace3d.backbones.vggt import build_vggt as build_vggt

__all__ = ["build_vggt"]


def __getattr__(name: str) -> Any:
    if name == "build_vggt":
        from subspace3d.backbones.vggt import build_vggt

        return build_vggt
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
