"""The frozen basis of the subspace method: mined subspaces combined, module by module."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import nn

import subspace_ext as se
from subspace3d.adapters.placement import matrix_shape, place
from subspace3d.backbones.presets import PRESETS
from subspace3d.files import load_header
from subspace3d.formats.basis import Basis, load_basis
from subspace3d.formats.subspace import FORMAT, find_subspaces, load_subspace
from subspace3d.log import logger
from subspace3d.schema import check


def select_files(paths: Iterable[Path], attributes: Sequence[str] = ()) -> dict[str, Path]:
    """Attribute -> file of the subspace files (or folders of them) in ``paths``; ``attributes`` names those to keep.

    Raises:
        FileNotFoundError: a path does not exist, or there is no file.
        ValueError: two files of one name, or an attribute without a file.
    """
    found = find_subspaces(paths)
    absent = [name for name in attributes if name not in found]
    if absent:
        raise ValueError(f"attributes must be among {', '.join(sorted(found))}, got {absent[0]!r}")
    return {name: path for name, path in found.items() if not attributes or name in attributes}


def build_basis(
    paths: Iterable[str | os.PathLike[str]] | str | os.PathLike[str],
    names: Sequence[str] | None = None,
    K: int = 0,
    k: int = 0,
) -> Basis:
    """U = orth([u_1 | u_2 | ...]), V = orth([v_1 | v_2 | ...]) for every module, for any model.

    A single file that already holds a combined basis (`save_basis`, or the authors' layout) is taken as it is, unless
    K or k asks for less of it.

    Args:
        paths: a subspace file or a folder of them, or several of these.
        names (Sequence[str] | None): modules to take, which every file must hold; none: all.
        K (int): keep this many leading principal directions of the concatenation; 0: all.
        k (int): keep this many leading directions of each file before they are concatenated; 0: all.

    Returns:
        dict: module name -> (``U [out, K]``, ``V [in, K]``), float32; orthonormal columns unless taken as they are.

    Raises:
        FileNotFoundError: a path does not exist, or a folder holds no file.
        ValueError: K or k is negative, a file lacks a module, or shapes differ between files.
    """
    given = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    files: list[Path] = []
    for path in map(Path, given):
        files += find_subspaces([path]).values() if path.is_dir() else [path]
    return _combine({path: read_pairs(path) for path in files}, names, K, k)


def basis_for_model(paths: Iterable[Path], model: nn.Module, K: int = 0, k: int = 0, head_cores: bool = False) -> Basis:
    """`build_basis` for the modules of a VGGT that get a core: every aggregator linear, with ``head_cores`` heads too.

    Args:
        paths (Iterable[Path]): subspace files, or folders of them.
        model (nn.Module): the backbone the basis is for.
        K (int): see `build_basis`.
        k (int): see `build_basis`.
        head_cores (bool): see `placement.place`.

    Raises:
        FileNotFoundError: a path does not exist, or there is no file.
        ValueError: a module of a file is not in the model, a file lacks a module, or shapes do not fit.
    """
    loaded = {path: read_pairs(path) for path in find_subspaces(paths).values()}
    wanted = place(model, "subspace", head_cores=head_cores).cores
    present = dict(model.named_modules())
    for path, (modules, _) in loaded.items():
        foreign = [name for name in modules if name not in present]
        if foreign:
            raise ValueError(f"{path}: {len(foreign)} modules are not in the model, e.g. {foreign[0]}")
        check_shapes(str(path), {name: modules[name] for name in wanted if name in modules}, present)
    return _combine(loaded, wanted, K, k)


def warn_of_other_base(paths: Iterable[Path], identity: str) -> None:
    """Warn of subspace files that were mined from adapters of other weights than ``identity``.

    Only where their header names weights as `subspace3d.backbones.record.BackboneRecord.identity` does: by other names
    the same weights may be meant.
    """
    for path in find_subspaces(paths).values():
        base = check(load_header(path).get("base_model") or "", str, f"{path}: header.base_model")
        name = base.partition("@")[0]
        if base != identity and (name in PRESETS or ":" in name):
            logger.warning(
                f"{path} was mined from adapters of {base} and is used on {identity}: directions of one network say "
                "nothing of another, unless one was trained from the other"
            )


def _combine(loaded: Mapping[Path, tuple[Basis, bool]], names: Sequence[str] | None, K: int, k: int) -> Basis:
    if K < 0 or k < 0:
        raise ValueError(f"K and k must be at least 0 (0 keeps all), got K = {K}, k = {k}")
    if not loaded:
        raise ValueError("subspaces must name at least one file, got none")
    for path, (modules, _) in loaded.items():
        most = max(u.shape[1] for u, _ in modules.values())
        if k > most:
            raise ValueError(f"k must be at most what {path} was mined with, {most}, got {k}")
    first, combined = next(iter(loaded.values()))
    if names is None:
        names = list(dict.fromkeys(name for modules, _ in loaded.values() for name in modules))
    for path, (modules, _) in loaded.items():
        missing = [name for name in names if name not in modules]
        if missing:
            raise ValueError(f"{path} must hold every module of the basis, {len(missing)} are missing: {missing[0]}")
    if len(loaded) == 1 and combined and not (K or k):
        return {name: first[name] for name in names}
    basis = {}
    for name in names:
        pairs = [modules[name] for modules, _ in loaded.values()]
        try:
            basis[name] = se.combine_subspaces(
                [(u[:, : k or None], v[:, : k or None]) for u, v in pairs], rank=K or None
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return basis


def check_shapes(what: str, basis: Basis, modules: Mapping[str, nn.Module]) -> None:
    """Raise ValueError, naming ``what`` and the module, unless every pair fits the weight of its module."""
    for name, (u, v) in basis.items():
        expected = list(matrix_shape(modules[name]))
        if [u.shape[0], v.shape[0]] != expected:
            raise ValueError(
                f"{what}: {name} must have [out, in] = {expected} as in the model, got {[u.shape[0], v.shape[0]]}"
            )


def read_pairs(path: Path) -> tuple[Basis, bool]:
    """(u, v) of every module, and whether the file holds a combined basis rather than one mined subspace."""
    if load_header(path).get("format") == FORMAT:
        return {name: (module.u, module.v) for name, module in load_subspace(path).modules.items()}, False
    return load_basis(path), True
