"""One subspace of two sources: output directions of both, input directions of the gradients.

`lora_A` of a tuned adapter starts at random and moves little, so what tuned adapters share on the input side is weak,
while on the output side they have what training found (docs/directions.md has the measured shares).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from subspace3d.formats.subspace import ModuleSubspace


def join(tuned: Mapping[str, ModuleSubspace], gradients: Mapping[str, ModuleSubspace]) -> dict[str, ModuleSubspace]:
    """``u <- `` leading directions of ``[u_t / |u_t| , u_g / |u_g|]``, ``v <- v_g``, module by module.

    The norms make both sources count alike. u gets as many columns as ``v_g`` has; they are no pairs with those of v,
    which a core does not need. Spectrum and weights are those of the gradients.

    Args:
        tuned (Mapping): module -> the subspace of tuned adapters.
        gradients (Mapping): the same of gradient adapters.

    Raises:
        ValueError: the sources have different modules, or a module of different sizes.
    """
    different = sorted(tuned.keys() ^ gradients.keys())
    if different:
        raise ValueError(f"join must have the modules of the adapters: {different[0]} is in only one of the two")
    joined = {}
    for name, gradient in gradients.items():
        own = tuned[name]
        sizes = [(len(each.u), len(each.v)) for each in (own, gradient)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"join: {name} must have one size (out, in), got {sizes[0]} and {sizes[1]}")
        k = gradient.v.shape[1]
        u = _leading(torch.cat([_unit(own.u), _unit(gradient.u)], 1), k)
        joined[name] = ModuleSubspace(u, gradient.v, gradient.singular_values, gradient.weights)
    return joined


def _unit(columns: torch.Tensor) -> torch.Tensor:
    norm = columns.double().norm()  # float32 would overflow from 1e19 on
    return (columns / norm).to(columns.dtype) if norm else columns


def _leading(columns: torch.Tensor, k: int) -> torch.Tensor:
    """``[out, k]``: the k leading principal directions, each as long as its singular value; zeros beyond the rank."""
    left, values, _ = torch.linalg.svd(columns.double(), full_matrices=False)
    kept = min(k, left.shape[1])
    result = columns.new_zeros(len(columns), k)
    result[:, :kept] = (left[:, :kept] * values[:kept]).to(columns.dtype)
    return result
