"""Which modules of a VGGT get adapters: named presets, each one full-match regular expression over module names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

_BLOCK_LINEARS = r"(attn\.(qkv|proj)|mlp\.(fc1|fc2))"
_AGGREGATOR = rf"aggregator\.(frame_blocks|global_blocks)\.\d+\.{_BLOCK_LINEARS}"
_CAMERA = rf"camera_head\.(embed_pose|poseLN_modulation\.1|pose_branch\.(fc1|fc2)|trunk\.\d+\.{_BLOCK_LINEARS})"
# Entries 0 and 1 of resize_layers are transposed convolutions, entry 2 is the identity.
_DEPTH = (
    r"depth_head\.(projects\.\d+|resize_layers\.3|scratch\.(layer\d_rn|output_conv1|output_conv2\.[02]"
    r"|refinenet\d\.(out_conv|resConfUnit[12]\.conv[12])))"
)
_PRESETS = {
    "aggregator": _AGGREGATOR,
    "heads": rf"({_CAMERA}|{_DEPTH})",
    "all": rf"({_AGGREGATOR}|{_CAMERA}|{_DEPTH})",
}
PRESETS = tuple(_PRESETS)


def target_regex(preset: str) -> str:
    """The expression that the full names of a preset's modules match; PEFT takes it as ``target_modules``.

    Args:
        preset: ``aggregator`` (the four Linears of every frame and global block), ``heads`` (every Linear and Conv2d
            of camera head and depth head) or ``all`` (both). The image encoder is in none of them.

    Raises:
        ValueError: no such preset.
    """
    if preset not in _PRESETS:
        raise ValueError(f"targets must be one of {', '.join(_PRESETS)}, got {preset!r}")
    return _PRESETS[preset]


def target_modules(model: nn.Module | Iterable[str], preset: str) -> list[str]:
    """Names of the modules that ``preset`` targets, in the model's order.

    Args:
        model: ours or any other VGGT with the published module names, or just module names.
        preset: see `target_regex`.

    Raises:
        ValueError: no such preset, or nothing in ``model`` matches it.
    """
    expression = re.compile(target_regex(preset))
    named_modules = getattr(model, "named_modules", None)
    names: Iterable[str] = (name for name, _ in named_modules()) if named_modules else model  # type: ignore[assignment]
    found = [name for name in names if expression.fullmatch(name)]
    if not found:
        raise ValueError(f"targets {preset!r} match no module of the model; expected names like {_EXAMPLES[preset]}")
    return found


_EXAMPLES = {
    "aggregator": "aggregator.frame_blocks.0.attn.qkv",
    "heads": "camera_head.embed_pose",
    "all": "aggregator.frame_blocks.0.attn.qkv",
}
