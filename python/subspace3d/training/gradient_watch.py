"""Says which cores and adapters get no gradient: their layer is never called, or the model reads its weight instead."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import nn

STEPS = 3
"""One is not enough: lora_A gets its first gradient once lora_B, which starts at zero, has moved."""
_NAMED = 5


def watched_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained cores and LoRA factors of ``model``, by name."""
    import subspace_ext as se

    cores = {id(module.c) for module in model.modules() if isinstance(module, se.SubspaceCore)}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (id(parameter) in cores or "lora_" in name)
    }


class GradientWatch:
    """Warns once, with names, of parameters whose gradient was absent or zero in every one of the first steps.

    For a loop of one's own: ``watch = GradientWatch(watched_parameters(model))``, and ``watch.after_backward()``
    between the backward pass of a step and ``optimizer.zero_grad()``.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], steps: int = STEPS) -> None:
        """Args: what to watch, by name; the number of steps to watch it for, at least 1."""
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        self._silent = dict(parameters)
        self._all, self._steps, self._left = len(self._silent), steps, steps

    @torch.no_grad()
    def after_backward(self) -> tuple[str, ...]:
        """Look at the gradients of one step; after the last, return and warn of the names that never had one."""
        if not self._left:
            return ()
        self._left -= 1
        self._silent = {
            name: parameter
            for name, parameter in self._silent.items()
            if parameter.grad is None or not bool(parameter.grad.count_nonzero())
        }
        if self._left or not self._silent:
            return ()
        names = tuple(self._silent)
        shown = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
        warnings.warn(
            f"{len(names)} of {self._all} cores and adapters got no gradient in the first {self._steps} steps: "
            f"{shown}. They stay as they are: their layer is not called, or the model reads its weight instead",
            stacklevel=2,
        )
        return names
