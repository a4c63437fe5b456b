"""Cores on the modules of any model, in place."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

import subspace_ext as se
from subspace3d.adapters.basis import check_shapes
from subspace3d.adapters.placement import SUBSPACE_SCALE, check_uses
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
        ValueError: a module is not in the model, is no Linear or Conv2d, does not have the size of its basis, or is
            used in a way that a core would not see (`placement.check_uses`); the model has not been changed.
    """
    if not isinstance(basis, Mapping):
        basis = load_basis(Path(basis))
    if not basis:
        raise ValueError("basis must hold at least one module, got none")
    # all checks come first: making a layer freezes its base
    modules = _find_modules(model, basis)
    check_uses(model, {"basis": basis})
    check_shapes("basis", dict(basis), modules)
    model.requires_grad_(False)
    for name, (u, v) in basis.items():
        module = modules[name]
        parent, _, child = name.rpartition(".")
        layer: nn.Module
        if isinstance(module, nn.Linear):
            layer = se.SubspaceLinear.from_linear(module, u, v, scale)
        else:
            layer = se.SubspaceConv2d.from_conv(module, u, v, scale)
        setattr(model.get_submodule(parent), child, layer)
    return list(basis)


def _find_modules(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Linear | nn.Conv2d]:
    present = dict(model.named_modules(remove_duplicate=False))
    missing = [name for name in names if name not in present]
    if missing:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise ValueError(f"basis: {missing[0]}{more} must be a module of the model, and is not")
    found = {}
    for name in names:
        module = present[name]
        if not isinstance(module, (nn.Linear, nn.Conv2d)) or (isinstance(module, nn.Conv2d) and module.groups != 1):
            raise ValueError(f"basis: {name} must be a Linear, or a Conv2d with groups = 1, got {module}")
        found[name] = module
    return found
