"""Building networks of other packages on whatever device is the default, the meta device included."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class HostRanges(TorchFunctionMode):
    """Within it `torch.linspace` makes its numbers on the CPU where no device is asked for.

    DINOv2 reads its rates of stochastic depth from one with ``item()``, which the meta device does not have.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.linspace and kwargs.get("device") is None:
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)
