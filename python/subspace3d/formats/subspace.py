"""Subspace files: what the adapters of one attribute share, module by module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired

import torch
from typing_extensions import TypedDict

from subspace3d import files, outputs
from subspace3d.schema import Count, Positive, PositiveInt, check

FORMAT = "subspace3d-subspace"
VERSION = 1

_DESCENDING = 1 + 1e-6  # equal ones may come out in either order
_FIELDS = ("u", "v", "singular_values", "weights")


class _AdapterEntry(TypedDict):
    path: str
    sha256: NotRequired[str]
    config_sha256: NotRequired[str]


class _ModuleEntry(TypedDict):
    rank: NotRequired[PositiveInt]
    k: NotRequired[PositiveInt]
    n_iter: NotRequired[Count]
    converged: NotRequired[bool]
    explained: NotRequired[list[float | None]]


class _Header(TypedDict):
    base_model: NotRequired[str | None]
    licence: NotRequired[list[str]]
    adapters: NotRequired[list[_AdapterEntry]]
    modules: NotRequired[dict[str, _ModuleEntry]]
    join: NotRequired[list[_AdapterEntry]]
    asked_model: NotRequired[Literal["mean", "shared", "auto"]]
    model: NotRequired[Literal["mean", "shared"]]
    source: NotRequired[Literal["tuned", "gradient", "mixed"]]
    held_out: NotRequired[dict[str, dict[str, float]]]
    k: NotRequired[PositiveInt | Literal["auto"]]
    p: NotRequired[Positive]
    eps: NotRequired[Positive]
    max_iter: NotRequired[PositiveInt]
    tol: NotRequired[float]


@dataclass(frozen=True)
class ModuleSubspace:
    """What the adapters of one attribute share in one module: ``delta[n]`` is close to ``u v^T`` for most n.

    Attributes:
        u: ``[out, k]`` float32, left singular vectors of the weighted mean times the root of the singular values.
        v: ``[in, k]`` float32, the right ones likewise.
        singular_values: ``[s]`` float64, the whole spectrum of the weighted mean, descending.
        weights: ``[N]`` float64, weight of each adapter in that mean.
    """

    u: torch.Tensor
    v: torch.Tensor
    singular_values: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True)
class SubspaceFile:
    """One subspace file: module name -> `ModuleSubspace`, and its JSON header."""

    modules: dict[str, ModuleSubspace]
    header: dict[str, Any]


def save_subspace(path: Path, modules: Mapping[str, ModuleSubspace], header: Mapping[str, Any]) -> None:
    """Write tensors ``<module>.u``, ``.v``, ``.singular_values``, ``.weights`` and a header with format and version.

    Raises:
        ValueError: something else than a subspace file is at ``path``.
    """
    path = outputs.claim(path, outputs.SUBSPACE)
    tensors = {
        f"{name}.{field}": getattr(module, field).to(torch.float32 if field in "uv" else torch.float64, copy=True)
        for name, module in modules.items()
        for field in _FIELDS
    }
    files.save_tensors(path, tensors, {"format": FORMAT, "version": VERSION, **header})


def load_subspace(path: Path) -> SubspaceFile:
    """Read a subspace file.

    Raises:
        FileNotFoundError: ``path`` does not exist.
        ValueError: truncated, of another format or version, a tensor missing, misshapen or not finite.
    """
    tensors, header = files.load_tensors(path)
    if header.get("format") != FORMAT:
        raise ValueError(f"{path}: header format must be {FORMAT!r}, got {header.get('format')!r}")
    if header.get("version") != VERSION:
        raise ValueError(f"{path}: version must be {VERSION}, got {header.get('version')!r}")
    check(header, _Header, f"{path}: header")
    fields: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, field = key.rpartition(".")
        if field not in _FIELDS or not name:
            raise ValueError(f"{path}: foreign tensor {key!r}; fields are {', '.join(_FIELDS)}")
        files.check_values(path, key, tensor)
        fields.setdefault(name, {})[field] = tensor
    if not fields:
        raise ValueError(f"{path}: must hold at least one module")
    modules = {name: _module(path, name, fields[name]) for name in sorted(fields, key=files.natural)}
    _check_together(path, modules, header)
    return SubspaceFile(modules, header)


def _check_together(path: Path, modules: Mapping[str, ModuleSubspace], header: Mapping[str, Any]) -> None:
    """Every module must have a weight for each adapter, and the header must be about these modules."""
    counts = {name: len(module.weights) for name, module in modules.items()}
    first, count = next(iter(counts.items()))
    for name, other in counts.items():
        if other != count:
            raise ValueError(f"{path}: {name} must have {count} weights as {first}, got {other}")
    # with gradients joined, the weights are theirs
    mined = header.get("join") or header.get("adapters") or []
    if len(mined) not in (0, count):
        raise ValueError(f"{path}: header must name {count} adapters, one for each weight")
    foreign = sorted((header.get("modules") or {}).keys() - modules.keys())
    if foreign:
        raise ValueError(f"{path}: header describes {foreign[0]:.80}, which has no tensors")


def _module(path: Path, name: str, fields: Mapping[str, torch.Tensor]) -> ModuleSubspace:
    for field in _FIELDS:
        if field not in fields:
            raise ValueError(f"{path}: {name} has no {field}")
    module = ModuleSubspace(**fields)
    if module.u.ndim != 2 or module.v.ndim != 2 or module.u.shape[1] != module.v.shape[1]:
        raise ValueError(
            f"{path}: {name} must have u [out, k] and v [in, k], got {list(module.u.shape)} and {list(module.v.shape)}"
        )
    if not (module.u.numel() and module.v.numel()):
        raise ValueError(f"{path}: {name} must have u and v of at least one direction")
    if module.singular_values.ndim != 1 or module.weights.ndim != 1 or not len(module.weights):
        raise ValueError(f"{path}: {name} must have vectors singular_values and weights")
    if not (module.weights > 0).all():
        raise ValueError(f"{path}: {name} must have positive weights")
    values = module.singular_values
    if (values < 0).any() or (values[1:] > values[:-1] * _DESCENDING).any():
        raise ValueError(f"{path}: {name} must have singular_values that descend and are at least 0")
    return module


def find_subspaces(paths: Iterable[Path]) -> dict[str, Path]:
    """Attribute -> subspace file, for files and folders of files; the stem of a file names its attribute.

    Raises:
        FileNotFoundError: a path does not exist, or there is no file at all.
        ValueError: two files have the same stem.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"no such subspace file or folder: {path}")
        inside = sorted(item for item in path.glob("*.safetensors") if not item.name.startswith("."))
        if path.is_dir() and not inside:
            raise FileNotFoundError(f"no subspace file (*.safetensors) in {path}")
        found += inside if path.is_dir() else [path]
    if not found:
        raise FileNotFoundError("no subspace files given")
    named: dict[str, Path] = {}
    for path in found:
        if path.stem in named:
            raise ValueError(f"two subspace files are called {path.stem!r}: {named[path.stem]} and {path}")
        named[path.stem] = path
    return named


def load_subspaces(paths: Iterable[Path]) -> dict[str, SubspaceFile]:
    """The files of `find_subspaces`, read; raises what it and `load_subspace` raise."""
    return {attribute: load_subspace(path) for attribute, path in find_subspaces(paths).items()}
