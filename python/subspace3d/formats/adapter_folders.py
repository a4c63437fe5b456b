"""Which folders below a root are LoRA adapters, and which are checkpoints or copies of one."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from subspace3d import files
from subspace3d.formats.adapter import CONFIG_NAME, WEIGHTS_NAME, deciding

_PICKLE_NAME = "adapter_model.bin"
_TRAINER = re.compile(r"checkpoint-\d+")  # of transformers' trainer, beside its final adapter
_AUTHORS = re.compile(r"lora-save-\d+")  # of the method's authors' trainer, beside lora-save, its last adapter
_STEP = re.compile(r"step_\d+")  # RUN/checkpoints/step_N/adapter, of a run of this package


@dataclass
class AdapterFolders:
    """What `search_adapters` found.

    Attributes:
        folders: adapters, sorted by path.
        checkpoints: adapters of earlier steps of a training whose result is another folder.
        copies: folder -> the adapter in ``folders`` with the same weights, byte for byte, scaling and base model.
    """

    folders: list[Path] = field(default_factory=list)
    checkpoints: list[Path] = field(default_factory=list)
    copies: dict[Path, Path] = field(default_factory=dict)

    def all(self) -> list[Path]:
        """Those that are mined and those that are left out."""
        return [*self.folders, *self.checkpoints, *self.copies]

    def summary(self) -> str:
        """How many were taken, and how many were left out and why."""
        text = f"{len(self.folders)} adapter{'s' * (len(self.folders) != 1)} taken"
        if self.checkpoints:
            text += f"; left out: {len(self.checkpoints)} checkpoints of them (such as {self.checkpoints[0]})"
        if self.copies:
            copy, original = next(iter(self.copies.items()))
            text += f"; left out: {len(self.copies)} copies (such as {copy} of {original})"
        return text


def find_adapters(root: Path) -> list[Path]:
    """The ``folders`` of `search_adapters`."""
    return search_adapters(root).folders


def search_adapters(root: Path) -> AdapterFolders:
    """Every folder at or below ``root`` that holds a PEFT adapter; links are followed, hidden folders left out.

    Raises:
        FileNotFoundError: ``root`` is not a folder, or no adapter is below it.
        ValueError: a folder has an adapter configuration but no safetensors weights; or there are several checkpoints
            of one training without its result, so that which of them is meant cannot be told.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"adapters: no such folder: {root}")
    candidates = sorted(folder for folder, _, names in files.walk(root) if CONFIG_NAME in names)
    for folder in candidates:
        if not (folder / WEIGHTS_NAME).is_file():
            raise ValueError(f"{folder} has {CONFIG_NAME} but {_without_weights(folder)}")
    result = AdapterFolders()
    final = set(candidates)
    by_hash: dict[tuple[str, ...], Path] = {}
    for folder in candidates:
        if _is_checkpoint(folder, root, final):
            result.checkpoints.append(folder)
            continue
        # a set of target modules has another order in every process that saves it: the bytes of the rest say little
        digest = files.sha256(folder / WEIGHTS_NAME), deciding(folder / CONFIG_NAME)
        if digest in by_hash:
            result.copies[folder] = by_hash[digest]
        else:
            by_hash[digest] = folder
            result.folders.append(folder)
    _refuse_loose_checkpoints(result.folders)
    if not result.folders:
        raise FileNotFoundError(f"no adapter ({CONFIG_NAME} and {WEIGHTS_NAME}) at or below {root}")
    return result


def _without_weights(folder: Path) -> str:
    if (folder / _PICKLE_NAME).is_file():
        return f"only {_PICKLE_NAME}: only {WEIGHTS_NAME} is read, never a pickle"
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(others) > 1:
        return (
            f"its weights in {len(others)} files ({others[0]}, ...): load it with PEFT and save it in one, "
            f"{WEIGHTS_NAME}: save_pretrained(...)"
        )
    if others:
        return f"{others[0]} in the place of {WEIGHTS_NAME}: rename it, if that is what it is"
    return f"no weights, {WEIGHTS_NAME}"


def _is_checkpoint(folder: Path, root: Path, adapters: set[Path]) -> bool:
    inside = [folder, *folder.parents][: len(folder.relative_to(root).parts)]
    if any(_TRAINER.fullmatch(part.name) and part.parent in adapters for part in inside):
        return True
    if any(_AUTHORS.fullmatch(part.name) and part.parent / "lora-save" in adapters for part in inside):
        return True
    return bool(_STEP.fullmatch(folder.parent.name)) and folder.parent.parent.name == "checkpoints"


def _refuse_loose_checkpoints(folders: list[Path]) -> None:
    kinds = (_TRAINER, _AUTHORS)
    parents = Counter(folder.parent for folder in folders if any(kind.fullmatch(folder.name) for kind in kinds))
    for parent, count in parents.items():
        if count > 1:
            raise ValueError(
                f"{parent} holds {count} checkpoints of one training and no adapter of its own: copy the one that is "
                f"meant there ({CONFIG_NAME} and {WEIGHTS_NAME})"
            )
