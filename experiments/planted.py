"""Bad adapters among good ones: how they are made, and what they do to the mined subspaces."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from experiments.layout import Layout
from experiments.plan import Mined
from experiments.scale import Scale
from subspace3d.adapters.basis import select_files
from subspace3d.files import atomic_folder, load_tensors, read_json, save_tensors, write_json
from subspace3d.formats.adapter import WEIGHTS_NAME, read_adapter
from subspace3d.formats.scene import find_scenes
from subspace3d.formats.subspace import SubspaceFile, load_subspace
from subspace3d.mining.cross_validation import overlap

NOISE_STRENGTH = 3.0
"""Frobenius norm of the noise adapter's updates, over the largest of the good adapters' in the same module."""
NOISE, WRONG = "noise", "wrong"


def write_wrong_scenes(attributes: Path, out: Path) -> None:
    """Per attribute one data set whose images belong to other depths and cameras: ``out/<attribute>/wrong``.

    Images are those of the attribute's first data set, everything else is that of its second. Within a data set
    shuffling would change nothing where neither geometry nor cameras vary.
    """
    for attribute in sorted(path for path in attributes.iterdir() if path.is_dir()):
        first, second = sorted({scene.parent for scene in find_scenes(attribute)})[:2]
        target = out / attribute.name / WRONG
        if target.is_dir():
            continue
        with atomic_folder(target) as temporary:
            for seen, true in zip(find_scenes(first), find_scenes(second)):
                shutil.copytree(true, temporary / true.name, ignore=shutil.ignore_patterns("images"))
                shutil.copytree(seen / "images", temporary / true.name / "images")


def gather(good: Path, wrong: Path, out: Path) -> None:
    """Per attribute the good adapters, the one tuned on wrong scenes, and one of noise: ``out/<attribute>/...``."""
    for attribute in sorted(path for path in good.iterdir() if path.is_dir() and not path.name.startswith(".")):
        target = out / attribute.name
        if target.is_dir():
            continue
        adapters = sorted(path.parent for path in attribute.glob(f"*/{WEIGHTS_NAME}"))
        with atomic_folder(target) as temporary:
            for adapter in adapters:
                shutil.copytree(adapter, temporary / adapter.name)
            shutil.copytree(wrong / attribute.name / WRONG, temporary / WRONG)
            write_noise(adapters, temporary / NOISE)


def write_noise(good: Sequence[Path], out: Path) -> None:
    """An adapter of Gaussian factors, `NOISE_STRENGTH` times as large as the largest good one in every module."""
    norms: dict[str, float] = {}
    for folder in good:
        for name, (lora_b, lora_a) in read_adapter(folder).modules.items():
            norms[name] = max(norms.get(name, 0.0), float(torch.linalg.matrix_norm(lora_b @ lora_a)))
    shutil.copytree(good[0], out)
    tensors, _ = load_tensors(out / WEIGHTS_NAME)
    generator = torch.Generator().manual_seed(0)
    noise = {key: torch.randn(tensor.shape, generator=generator) for key, tensor in tensors.items()}
    save_tensors(out / WEIGHTS_NAME, noise)
    for name, (lora_b, lora_a) in read_adapter(out).modules.items():
        key = f"base_model.model.{name}.lora_B.weight"
        noise[key] *= NOISE_STRENGTH * norms[name] / float(torch.linalg.matrix_norm(lora_b @ lora_a))
    save_tensors(out / WEIGHTS_NAME, noise)


def compare(layout: Layout, scale: Scale, sets: Sequence[Mined]) -> None:
    """Write OUT/mining.json: how far the planted adapters moved the subspaces of IRLS and of the plain mean.

    Per kind of mining and attribute ``kept``: mean over modules of ``||Q_clean^T Q_planted||_F^2 / k`` for u and v,
    Q orthonormal; 1 where nothing moved. ``weights``: mean relative weight of every adapter, 1 like the others.
    """
    from subspace3d.mining.mine import mean_relative_weights

    path = layout.out / "mining.json"
    before: dict[str, Any] = read_json(path) if path.is_file() else {}
    result = dict(before)
    for mined in sets:
        clean = replace(mined, planted=False)
        if not mined.planted or clean not in sets:
            continue
        rows = {}
        for attribute, path in select_files((layout.subspaces(mined),)).items():
            moved = load_subspace(path)
            weights = mean_relative_weights(moved).tolist()
            names = [adapter["path"] for adapter in moved.header["adapters"]]
            rows[attribute] = {
                "kept": kept_share(load_subspace(layout.subspaces(clean) / path.name), moved),
                "weights": {name: round(value, 4) for name, value in zip(names, weights)},
            }
        result["mean" if mined.p == 2 else "irls"] = rows
    if result != before:
        write_json(path, result)


def kept_share(clean: SubspaceFile, moved: SubspaceFile) -> float:
    """Mean over modules and both sides of ``||Q_clean^T Q_moved||_F^2 / k``, in 0..1."""
    shares = []
    for name, module in clean.modules.items():
        for side in ("u", "v"):
            ours, theirs = (getattr(part, side)[None] for part in (module, moved.modules[name]))
            shares.append(float(overlap(ours, theirs)))
    return round(statistics.fmean(shares), 6)
