"""Training checkpoints: OUT/checkpoints/step_N with what was trained, the optimiser's state and the counters."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from subspace3d.files import atomic_folder, load_tensors, read_json, save_tensors, write_json

_KEPT = 2
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def save(
    folder: Path, step: int, parameters: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer, state: dict
) -> Path:
    """Write ``folder/step_<step>`` under a temporary name, rename it, and drop all but the newest two.

    Args:
        folder (Path): the run's checkpoints folder.
        step (int): optimiser steps done.
        parameters (Mapping): the trained parameters by name; frozen ones are not saved.
        optimizer (Optimizer): AdamW over ``parameters``.
        state (dict): counters and settings, JSON values; ``step`` is added.
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
        write_json(temporary / "state.json", {"step": step, **state})
    for old in _steps(folder)[:-_KEPT]:
        shutil.rmtree(folder / f"step_{old}")
    return path


def latest(folder: Path) -> Path | None:
    """The checkpoint of the highest step below ``folder``; none if there is none."""
    steps = _steps(folder)
    return folder / f"step_{steps[-1]}" if steps else None


def read_state(path: Path) -> dict[str, Any]:
    """The counters and settings of a checkpoint."""
    return read_json(path / "state.json")


def load(path: Path, parameters: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's weights and optimiser state in place.

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
            # copied: what was read is a map of the file
            optimizer.state[parameter] = {
                moment: moments[f"{name}.{moment}"].to(parameter.device, copy=True) for moment in _MOMENTS
            }


def _steps(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    found = (re.fullmatch(r"step_(\d+)", entry.name) for entry in folder.iterdir() if entry.is_dir())
    return sorted(int(match.group(1)) for match in found if match)
