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
from subspace3d.formats.basis import check_basis, load_basis
from subspace_ext.core import checked_scale


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
        scale (float): s, finite.

    Returns:
        list[str]: names of the modules that got a core.

    Raises:
        FileNotFoundError: the basis file does not exist.
        ValueError: a module is not in the model, is no Linear or Conv2d, does not have the size of its basis, or is
            used in a way that a core would not see (`placement.check_uses`); basis or scale is not finite.
            The model has not been changed.
    """
    if isinstance(basis, (str, os.PathLike)):
        basis = load_basis(Path(basis))
    if not isinstance(basis, Mapping):
        raise ValueError(f"basis must be a mapping of module names or the path of a file, got {type(basis).__name__}")
    if not basis:
        raise ValueError("basis must hold at least one module, got none")
    scale = checked_scale(scale)
    modules = _find_modules(model, basis)
    check_uses(model, {"basis": basis})
    check_basis("basis", basis)
    check_shapes("basis", dict(basis), modules)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    layers: dict[str, nn.Module] = {}
    for name, (u, v) in basis.items():
        module = modules[name]
        try:
            if isinstance(module, nn.Linear):
                layers[name] = se.SubspaceLinear.from_linear(module, u, v, scale)
            else:
                layers[name] = se.SubspaceConv2d.from_conv(module, u, v, scale)
        except ValueError as error:
            # making a layer froze its base
            for parameter in trained:
                parameter.requires_grad_(True)
            raise ValueError(f"basis: {name}: {error}") from error
    model.requires_grad_(False)
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return list(basis)


def _find_modules(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Linear | nn.Conv2d]:
    present = dict(model.named_modules(remove_duplicate=False))
    if "" in names:
        raise ValueError(
            "basis must name modules inside the model, got '' for the model itself: nothing can be put in its place. "
            "subspace_ext.SubspaceLinear.from_linear makes the layer that stands in for it"
        )
    missing = [name for name in names if name not in present]
    if missing:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise ValueError(f"basis: {missing[0]}{more} must be a module of the model, and is not")
    found = {}
    for name in names:
        module = present[name]
        if not isinstance(module, (nn.Linear, nn.Conv2d)) or (isinstance(module, nn.Conv2d) and module.groups != 1):
            got = type(module).__name__ + (f" with groups = {module.groups}" if isinstance(module, nn.Conv2d) else "")
            raise ValueError(f"basis: {name} must be a Linear, or a Conv2d with groups = 1, got {got}")
        found[name] = module
    return found
