"""Activation checkpointing for networks that do not offer it: chosen modules are recomputed in the backward pass."""

from __future__ import annotations

import functools
import re
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute(model: nn.Module, expression: str, enabled: bool) -> list[str]:
    """Make the modules whose full names match ``expression`` keep their inputs alone for the backward pass.

    Independent of training and evaluation mode. Outputs and gradients stay what they are.

    Returns:
        names of the modules.

    Raises:
        ValueError: nothing matches.
    """
    pattern = re.compile(expression)
    found = {name: module for name, module in model.named_modules() if pattern.fullmatch(name)}
    if not found:
        raise ValueError(f"blocks must match at least one module name, {expression!r} matches none")
    for module in found.values():
        module.__dict__.pop("forward", None)
        if enabled:
            module.forward = functools.partial(_run, module)
    return list(found)


def _run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = functools.partial(type(module).forward, module)
    if torch.is_grad_enabled():
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    return forward(*args, **kwargs)
