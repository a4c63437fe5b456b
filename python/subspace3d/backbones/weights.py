"""Reading and writing the weights of a VGGT."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from subspace3d import outputs
from subspace3d.backbones.torch_weights import read_state_dict
from subspace3d.files import load_tensors, save_tensors
from subspace3d.log import logger

HUB_REPOSITORY = "facebook/VGGT-1B"
HUB_FILE = "model.safetensors"
_WRAPPER_KEYS = ("model", "state_dict", "model_state_dict")
_PREFIXES = ("_orig_mod.", "module.")  # torch.compile's, DataParallel's
_LISTED = 4  # names in a message
_COMPILED = re.compile(r"(^|\.)_orig_mod\.")
IGNORED_PARTS = ("point_head", "track_head")
"""Parts of a published checkpoint that this implementation leaves out."""


@dataclass(frozen=True)
class LoadSummary:
    """What `load_weights` did: tensors copied, and tensors left aside for each ignored part."""

    loaded: int
    ignored: dict[str, int]


def load_weights(
    model: nn.Module,
    path: str | os.PathLike[str],
    ignored_parts: Collection[str] = IGNORED_PARTS,
    prefixes: Sequence[str] = (),
) -> LoadSummary:
    """Copy the weights in ``path`` into ``model``, converted to its types; a model on the meta device gets storage.

    Args:
        model: the network.
        path: ``.safetensors``, or ``.pt`` / ``.pth`` / ``.bin`` holding a state dict, alone or under ``model``,
            ``state_dict`` or ``model_state_dict``; prefixes of torch.compile and DataParallel are taken off.
        ignored_parts: first parts of names that are left aside.
        prefixes: taken off, too, where every name has them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a whole file of that kind, or its names and shapes are not those of ``model``.
    """
    path = Path(path)
    stored = _unwrap(path, _read(path), (*_PREFIXES, *prefixes))
    ignored = Counter(part for name in stored if (part := name.partition(".")[0]) in ignored_parts)
    stored = {name: tensor for name, tensor in stored.items() if name.partition(".")[0] not in ignored_parts}
    expected = _expected(model, stored)
    _check_fit(path, stored, expected)
    # Tensors of the file are memory maps: copied one by one, the file is never in memory as a whole.
    with torch.no_grad():
        for name, target in expected.items():
            if target.is_meta:
                owner, _, attribute = name.rpartition(".")
                old = model.get_parameter(name)
                value = nn.Parameter(stored.pop(name).to("cpu", target.dtype, copy=True), old.requires_grad)
                setattr(model.get_submodule(owner), attribute, value)
            else:
                target.copy_(stored.pop(name))
    return LoadSummary(loaded=len(expected), ignored=dict(ignored))


def save_weights(model: nn.Module, path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
    """Write the state dict of ``model`` as safetensors, converted to ``dtype`` if one is given.

    Raises:
        ValueError: a weight is not finite, or not any more once converted; or a foreign file is at ``path``.
    """
    path = outputs.claim(Path(path), outputs.TENSORS)
    tensors = {name: tensor if dtype is None else tensor.to(dtype) for name, tensor in model.state_dict().items()}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"weights must be finite as {tensor.dtype}, {name} is not")
    save_tensors(path, tensors)


def download_from_hub(name: str) -> Path:
    """Path of the published weights in the local Hugging Face cache, downloaded if they are not there.

    Raises:
        ValueError: there are no published weights of ``name``.
        ModuleNotFoundError: huggingface_hub is not installed; PEFT brings it.
    """
    if name != "vggt-1b":
        raise ValueError(f"weights='hub' exists for vggt-1b only, got {name!r}")
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(HUB_REPOSITORY, HUB_FILE))


def _read(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise FileNotFoundError(f"no such weights file: {path}")
    if path.suffix == ".safetensors":
        return load_tensors(path)[0]
    if path.suffix not in (".pt", ".pth", ".bin"):
        raise ValueError(f"weights must be a .safetensors or .pt file, got {path}")
    return _state_dict(path, read_state_dict(path))


def _state_dict(path: Path, content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a file, which may lie under the one key that training scripts use."""
    wrapper = next((key for key in _WRAPPER_KEYS if isinstance(content.get(key), dict)), None)
    if wrapper is not None:
        others = _first(sorted(str(key) for key in content if key != wrapper)) or "nothing"
        logger.info(f"{path}: the weights are those under {wrapper!r}; beside them: {others}")
        content = content[wrapper]
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    foreign = [name for name in content if name not in tensors]
    if foreign:
        raise ValueError(
            f"{path} must hold a plain state dict (name -> tensor), alone or under {' or '.join(_WRAPPER_KEYS)}; "
            f"{foreign[0]!r:.80} is a {type(content[foreign[0]]).__name__}"
        )
    return tensors


def _unwrap(path: Path, tensors: dict[str, Tensor], prefixes: Sequence[str]) -> dict[str, Tensor]:
    """Take the prefixes of torch.compile, at any depth, and others that every name has off the names, and say so.

    ``module.`` is a wrapper's only where every name has it, since a module may be called so.
    """
    while tensors:
        prefix = next((each for each in prefixes if all(name.startswith(each) for name in tensors)), None)
        if prefix is not None:
            plain = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        else:
            prefix, plain = "_orig_mod.", {_COMPILED.sub(r"\1", name): tensor for name, tensor in tensors.items()}
        count = len(tensors.keys() - plain.keys())
        if not count:
            break
        if len(plain) < len(tensors):
            raise ValueError(f"{path}: names differ in the wrapper's prefix {prefix!r} alone: which of them is meant?")
        of = "every name" if count == len(tensors) else f"{count} of {len(tensors)} names"
        logger.info(f"{path}: the wrapper's prefix {prefix!r} was taken off {of}")
        tensors = plain
    return tensors


def _expected(model: nn.Module, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's tensors; of one that it has under several names those names that are stored, or else all."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    others = {
        name
        for same in names.values()
        if len(same) > 1 and any(name in stored for name in same)
        for name in same
        if name not in stored
    }
    return {name: tensor for name, tensor in model.state_dict().items() if name not in others}


def _check_fit(path: Path, stored: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless names and shapes agree."""
    problems = {
        "missing": [name for name in expected if name not in stored],
        "unexpected": [name for name in stored if name not in expected],
        "of another shape": [
            f"{name} {tuple(stored[name].shape)} instead of {tuple(tensor.shape)}"
            for name, tensor in expected.items()
            if name in stored and stored[name].shape != tensor.shape
        ],
    }
    texts = [f"{len(names)} {kind} ({_first(names)})" for kind, names in problems.items() if names]
    if texts:
        raise ValueError(f"{path} does not fit the model: tensors {'; '.join(texts)}")


def _first(names: list[str]) -> str:
    return ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")
