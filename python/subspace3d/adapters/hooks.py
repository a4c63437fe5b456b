"""What a tuning method may ask of a training loop besides gradient steps."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from subspace3d.adapters.adalora import AdaLoraHook


class MethodHook(Protocol):
    """A loop adds extra_loss() to its loss, calls after_step() after optimizer.step(), and checkpoints tensors()."""

    def extra_loss(self) -> torch.Tensor:
        """A scalar with a gradient, called once per step, outside autocast."""

    def after_step(self, step: int) -> None:
        """``step`` optimiser steps are done; gradients are still in place. Not called after a step that was skipped."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """State by name; a checkpoint is loaded by copying into these tensors."""


def method_hook(model: nn.Module) -> MethodHook | None:
    """The hook of the method that `apply_method` put on ``model``; none for methods that need nothing.

    ``model`` must lie on the device it is trained on.
    """
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    return AdaLoraHook(model) if any(config.peft_type == "ADALORA" for config in configs.values()) else None
