"""Adapters made from a known shared subspace."""

from typing import NamedTuple

import torch
from torch import Tensor


class Planted(NamedTuple):
    b: Tensor  # [N, out, r]
    a: Tensor  # [N, r, in]
    held_out: Tensor  # [out, in], one more adapter like those that share
    u: Tensor  # [out, k], orthonormal
    v: Tensor  # [in, k]


def _normal(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64)


def in_factors(
    adapters: int, size: int, rank: int, own: bool, noise: float = 0.5, unrelated: int = 0, larger: float = 5.0
) -> Planted:
    """lora_b = u x_n, lora_a = y_n v^T, the same x and y for all unless `own`, and noise in both factors.

    The first `unrelated` adapters have independent factors and `larger` times the norm of the others.
    """
    u, v = (torch.linalg.qr(_normal(size, rank)).Q for _ in range(2))
    count = adapters + 1
    b = u @ _normal(count if own else 1, rank, rank)
    a = _normal(count if own else 1, rank, rank) @ v.T
    b, a = b.expand(count, -1, -1), a.expand(count, -1, -1)
    noise_b, noise_a = _normal(count, size, rank), _normal(count, rank, size)
    b = b + noise * noise_b * (b.norm() / noise_b.norm())
    a = a + noise * noise_a * (a.norm() / noise_a.norm())
    norm = (b @ a).flatten(1).norm(dim=1).mean()
    for n in range(unrelated):
        b[n], a[n] = _normal(size, rank), _normal(rank, size)
        b[n] *= larger * norm / (b[n] @ a[n]).norm()
    return Planted(b[:-1], a[:-1], b[-1] @ a[-1], u, v)


def beside_unrelated(adapters: int, size: int, rank: int, own: bool) -> Planted:
    """delta_n = u c_n v^T + e_n of rank 2 `rank`, with e_n unrelated and as large as the shared part."""
    u, v = (torch.linalg.qr(_normal(size, rank)).Q for _ in range(2))
    count = adapters + 1
    cores = _normal(count, rank, rank) if own else _normal(1, rank, rank).expand(count, -1, -1)
    noise_b, noise_a = _normal(count, size, rank), _normal(count, rank, size)
    ratio = cores.flatten(1).norm(dim=1) / (noise_b @ noise_a).flatten(1).norm(dim=1)
    b = torch.cat([u @ cores, noise_b * ratio[:, None, None]], dim=2)
    a = torch.cat([v.T.expand(count, -1, -1), noise_a], dim=1)
    return Planted(b[:-1], a[:-1], b[-1] @ a[-1], u, v)
