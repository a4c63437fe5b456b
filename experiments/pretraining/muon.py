"""Muon for the matrices of transformer blocks, AdamW for everything else, as one optimiser.

Muon (K. Jordan et al., 2024, https://kellerjordan.github.io/posts/muon): the update of a matrix is its momentum with
all singular values brought near one. Scaled as in J. Liu et al., Muon is Scalable for LLM Training (2025), so that
rates and decays of AdamW serve for both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from subspace3d.training.device import Processes

_MOMENTUM = 0.95
_BETAS = (0.9, 0.95)
_EPS = 1e-8
_ADAMW_RMS = 0.2  # root mean square of a usual update of AdamW
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """``W -= lr (0.2 sqrt(max(m, n)) orthogonalize(0.05 g + 0.95 momentum) + weight_decay W)`` for ``matrices``.

    Groups without ``matrices`` follow AdamW with betas 0.9 and 0.95. State has the names of AdamW's: the momentum is
    ``exp_avg``; ``exp_avg_sq`` of a matrix stays zero.

    Args:
        groups (Iterable[dict]): ``params``, ``weight_decay``, ``matrices`` (bool), ``parts``: into how many of equal
            height each matrix is cut first.
        lr (float): of both.
        processes (Processes | None): all with the same parameters and gradients; each makes some matrices orthogonal.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, processes: Processes | None = None) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0, "matrices": False, "parts": 1})
        self._processes = processes or Processes()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        matrices: list[tuple[nn.Parameter, float]] = []
        directions: list[Tensor] = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros(())
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
                state["step"] += 1
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                if group["matrices"]:
                    momentum = state["exp_avg"].lerp_(parameter.grad, 1 - _MOMENTUM)
                    parts = parameter.grad.lerp(momentum, _MOMENTUM).unflatten(0, (group["parts"], -1))
                    matrices.append((parameter, group["lr"] * _ADAMW_RMS * max(parts.shape[1:]) ** 0.5))
                    directions.append(parts)
                else:
                    parameter.sub_(self._other(parameter.grad, state, group), alpha=group["lr"])
        for (parameter, size), update in zip(matrices, _orthogonalize_shared(directions, self._processes)):
            parameter.sub_(update.flatten(0, 1), alpha=size)

    def _other(self, gradient: Tensor, state: Mapping[str, Tensor], group: Mapping[str, Any]) -> Tensor:
        first = state["exp_avg"].lerp_(gradient, 1 - _BETAS[0])
        second = state["exp_avg_sq"].lerp_(gradient.square(), 1 - _BETAS[1])
        step = float(state["step"])
        root = (second / (1 - _BETAS[1] ** step)).sqrt_().add_(_EPS)
        return (first / (1 - _BETAS[0] ** step)).div_(root)


def orthogonalize(matrices: Tensor) -> Tensor:
    """About ``U V^T`` of ``matrices = U S V^T`` [..., m, n]: singular values of 0.7 to 1.2 by five Newton-Schulz steps.

    ``X <- a X + (b A + c A^2) X`` with ``A = X X^T``, from ``X = M / |M|_F``. A zero matrix stays zero. float32
    is computed in bfloat16, whose rounding is small beside the spread of the values, in a third of the time.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x.bfloat16() if x.dtype == torch.float32 else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-12)
    a, b, c = _COEFFICIENTS
    multiply_add = torch.addmm if x.ndim == 2 else torch.baddbmm
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = multiply_add(x, multiply_add(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


def _orthogonalize_shared(matrices: list[Tensor], processes: Processes) -> list[Tensor]:
    """`orthogonalize` of each, which takes a quarter of a step on one core: every process does a part, all get all."""
    if processes.count == 1 or not matrices:
        return [orthogonalize(matrix) for matrix in matrices]
    shares: list[list[int]] = [[] for _ in range(processes.count)]
    costs = [0] * processes.count
    for index in sorted(range(len(matrices)), key=lambda index: -_cost(matrices[index])):
        rank = costs.index(min(costs))
        shares[rank].append(index)
        costs[rank] += _cost(matrices[index])
    longest = max(sum(matrices[index].numel() for index in share) for share in shares)
    packed = matrices[0].new_zeros(longest)
    mine = [orthogonalize(matrices[index]).flatten() for index in shares[processes.rank]]
    if mine:
        torch.cat(mine, out=packed[: sum(part.numel() for part in mine)])
    updates = list(matrices)
    for share, gathered in zip(shares, processes.gather(packed, packed.device)):
        sizes = [matrices[index].numel() for index in share]
        for index, part in zip(share, gathered[: sum(sizes)].to(packed.device).split(sizes)):
            updates[index] = part.view_as(matrices[index])
    return updates


def _cost(matrices: Tensor) -> int:
    return matrices.numel() * min(matrices.shape[-2:])


def muon_groups(parameters: Mapping[str, nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Groups for `Muon`: matrices of blocks; joint projections of queries, keys and values; other weights; the rest."""
    kinds: dict[str, list[nn.Parameter]] = {"matrix": [], "qkv": [], "weight": [], "other": []}
    for name, parameter in parameters.items():
        weight = parameter.ndim >= 2 and name.endswith("weight")
        block = weight and parameter.ndim == 2 and (".attn." in name or ".mlp." in name)
        kind = "qkv" if block and ".qkv." in name else "matrix" if block else "weight" if weight else "other"
        kinds[kind].append(parameter)
    return [
        {"params": kinds["matrix"], "weight_decay": weight_decay, "matrices": True},
        {"params": kinds["qkv"], "weight_decay": weight_decay, "matrices": True, "parts": 3},
        {"params": kinds["weight"], "weight_decay": weight_decay},
        {"params": kinds["other"]},
    ]
