"""A backbone by its name, or by the function that builds it."""

from __future__ import annotations

import os

from torch import nn

from subspace3d.backbones.find import find_backbone


def build_backbone(name: str, weights: str | os.PathLike[str] | None = None) -> nn.Module:
    """Build a backbone (float32, CPU, training mode) and fill in its weights.

    Args:
        name: a preset, or ``package.module:factory``, see `subspace3d.backbones.find.find_backbone`.
        weights: a file; ``random``; ``hub`` for the published ones, downloaded; None for those shipped.

    Raises:
        ValueError: no such preset or factory, weights that do not fit, or none where none are shipped.
        ModuleNotFoundError: the package of the backbone is not installed; names the command that brings it.
        FileNotFoundError: the weights do not exist.
    """
    return find_backbone(name).build(weights)
