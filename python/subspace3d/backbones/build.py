"""A backbone by its name, or by the function that builds it."""

from __future__ import annotations

import importlib
import os

from torch import nn

from subspace3d.backbones.config import CONFIGS
from subspace3d.backbones.vggt import build_vggt


def build_backbone(name: str, weights: str | os.PathLike[str] | None = None) -> nn.Module:
    """Build a backbone (float32, CPU, training mode) and fill in its weights.

    Args:
        name: a preset, ``vggt-1b`` or ``vggt-nano``, or ``package.module:factory``, a function that takes ``weights``
            and returns a torch.nn.Module.
        weights: for a preset see `build_vggt`; handed to a factory as it is.

    Raises:
        ValueError: no such preset or factory, or weights that do not fit.
        FileNotFoundError: the weights do not exist.
    """
    if name in CONFIGS:
        return build_vggt(name, weights)
    module, colon, factory = name.partition(":")
    if not colon:
        raise ValueError(f"backbone must be one of {', '.join(CONFIGS)}, or package.module:factory, got {name!r}")
    try:
        build = getattr(importlib.import_module(module), factory)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"backbone must be importable, got {name!r}: {error}") from error
    model = build(weights)
    if not isinstance(model, nn.Module):
        raise ValueError(f"backbone: {name} must return a torch.nn.Module, got {type(model).__name__}")
    return model
