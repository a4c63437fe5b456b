"""Putting an update into a base layer's weight, and saying where that cannot be done."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from subspace_ext.core import WEIGHT_DTYPES, plain_weight

# Relative error that a probe of a base with a forward of its own may show, in units of its dtype's spacing at one.
_PROBE_SPACINGS = 256


def mergeable_weight(base: nn.Module) -> Tensor:
    """The weight [out, ...] of `base` that an update can be added to.

    Raises:
        ValueError: it is computed (a parametrization, weight normalisation), or not stored in floating point.
    """
    weight = base._parameters.get("weight")
    if weight is None:
        raise ValueError(
            f"weight of {type(base).__name__} must be a parameter to merge into, but it is computed from others: "
            "remove the parametrization first"
        )
    if weight.dtype not in WEIGHT_DTYPES or type(weight) not in (Tensor, nn.Parameter):
        raise ValueError(
            f"weight of {type(base).__name__} must be stored in float16, bfloat16, float32 or float64 to merge into, "
            f"got {weight.dtype} in a {type(weight).__name__}"
        )
    return weight


def merged_layer(base: nn.Module, weight: Tensor) -> nn.Module:
    """A layer that shares everything with `base` but its weight, which is `weight`.

    `base` stays as it is, and so does whatever else uses it or its weight.

    Raises:
        ValueError: `weight` is not finite, `mergeable_weight` refuses, or `base` has a forward or hooks of its own in
            which the weight does not act as it does in a plain layer (one random input is tried).
    """
    old = mergeable_weight(base)
    if not torch.isfinite(weight).all():
        raise ValueError("the merged weight must be finite, got NaN or Inf: check c, U, V and scale")
    # Not copy.copy, which parametrized layers refuse. The dictionaries are copied, so that registering something with
    # one layer leaves the other alone.
    layer = type(base).__new__(type(base))
    for name, value in base.__dict__.items():
        layer.__dict__[name] = copy.copy(value) if isinstance(value, dict) else value
    layer._parameters["weight"] = nn.Parameter(weight, requires_grad=old.requires_grad)
    kind = nn.Conv2d if isinstance(base, nn.Conv2d) else nn.Linear
    with torch.no_grad():
        if plain_weight(base, kind) is None:
            _check_by_probe(base, layer, weight - old)
    return layer


def _check_by_probe(base: Any, layer: nn.Module, update: Tensor) -> None:
    options: dict[str, Any] = {"dtype": update.dtype, "device": update.device}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if isinstance(base, nn.Conv2d):
            sizes = [2 * dilation * (size - 1) + 2 for dilation, size in zip(base.dilation, base.kernel_size)]
            x = torch.randn(1, base.in_channels, *sizes, **options)
            added = base._conv_forward(x, update, None) if update.dim() == 4 else None
        else:
            x = torch.randn(2, update.shape[1], **options)
            added = nn.functional.linear(x, update)
        states = torch.get_rng_state()
        before = base(x)
        torch.set_rng_state(states)
        after = layer(x)
    expected = before + added
    error = (after - expected).double().norm()
    if not error <= _PROBE_SPACINGS * torch.finfo(update.dtype).eps * after.double().norm():
        raise ValueError(
            f"{type(base).__name__} must add x w^T to its result to merge into it, but with the merged weight its "
            "forward (or a hook) gives something else than the update beside it"
        )
