"""Adapters' factors of equal shape stacked, so that a network costs a few batched calls."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

import subspace_ext
from subspace3d.files import natural
from subspace3d.formats.adapter import Adapter
from subspace_ext.mining import vanishing

# A batch of modules may take this much memory: its float64 factors, and about three times that as workspace.
_BATCH_BYTES = 1 << 30
_WORKSPACE_FACTOR = 4
# Random pairs drawn per size, and their seed: enough that mean and 5 % to 95 % range move by about 0.01.
_RANDOM_PAIRS = 64
_RANDOM_SEED = 0

Factors = list[tuple[torch.Tensor, torch.Tensor]]


@dataclasses.dataclass(frozen=True)
class Group:
    """Modules that are mined in one call: equal sizes, equal largest adapter rank, equal k."""

    out_features: int
    in_features: int
    rank: int
    k: int


class Together(Mapping[str, Factors]):
    """Module -> its factors in every adapter, read module by module: what has been mined is not kept in memory."""

    def __init__(self, adapters: Sequence[Adapter], names: Iterable[str]) -> None:
        self._adapters, self._names = adapters, list(names)

    def __getitem__(self, name: str) -> Factors:
        return [adapter.modules[name] for adapter in self._adapters]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def group_modules(factors: Mapping[str, Factors], k: int | Mapping[str, int]) -> dict[Group, list[str]]:
    """Modules by what makes them stackable; a module too narrow for its ``k`` gets ``min(out, in, sum of ranks)``.

    Raises:
        ValueError: ``k`` is larger than the sum of the adapters' ranks in every module.
    """
    groups: defaultdict[Group, list[str]] = defaultdict(list)
    most = 0
    for name in sorted(factors, key=natural):
        module = factors[name]
        ranks = [len(lora_a) for _, lora_a in module]
        out_features, in_features = len(module[0][0]), module[0][1].shape[1]
        most = max(most, sum(ranks))
        own = k if isinstance(k, int) else k[name]
        groups[Group(out_features, in_features, max(ranks), min(own, out_features, in_features, sum(ranks)))].append(
            name
        )
    if isinstance(k, int) and k > most:
        raise ValueError(f"k must be at most the sum of the adapters' ranks, {most}, got {k}")
    return dict(groups)


def largest_rank(factors: Mapping[str, Factors]) -> int:
    """The largest sum of the adapters' ranks in one module, the most that ``k`` may be."""
    return max(sum(len(lora_a) for _, lora_a in module) for module in factors.values())


def batches(group: Group, names: Sequence[str], adapters: int) -> Iterator[Sequence[str]]:
    """The modules of a group in parts whose stacks fit in memory."""
    bytes_per_module = 8 * adapters * group.rank * (group.out_features + group.in_features)
    size = max(1, _BATCH_BYTES // (_WORKSPACE_FACTOR * bytes_per_module))
    for start in range(0, len(names), size):
        yield names[start : start + size]


def _pad(tensor: torch.Tensor, rank: int, dim: int) -> torch.Tensor:
    shape = list(tensor.shape)
    shape[dim] = rank - shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


def stack(group: Group, batch: Sequence[Factors]) -> tuple[torch.Tensor, torch.Tensor]:
    """lora_b ``[L, N, out, r]`` and lora_a ``[L, N, r, in]``, float64; lower ranks are padded with zeros.

    Where an update is zero up to rounding, lora_b is zero: rounding has no directions.
    """
    lora_b = torch.stack([torch.stack([_pad(b, group.rank, 1).double() for b, _ in module]) for module in batch])
    lora_a = torch.stack([torch.stack([_pad(a, group.rank, 0).double() for _, a in module]) for module in batch])
    lora_b[vanishing(lora_b, lora_a)] = 0
    return lora_b, lora_a


def leave_one_out(
    group: Group, lora_b: torch.Tensor, lora_a: torch.Tensor, settings: Mapping[str, Any]
) -> Iterator[tuple[torch.Tensor, torch.Tensor, subspace_ext.MinedSubspace]]:
    """For each adapter its own factors ``[L, 1, out, r]`` and ``[L, 1, r, in]``, and what all the others share.

    Args:
        group: of the modules; k is less where the others' ranks add up to less.
        lora_b: ``[L, N, out, r]``, N of 2 or more.
        lora_a: ``[L, N, r, in]``.
        settings: of `subspace_ext.mine_subspace`.
    """
    count = lora_b.shape[1]
    k = min(group.k, (count - 1) * group.rank)
    for n in range(count):
        others = [other for other in range(count) if other != n]
        mined = subspace_ext.mine_subspace(lora_b[:, others], lora_a[:, others], k, **settings)
        yield lora_b[:, [n]], lora_a[:, [n]], mined


def explained_energy(lora_b: torch.Tensor, lora_a: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """``||P_u delta P_v||_F^2 / ||delta||_F^2``, P the projector on the columns: in 0..1, NaN for a zero update.

    Args:
        lora_b: ``[L, N, out, r]`` float64.
        lora_a: ``[L, N, r, in]`` float64.
        u: ``[L, out, k]``.
        v: ``[L, in, k]``.

    Returns:
        ``[L, N]`` float64.
    """
    return projected_energy(lora_b, lora_a, u, v) / energy(lora_b, lora_a)


def energy(lora_b: torch.Tensor, lora_a: torch.Tensor) -> torch.Tensor:
    """``||delta||_F^2`` ``[L, N]``.

    ``trace(B^T B A A^T)`` is exact to ``2^-52 ||B||^2 ||A||^2``; where the factors nearly cancel, as those of a
    converted PiSSA adapter do (trained minus initial), the product of their triangles takes its place.
    """
    gram_b, gram_a = lora_b.mT @ lora_b, lora_a @ lora_a.mT
    result = (gram_b * gram_a).sum((-2, -1))
    squares = [gram.diagonal(dim1=-2, dim2=-1).sum(-1) for gram in (gram_b, gram_a)]
    close = result < 1e-6 * squares[0] * squares[1]
    if close.any():
        left, right = (torch.linalg.qr(side[close]).R for side in (lora_b, lora_a.mT))
        result[close] = (left @ right.mT).square().sum((-2, -1))
    return result


def projected_energy(lora_b: torch.Tensor, lora_a: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """``||P_u delta P_v||_F^2`` ``[L, N]``, shapes as in `explained_energy`."""
    left = orthonormal(u).unsqueeze(1).mT @ lora_b
    right = lora_a @ orthonormal(v).unsqueeze(1)
    return (left @ right).square().sum((-2, -1))


def orthonormal(columns: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns with the same span, float64; columns beyond the numerical rank become zero."""
    u, s, _ = torch.linalg.svd(columns.double(), full_matrices=False)
    return u * (s > 1e-12 * s[..., :1]).unsqueeze(-2)


def random_cosines(dim: int, k1: int, k2: int) -> torch.Tensor:
    """Cosines of the principal angles between random subspaces of ``dim`` dimensions, descending.

    Returns:
        ``[64, min(k1, k2)]`` float64, a row for each pair drawn; the same sizes always give the same numbers.
    """
    generator = torch.Generator().manual_seed(_RANDOM_SEED)

    def draw(k: int) -> torch.Tensor:
        return torch.linalg.qr(torch.randn(_RANDOM_PAIRS, dim, k, generator=generator, dtype=torch.float64)).Q

    return torch.linalg.svdvals(draw(k1).mT @ draw(k2)).clamp(max=1)
