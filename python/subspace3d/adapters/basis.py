"""The frozen basis of the subspace method: several mined subspaces combined, module by module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

import subspace_ext as se
from subspace3d.backbones.targets import target_modules
from subspace3d.files import load_tensors, save_tensors
from subspace3d.mining.subspace_file import ModuleSubspace, find_subspaces, load_subspace

Basis = dict[str, tuple[torch.Tensor, torch.Tensor]]
_FORMAT = "subspace3d-basis"


def load_basis(paths: Iterable[Path], model: nn.Module, K: int = 0) -> Basis:
    """U = orth([u_1 | u_2 | ...]), V = orth([v_1 | v_2 | ...]) for every linear of the aggregator.

    Modules outside the aggregator are left out: the heads keep a plain LoRA.

    Args:
        paths (Iterable[Path]): subspace files, or folders of them.
        model (nn.Module): the backbone the basis is for.
        K (int): keep this many leading principal directions of the concatenation; 0: all.

    Returns:
        dict: module name -> (``U [out, K]``, ``V [in, K]``), float32, orthonormal columns.

    Raises:
        ValueError: a module of a file is not in the model, a file lacks a module, or shapes do not fit.
    """
    files = find_subspaces(paths).values()
    wanted = target_modules(model, "aggregator")
    mined = {file: load_subspace(file).modules for file in files}
    for file, modules in mined.items():
        _check_modules(file, modules, model, wanted)
    basis = {}
    for name in wanted:
        pairs = [(modules[name].u, modules[name].v) for modules in mined.values()]
        basis[name] = se.combine_subspaces(pairs, rank=K or None)
    return basis


def _check_modules(file: Path, modules: Mapping[str, ModuleSubspace], model: nn.Module, wanted: list[str]) -> None:
    present = {name for name, _ in model.named_modules()}
    foreign = [name for name in modules if name not in present]
    if foreign:
        raise ValueError(f"{file}: {len(foreign)} modules are not in the model, e.g. {foreign[0]}")
    missing = [name for name in wanted if name not in modules]
    if missing:
        raise ValueError(f"{file} must hold every linear of the aggregator, {len(missing)} are missing: {missing[0]}")
    for name in wanted:
        expected = tuple(model.get_parameter(f"{name}.weight").shape)
        found = (modules[name].u.shape[0], modules[name].v.shape[0])
        if found != expected:
            raise ValueError(
                f"{file}: {name} must have [out, in] = {list(expected)} as in the model, got {list(found)}"
            )


def save_basis(path: Path, basis: Basis) -> None:
    """Write ``<module>.U`` and ``<module>.V``."""
    tensors = {f"{name}.{key}": value for name, pair in basis.items() for key, value in zip("UV", pair)}
    save_tensors(path, tensors, {"format": _FORMAT, "version": 1})


def read_basis(path: Path) -> Basis:
    """Read what `save_basis` wrote.

    Raises:
        FileNotFoundError: ``path`` does not exist.
        ValueError: truncated, or another kind of file.
    """
    tensors, header = load_tensors(path)
    if header.get("format") != _FORMAT:
        raise ValueError(f"{path}: header format must be {_FORMAT!r}, got {header.get('format')!r}")
    names = [name.removesuffix(".U") for name in tensors if name.endswith(".U")]
    return {name: (tensors[f"{name}.U"], tensors[f"{name}.V"]) for name in names}
