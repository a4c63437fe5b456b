"""Basis files: the frozen U and V of every module, ours and in the layout of the authors' release; and their hash."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from subspace3d import outputs
from subspace3d.files import check_values, load_tensors, natural, save_tensors
from subspace3d.formats.adapter import WEIGHTS_NAME, is_core_key, read_adapter
from subspace3d.log import logger

Basis = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Module name -> (``U [out, K]``, ``V [in, K]``), a convolution unrolled to ``in = Cin * kh * kw``."""
FORMAT = "subspace3d-basis"
_VERSION = 1

_PART = r"(?P<part>attn\.(?:qkv|proj)|mlp\.(?:fc1|fc2))"
# VGGT's aggregator, and the decoder of Pi3, whose frame and global blocks alternate in one list
_AUTHORS_MODULE = re.compile(
    rf"(?:aggregator\.(?P<blocks>frame_blocks|global_blocks)|(?P<decoder>decoder))\.(?P<layer>\d+)\.{_PART}"
)
_AUTHORS_KEY = re.compile(rf"(?P<blocks>frame_blocks|global_blocks|decoder)\.{_PART}\.(?P<layer>\d+)\.(?P<side>[AB])")


def check_basis(what: str, basis: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Raise ValueError, naming ``what`` and the module, unless each has U [out, K] and V [in, K] of finite floats."""
    for name, pair in basis.items():
        sides = list(pair) if isinstance(pair, (tuple, list)) else []
        if len(sides) != 2 or not all(isinstance(side, torch.Tensor) for side in sides):
            got = ", ".join(type(side).__name__ for side in sides) or type(pair).__name__
            raise ValueError(f"{what}: {name} must be a pair of tensors, U [out, K] and V [in, K], got {got}")
        shapes = [list(side.shape) for side in sides]
        if [len(shape) for shape in shapes] != [2, 2] or shapes[0][1] != shapes[1][1] or not shapes[0][1]:
            got = " and ".join(map(str, shapes))
            raise ValueError(f"{what}: {name} must have U [out, K] and V [in, K] with K of 1 or more, got {got}")
        for side in sides:
            check_values(what, name, side)


def save_basis(path: Path, basis: Basis) -> None:
    """Write ``<module>.U`` and ``<module>.V``, float32.

    Raises:
        ValueError: something else than such a file is at ``path``, or `check_basis` refuses; nothing is written then.
    """
    check_basis("basis", basis)
    path = outputs.claim(path, outputs.BASIS)
    tensors = {f"{name}.{key}": value.float() for name, pair in basis.items() for key, value in zip("UV", pair)}
    save_tensors(path, tensors, {"format": FORMAT, "version": _VERSION})


def load_basis(path: Path) -> Basis:
    """Read what `save_basis` wrote, or a file of the method's authors.

    Those are a basis in the layout of their release (``.A`` and ``.B``, `load_authors`), or the weights of a run of
    their code, adapter_model.safetensors, whose frozen bases are taken without its cores (`read_adapter` has both).

    Raises:
        FileNotFoundError: ``path`` does not exist.
        ValueError: truncated, another kind of file, a half missing, or values that are not finite.
    """
    tensors, header = load_tensors(path)
    if not header:
        basis = _bases_of_run(path) if any(map(is_core_key, tensors)) else load_authors(path)
    elif header.get("format") != FORMAT or header.get("version") != _VERSION:
        raise ValueError(
            f"{path}: header format must be {FORMAT!r} version {_VERSION}, got {header.get('format')!r} "
            f"version {header.get('version')!r}"
        )
    else:
        basis = _pairs_of(path, tensors)
    for name, pair in basis.items():
        for side in pair:
            check_values(path, name, side)
            if not side.numel():
                raise ValueError(f"{path}: {name} must have at least one direction")
    return {name: (u.float(), v.float()) for name, (u, v) in basis.items()}


def _bases_of_run(path: Path) -> Basis:
    if path.name != WEIGHTS_NAME:
        raise ValueError(f"{path}: cores are read from an adapter folder, whose weights are called {WEIGHTS_NAME}")
    adapter = read_adapter(path.parent)
    others = len(adapter.modules) - len(adapter.cores)
    beside = f"; {others} plain LoRA pairs are no part of it" if others else ""
    logger.info(f"{path}: the basis is that of its {len(adapter.cores)} cores{beside}")
    return {name: (core.u, core.v.contiguous()) for name, core in adapter.cores.items()}


def _pairs_of(path: Path, tensors: Mapping[str, torch.Tensor]) -> Basis:
    names = list(dict.fromkeys(key.rpartition(".")[0] for key in tensors))
    if not names:
        raise ValueError(f"{path}: must hold at least one module")
    for name in names:
        u, v = tensors.get(f"{name}.U"), tensors.get(f"{name}.V")
        if u is None or v is None or u.ndim != 2 or v.ndim != 2 or u.shape[1] != v.shape[1]:
            raise ValueError(f"{path}: {name} must have U [out, K] and V [in, K]")
    return {name: (tensors[f"{name}.U"], tensors[f"{name}.V"]) for name in names}


def basis_digest(basis: Basis) -> str:
    """sha256 of names, shapes and float32 values, so that equal bases have it in whatever file they lie."""
    digest = hashlib.sha256()
    for name in sorted(basis):
        for side in basis[name]:
            values = side.detach().to("cpu", torch.float32).contiguous()
            digest.update(f"{name} {list(values.shape)};".encode())
            digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def authors_stem(name: str) -> str | None:
    """What the keys of module ``name`` begin with in the authors' layout; None where it has none."""
    match = _AUTHORS_MODULE.fullmatch(name)
    return None if match is None else f"{match['blocks'] or match['decoder']}.{match['part']}.{match['layer']}"


def save_authors(path: Path, basis: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Write a combined basis in the layout of the authors' release: ``A = V^T [K, in]``, ``B = U [out, K]``.

    Args:
        path: safetensors file to write.
        basis: module name -> (U ``[out, K]``, V ``[in, K]``); only the linears of the blocks of VGGT's aggregator or of
            Pi3's decoder have a key in that layout.

    Raises:
        ValueError: a module has no key in the layout, U and V differ in K, or a foreign file is at ``path``.
    """
    path = outputs.claim(path, outputs.TENSORS)
    tensors = {}
    for name, (u, v) in basis.items():
        stem = authors_stem(name)
        if stem is None:
            raise ValueError(
                f"the authors' layout has no key for {name!r}: it holds the linears of the blocks of VGGT's "
                "aggregator and of Pi3's decoder only"
            )
        if u.ndim != 2 or v.ndim != 2 or u.shape[1] != v.shape[1]:
            raise ValueError(f"{name}: U and V must be [out, K] and [in, K], got {list(u.shape)} and {list(v.shape)}")
        tensors[f"{stem}.A"] = v.T
        tensors[f"{stem}.B"] = u
    save_tensors(path, tensors)


def load_authors(path: Path) -> Basis:
    """Read a basis in the layout of the authors' release: module name -> (U ``[out, K]``, V ``[in, K]``).

    Raises:
        FileNotFoundError: ``path`` does not exist.
        ValueError: truncated, a foreign key, a missing half, or halves that differ in K.
    """
    tensors, _ = load_tensors(path)
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = _AUTHORS_KEY.fullmatch(key)
        if match is None or tensor.ndim != 2 or not tensor.is_floating_point():
            raise ValueError(
                f"{path}: {key!r} {list(tensor.shape)} {tensor.dtype} is foreign; keys are "
                "{frame_blocks|global_blocks|decoder}.{attn.qkv|attn.proj|mlp.fc1|mlp.fc2}.{layer}.{A|B}, matrices"
            )
        stack = "decoder" if match["blocks"] == "decoder" else f"aggregator.{match['blocks']}"
        halves.setdefault(f"{stack}.{match['layer']}.{match['part']}", {})[match["side"]] = tensor
    basis = {}
    for name in sorted(halves, key=natural):
        half = halves[name]
        for side in "AB":
            if side not in half:
                raise ValueError(f"{path}: {name} has no {side}")
        if half["A"].shape[0] != half["B"].shape[1]:
            raise ValueError(
                f"{path}: {name} must have A [K, in] and B [out, K], "
                f"got {list(half['A'].shape)} and {list(half['B'].shape)}"
            )
        basis[name] = (half["B"], half["A"].T.contiguous())
    return basis
