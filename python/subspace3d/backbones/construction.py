"""Building networks of other packages: on whatever device is the default, and with the same precision on each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only


class HostRanges(TorchFunctionMode):
    """Within it `torch.linspace` makes its numbers on the CPU where no device is asked for.

    DINOv2 reads its rates of stochastic depth from one with ``item()``, which the meta device does not have.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.linspace and kwargs.get("device") is None:
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def keep_float32(module: nn.Module) -> None:
    """Let ``module`` compute in float32 inside autocast too, from whatever it is given.

    Heads regress exponentials and rotations: in bfloat16, exponents between 2 and 4 lie 1/64 apart, depths 1.6 %. Their
    packages turn autocast off around them, some of them that of a GPU alone.
    """
    base = type(module)
    # a class rather than an attribute, so that copies of the module are no calls of this one
    module.__class__ = type(base.__name__, (_Float32, base), {"__module__": base.__module__})


class _Float32(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map_only(Tensor, _widened, (args, kwargs))
        with torch.autocast(next(self.parameters()).device.type, enabled=False):
            return super().forward(*args, **kwargs)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
