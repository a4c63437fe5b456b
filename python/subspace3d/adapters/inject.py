"""Cores on the modules of any model, in place."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

import subspace_ext as se
from subspace3d.adapters.placement import SUBSPACE_SCALE
from subspace3d.formats.basis import load_basis


def inject(
    model: nn.Module,
    basis: Mapping[str, tuple[torch.Tensor, torch.Tensor]] | str | os.PathLike[str],
    scale: float = SUBSPACE_SCALE,
) -> list[str]:
    """Put ``y = base(x) + s ((x V) c^T) U^T`` in the place of every module of ``basis``; nothing else is trained then.

    All parameters of ``model`` are frozen; the cores ``c [K, K]``, which start at zero, are the only ones that require
    gradients. What the model computes does not change until they are trained.

    Args:
        model (nn.Module): changed in place.
        basis: what `build_basis` returned, module name -> (``U [out, K]``, ``V [in, K]``), or a basis file.
        scale (float): s.

    Returns:
        list[str]: names of the modules that got a core.

    Raises:
        FileNotFoundError: the basis file does not exist.
        ValueError: a module is not in the model, is no Linear or Conv2d, or does not have the size of its basis; the
            model has not been changed.
    """
    if not isinstance(basis, Mapping):
        basis = load_basis(Path(basis))
    if not basis:
        raise ValueError("basis must hold at least one module, got none")
    layers = {name: _layer(model, name, u, v, scale) for name, (u, v) in basis.items()}
    model.requires_grad_(False)
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return list(layers)


def _layer(model: nn.Module, name: str, u: torch.Tensor, v: torch.Tensor, scale: float) -> nn.Module:
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"basis: {name} must be a module of the model: {error}") from error
    try:
        if isinstance(module, nn.Linear):
            return se.SubspaceLinear.from_linear(module, u, v, scale)
        if isinstance(module, nn.Conv2d):
            return se.SubspaceConv2d.from_conv(module, u, v, scale)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    raise ValueError(f"{name} must be a Linear or Conv2d to get a core, got {type(module).__name__}")
