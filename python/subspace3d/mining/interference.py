"""How much the attributes get in each other's way: interference of their singular vectors, output and input together.

Eigenvalues of one side say whether two attributes share output directions, or input directions. An update is disturbed
only where it shares both at once, and the more the stronger the shared directions are.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from subspace3d.formats.subspace import SubspaceFile
from subspace3d.mining.cross_validation import mean_of_known

_DRAWS = 16
_SEED = 0


def interference(one: tuple[torch.Tensor, torch.Tensor], two: tuple[torch.Tensor, torch.Tensor]) -> float | None:
    """``|(Q^T Q - I) S (R^T R - I)|_1 / tr S`` of two mined subspaces (task singular vectors, Gargiulo et al. 2025).

    Q = [u_1^ | u_2^] and R = [v_1^ | v_2^] hold unit columns, S the strengths ``|u_j| |v_j|`` of the columns, of each
    subspace divided by their sum, ``|.|_1`` sums magnitudes of entries. 0: on one side or both they have no direction
    in common; 1: the same orthogonal directions.

    Args:
        one (tuple): u ``[out, k]`` and v ``[in, k]``.
        two (tuple): the same of the other.

    Returns:
        float | None: None where one of them is zero.
    """
    columns, strengths = [], []
    for u, v in (one, two):
        lengths = [side.double().norm(dim=0) for side in (u, v)]
        strength = lengths[0] * lengths[1]
        if not strength.any():
            return None
        columns.append([side.double() / length.clamp(min=1e-300) for side, length in zip((u, v), lengths)])
        strengths.append(strength / strength.sum())
    left, right = (torch.cat(sides, 1) for sides in zip(*columns))
    crossed = _off(left) @ torch.diag(torch.cat(strengths)) @ _off(right)
    return float(crossed.abs().sum()) / 2


def _off(columns: torch.Tensor) -> torch.Tensor:
    gram = columns.T @ columns
    return gram - torch.diag(gram.diagonal())


def random_interference(out: int, into: int, k1: int, k2: int) -> float:
    """Mean over random subspaces of these sizes whose directions are equally strong, drawn with a fixed seed."""
    generator = torch.Generator().manual_seed(_SEED)

    def draw(k: int) -> tuple[torch.Tensor, torch.Tensor]:
        sides = [torch.randn(size, k, generator=generator, dtype=torch.float64) for size in (out, into)]
        return torch.linalg.qr(sides[0])[0], torch.linalg.qr(sides[1])[0]

    return statistics.fmean(interference(draw(k1), draw(k2)) or 0.0 for _ in range(_DRAWS))


def compare_attributes(
    subspaces: Mapping[str, SubspaceFile], attributes: Sequence[str], modules: Sequence[str]
) -> list[dict[str, Any]]:
    """Per pair of attributes the score of every module, their mean, and that of random subspaces of the same sizes.

    Modules in which one of the two has nothing count in neither mean; None where no module is left.
    """
    levels: dict[tuple[int, ...], float] = {}
    pairs = []
    for one, two in itertools.combinations(attributes, 2):
        scores: dict[str, float | None] = {}
        random = []
        for name in modules:
            a, b = subspaces[one].modules[name], subspaces[two].modules[name]
            score = interference((a.u, a.v), (b.u, b.v))
            scores[name] = None if score is None else round(score, 6)
            if score is None:
                continue
            size = (len(a.u), len(a.v), a.u.shape[1], b.u.shape[1])
            if size not in levels:
                levels[size] = random_interference(*size)
            random.append(levels[size])
        pairs.append(
            {
                "attributes": [one, two],
                "mean": mean_of_known(scores.values()),
                "mean_random": mean_of_known(random),
                "modules": scores,
            }
        )
    return pairs
