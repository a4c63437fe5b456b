"""Which modules get adapters: named presets, each one full-match regular expression over module names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import nn

from subspace3d.backbones.find import backbone_of
from subspace3d.backbones.vggt_targets import EXPRESSIONS


def target_regex(preset: str, expressions: Mapping[str, str] = EXPRESSIONS) -> str:
    """The expression that the full names of a preset's modules match; PEFT takes it as ``target_modules``.

    Args:
        preset: of a VGGT ``cores`` or ``aggregator`` (the four Linears of every frame and global block), ``heads``
            (every Linear and Conv2d of camera head and depth head) or ``all`` (both). The image encoder is in none.
        expressions: the presets of the backbone, ``Backbone.targets``.

    Raises:
        ValueError: no such preset.
    """
    if preset not in expressions:
        raise ValueError(f"targets must be one of {', '.join(expressions)}, got {preset!r}")
    return expressions[preset]


def target_modules(model: nn.Module | Iterable[str], preset: str) -> list[str]:
    """Names of the modules that ``preset`` targets, in the model's order.

    Args:
        model: a backbone's network, or just the names of the modules of a VGGT.
        preset: see `target_regex`.

    Raises:
        ValueError: no such preset, or nothing in ``model`` matches it.
    """
    if isinstance(model, nn.Module):
        expression = target_regex(preset, backbone_of(model).targets)
        names = [name for name, _ in model.named_modules()]
    else:
        expression, names = target_regex(preset), list(model)
    found = [name for name in names if re.fullmatch(expression, name)]
    if not found:
        raise ValueError(f"targets {preset!r} match no module of the model; expected names that match {expression}")
    return found
