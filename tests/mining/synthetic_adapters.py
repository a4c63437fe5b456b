"""Adapter folders in PEFT's layout with planted content, and the dense definition of mining they are held against."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

# Two implementations are compared where the weights have come to rest, not where each happens to stop.
AT_REST: dict[str, Any] = {"max_iter": 1000, "tol": 1e-12}

Pair = tuple[torch.Tensor, torch.Tensor]


def write_adapter(folder: Path, modules: Mapping[str, Pair], **config: Any) -> Path:
    """Write (lora_b, lora_a) per module as a PEFT folder; r defaults to the first pair's rank and lora_alpha to r."""
    folder.mkdir(parents=True)
    tensors = {}
    for name, (lora_b, lora_a) in modules.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = lora_a.contiguous().clone()
        tensors[f"base_model.model.{name}.lora_B.weight"] = lora_b.contiguous().clone()
    rank = len(next(iter(modules.values()))[1])
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "base_model_name_or_path": "planted", **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def random_pair(rng: np.random.Generator, out: int, in_: int, rank: int) -> Pair:
    return (
        torch.from_numpy(rng.standard_normal((out, rank))).float(),
        torch.from_numpy(rng.standard_normal((rank, in_))).float(),
    )


def planted_pair(rng: np.random.Generator, left: np.ndarray, right: np.ndarray, spread: float) -> Pair:
    """A factor pair whose update is ``left (I + spread * noise) right^T``: same subspaces, its own mixing."""
    rank = left.shape[1]
    mixing = np.eye(rank) + spread * rng.standard_normal((rank, rank))
    return torch.from_numpy(left @ mixing).float(), torch.from_numpy(right.T.copy()).float()


def orthonormal(rng: np.random.Generator, dim: int, rank: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((dim, rank)))[0]


def dense_mining(deltas: np.ndarray, k: int, p: float, eps: float = 1e-3):
    """The definition, written densely in float64: weighted mean, truncated SVD, new weights, until they rest.

    Args:
        deltas: ``[N, out, in]``.

    Returns:
        ``u v^T [out, in]``, singular values of the weighted mean, relative weights ``w / mean(w) [N]``.
    """
    weights = np.ones(len(deltas))
    scale = eps * np.median(np.linalg.norm(deltas, axis=(1, 2)))
    for _ in range(AT_REST["max_iter"]):
        mean = np.tensordot(weights, deltas, 1) / weights.sum()
        left, values, right = np.linalg.svd(mean, full_matrices=False)
        shared = (left[:, :k] * values[:k]) @ right[:k]
        residuals = np.linalg.norm(deltas - shared, axis=(1, 2))
        new = (scale**2 + residuals**2) ** ((p - 2) / 2)
        moved = np.abs(new / new.mean() / (weights / weights.mean()) - 1).max()
        weights = new
        if p == 2 or moved < AT_REST["tol"]:
            break
    mean = np.tensordot(weights, deltas, 1) / weights.sum()
    left, values, right = np.linalg.svd(mean, full_matrices=False)
    return (left[:, :k] * values[:k]) @ right[:k], values, weights / weights.mean()


def projector(columns: torch.Tensor) -> np.ndarray:
    q = np.linalg.qr(columns.double().numpy())[0]
    return q @ q.T
