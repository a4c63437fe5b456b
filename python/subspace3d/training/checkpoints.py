"""Training checkpoints: OUT/checkpoints/step_N with what was trained, optimiser, random state and counters."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import torch

from subspace3d.files import (
    DamagedError,
    atomic_folder,
    discard,
    is_leftover,
    load_tensors,
    read_record,
    save_tensors,
    sweep,
    write_json,
)
from subspace3d.schema import NOT_NEGATIVE, Count, PositiveInt, check

KEPT = 2
"""Checkpoints that are kept: the newest ones. An older one goes only after a newer one stands under its name."""
_CONTENT = {"model.safetensors", "optimizer.safetensors", "extra.safetensors", "adapter", "state.json"}
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class State(TypedDict):
    """state.json: the step, and of what `save` was given what `train` reads back."""

    step: Count
    settings: NotRequired[dict[str, Any]]
    processes: NotRequired[PositiveInt]
    skipped: NotRequired[Count]
    skipped_in_a_row: NotRequired[Count]
    images: NotRequired[Count]
    losses: NotRequired[list[float]]
    seconds: NotRequired[Annotated[float, NOT_NEGATIVE]]
    peak_memory_bytes: NotRequired[Count]


def save(
    folder: Path,
    step: int,
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    state: dict,
    tensors: Mapping[str, torch.Tensor] | None = None,
    snapshot: Callable[[Path], object] | None = None,
) -> Path:
    """Write ``folder/step_<step>`` under a temporary name, rename it, and drop all but the newest two.

    Whatever goes wrong (a full disk, a kill), the checkpoints that stood before still stand, whole.

    Args:
        folder (Path): the run's checkpoints folder.
        step (int): optimiser steps done.
        parameters (Mapping): the trained parameters by name; frozen ones are not saved.
        optimizer (Optimizer): AdamW over ``parameters``.
        state (dict): counters and settings, JSON values; ``step`` is added.
        tensors (Mapping | None): further state to keep, such as that of the random generators.
        snapshot (Callable | None): writes the model into the folder it is given, in a form others can load; the folder
            is ``adapter`` in the checkpoint.
    """
    path = folder / f"step_{step}"
    with atomic_folder(path) as temporary:
        save_tensors(temporary / "model.safetensors", dict(parameters))
        moments = {
            f"{name}.{moment}": optimizer.state[parameter][moment]
            for name, parameter in parameters.items()
            if parameter in optimizer.state
            for moment in _MOMENTS
        }
        save_tensors(temporary / "optimizer.safetensors", moments)
        save_tensors(temporary / "extra.safetensors", dict(tensors or {}))
        if snapshot is not None:
            snapshot(temporary / "adapter")
        write_json(temporary / "state.json", {"step": step, **state})
    for old in _steps(folder)[:-KEPT]:
        if not foreign_content(folder / f"step_{old}"):
            discard(folder / f"step_{old}")
    return path


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints below ``folder``, that of the highest step first."""
    return [folder / f"step_{step}" for step in reversed(_steps(folder))]


def latest(folder: Path) -> Path | None:
    """The checkpoint of the highest step below ``folder``; none if there is none."""
    return next(iter(newest_first(folder)), None)


def remove_unfinished(folder: Path) -> None:
    """Delete what a process that was killed while it saved or dropped one has left under temporary names."""
    sweep(folder)


def remove_all(folder: Path) -> None:
    """Delete the checkpoints below ``folder``, and ``folder`` if nothing else is in it."""
    check_removable(folder)
    sweep(folder)
    for path in newest_first(folder):
        discard(path)
    with contextlib.suppress(OSError):
        folder.rmdir()


def check_removable(folder: Path) -> None:
    """Raises ValueError if something in ``folder`` is not a checkpoint's."""
    found = newest_first(folder)
    entries = list(folder.iterdir()) if folder.is_dir() else []
    foreign = [entry for entry in entries if entry not in found and not is_leftover(entry.name)]
    foreign += [path / name for path in found for name in foreign_content(path)]
    if foreign:
        raise ValueError(f"out: {folder} must hold nothing but checkpoints to start over in it, got {foreign[0]}")


def read_state(path: Path, names: Iterable[str] = ("step",)) -> dict[str, Any]:
    """The counters and settings of a checkpoint, ``names`` among them.

    Raises:
        DamagedError: state.json is not what `save` wrote; names it.
    """
    state: dict[str, Any] = read_record(path / "state.json")
    try:
        check(state, State, path / "state.json")
    except ValueError as error:
        raise DamagedError(str(error)) from None
    if path.name != f"step_{state['step']}":
        raise DamagedError(f"{path / 'state.json'}: step must be that of {path.name}, got {state['step']}")
    missing = sorted(set(names) - state.keys())
    if missing:
        raise DamagedError(f"{path / 'state.json'} must have {', '.join(missing)}")
    return state


def load(
    path: Path, parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """Put a checkpoint's weights and optimiser state in place; returns the further tensors `save` was given.

    Raises:
        ValueError: the checkpoint trains other parameters, or a shape differs; names the first of them.
    """
    weights, _ = load_tensors(path / "model.safetensors")
    foreign = sorted(weights.keys() ^ parameters.keys())
    if foreign:
        raise ValueError(f"{path} does not hold the parameters of this run: {len(foreign)} differ, e.g. {foreign[0]!r}")
    moments, _ = load_tensors(path / "optimizer.safetensors")
    for name, parameter in parameters.items():
        if weights[name].shape != parameter.shape:
            raise ValueError(
                f"{path}: {name} must have shape {tuple(parameter.shape)}, got {tuple(weights[name].shape)}"
            )
        with torch.no_grad():
            parameter.copy_(weights[name])
        if f"{name}.step" in moments:
            shapes = [tuple(moments[f"{name}.{moment}"].shape) for moment in _MOMENTS if f"{name}.{moment}" in moments]
            if shapes != [(), tuple(parameter.shape), tuple(parameter.shape)]:
                raise ValueError(f"{path}: optimiser state of {name} must fit shape {tuple(parameter.shape)}: {shapes}")
            # copied: what was read is a map of the file
            optimizer.state[parameter] = {
                moment: moments[f"{name}.{moment}"].to(parameter.device, copy=True) for moment in _MOMENTS
            }
    extra, _ = load_tensors(path / "extra.safetensors")
    return {name: tensor.clone() for name, tensor in extra.items()}


def _steps(folder: Path) -> list[int]:
    """Steps of the checkpoints `save` has written; what else may stand in ``folder`` is none of them."""
    if not folder.is_dir():
        return []
    found = (re.fullmatch(r"step_(\d+)", entry.name) for entry in folder.iterdir() if _is_checkpoint(entry))
    return sorted(int(match.group(1)) for match in found if match)


def _is_checkpoint(path: Path) -> bool:
    return (path / "state.json").is_file()


def foreign_content(path: Path) -> list[str]:
    """Names in a checkpoint that `save` has not written; one that has any is never deleted."""
    return sorted({entry.name for entry in path.iterdir()} - _CONTENT)
