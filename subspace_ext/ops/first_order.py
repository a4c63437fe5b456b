"""Backward passes that can be run, and refuse to be differentiated."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_MESSAGE = (
    b"the gradients of a subspace or LoRA layer cannot be differentiated (create_graph=True): what that needs of the "
    b"input is not kept for the backward pass. Under torch.func (grad, jvp, hessian over functional_call) the layers "
    b"run in plain operations, which can be"
)


def first_order(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., Any]:
    """For the `backward` of an autograd.Function: its results raise RuntimeError when differentiated.

    torch's `once_differentiable` gives results without a graph where no incoming gradient requires one, although they
    depend on what was saved: a penalty on the gradient of a last layer would silently train nothing.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            results = backward(ctx, *grads)
        refuse = torch._C._functions.DelayedError(_MESSAGE, len(results))
        # None stays None, which its stub does not say
        return refuse(*(None if result is None else result.detach().requires_grad_() for result in results))  # type: ignore[arg-type]

    return run
