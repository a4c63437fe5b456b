"""The PEFT layer of the subspace method: a frozen Linear or Conv2d with a core, a LoRA, or both, per adapter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

import subspace_ext as se

Core = se.SubspaceLinear | se.SubspaceConv2d


class SubspaceLayer(nn.Module, BaseTunerLayer):
    """y = x w^T + bias + s ((x V) c^T) U^T + (alpha / r) (x A^T) B^T, the core or the LoRA may be absent.

    ``c``, ``A`` and ``B`` are trained; ``c`` and ``B`` start at zero. A Conv2d is the same on its unrolled weight. One
    active adapter runs through the fused layer of `subspace_ext`; several at once have their updates added to the
    weight.
    """

    adapter_layer_names = ("subspace_core", "lora_A", "lora_B")
    other_param_names = ("lora_scaling",)

    def __init__(self, base_layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.base_layer = base_layer
        # ModuleDicts; typed loosely because mypy knows no entry's own type
        self.subspace_core: Any = nn.ModuleDict()
        self.lora_A: Any = nn.ModuleDict()
        self.lora_B: Any = nn.ModuleDict()
        self.lora_scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        # holds the untouched weight while merged
        self.register_buffer("unmerged_weight", None, persistent=False)
        self.unmerged_weight: torch.Tensor | None

    def add_core(self, adapter: str, U: torch.Tensor, V: torch.Tensor, scale: float, plan: str) -> None:
        """Give ``adapter`` a core of zeros between ``U [out, K]`` and ``V [in, K]``."""
        base = self.base_layer
        # in one layout, so that an adapter gives the same bits before it is saved and after it is loaded
        U, V = U.contiguous(), V.contiguous()
        core: Core
        if isinstance(base, nn.Linear):
            core = se.SubspaceLinear.from_linear(base, U, V, scale, plan)
        else:
            core = se.SubspaceConv2d.from_conv(base, U, V, scale)
        for name in ("weight", "bias"):
            # the base layer's own parameter, but unregistered: registered twice it would be saved and unfrozen twice
            delattr(core, name)
            object.__setattr__(core, name, getattr(base, name))
        self.subspace_core[adapter] = core

    def add_lora(self, adapter: str, rank: int, alpha: float) -> None:
        """Give ``adapter`` a LoRA: A from a uniform distribution within 1 / sqrt(in), B of zeros, as PEFT starts it."""
        base = self.base_layer
        a: nn.Module
        b: nn.Module
        if isinstance(base, nn.Linear):
            a, b = nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)
        else:
            geometry: dict[str, Any] = {
                name: getattr(base, name) for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode")
            }
            a = nn.Conv2d(base.in_channels, rank, bias=False, **geometry)
            b = nn.Conv2d(rank, base.out_channels, 1, bias=False)
        nn.init.kaiming_uniform_(a.get_parameter("weight"), a=math.sqrt(5))
        nn.init.zeros_(b.get_parameter("weight"))
        device = base.weight.device
        self.lora_A[adapter], self.lora_B[adapter] = a.to(device), b.to(device)
        self.lora_scaling[adapter] = alpha / rank

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters and self.unmerged_weight is not None:
            return self._with_weight(x, self.unmerged_weight)
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)
        cores = [name for name in self.active_adapters if name in self.subspace_core]
        if len(cores) > 1:
            updates = torch.stack([self._core_update(name) for name in cores]).sum(0)
            y = self._with_weight(x, self.base_layer.weight + updates.to(self.base_layer.weight.dtype))
        elif cores:
            y = self.subspace_core[cores[0]](x)
        else:
            y = self.base_layer(x, *args, **kwargs)
        for name in self.active_adapters:
            if name in self.lora_A:
                a, b = self.lora_A[name], self.lora_B[name]
                low = b(a(self._cast_input_dtype(x, a.weight.dtype)))
                y = y + (low * self.lora_scaling[name]).to(y.dtype)
        return y

    def _with_weight(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if isinstance(self.base_layer, nn.Linear):
            return nn.functional.linear(x, weight, self.base_layer.bias)
        return self.base_layer._conv_forward(x, weight, self.base_layer.bias)

    def _core_update(self, adapter: str) -> torch.Tensor:
        core = self.subspace_core[adapter]
        wide = torch.promote_types(self.base_layer.weight.dtype, torch.float32)
        update = core.scale * (core.U.to(wide) @ core.c.to(wide) @ core.V.to(wide).T)
        return update.view(self.base_layer.weight.shape)

    def lora_factors(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """``B [out, r']`` and ``A [r', in]`` with ``delta W = B A``: the core's ``s U c`` and ``V^T``, then the LoRA's.

        float32; None when this layer has nothing of ``adapter``.
        """
        left, right = [], []
        if adapter in self.subspace_core:
            core = self.subspace_core[adapter]
            left.append(core.scale * (core.U.double() @ core.c.double()))
            right.append(core.V.T)
        if adapter in self.lora_A:
            left.append(self.lora_scaling[adapter] * self.lora_B[adapter].weight.flatten(1))
            right.append(self.lora_A[adapter].weight.flatten(1))
        if not left:
            return None
        return torch.cat([b.float() for b in left], 1).detach(), torch.cat([a.float() for a in right]).detach()

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """The update of ``adapter``, shaped like the weight, float32; zeros when this layer has nothing of it."""
        factors = self.lora_factors(adapter)
        weight = self.base_layer.weight
        if factors is None:
            return torch.zeros_like(weight, dtype=torch.float32)
        return (factors[0] @ factors[1]).view(weight.shape)

    @torch.no_grad()
    def merged_weight(self, adapters: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The untouched w; w plus the updates of ``adapters``, added in float32 or wider, rounded once; their sum."""
        weight = self.base_layer.weight if self.unmerged_weight is None else self.unmerged_weight
        update = torch.zeros_like(weight, dtype=torch.float32)
        for adapter in adapters:
            update += self.get_delta_weight(adapter)
        wide = torch.promote_types(weight.dtype, torch.float32)
        return weight, (weight.to(wide) + update).to(weight.dtype), update

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the merged weight in the base layer; the untouched one is kept, so unmerge() is exact.

        ``safe_merge`` is PEFT's; a weight that is not finite is refused in either case.

        Raises:
            ValueError: the merged weight would not be finite.
        """
        names = check_adapters_to_merge(self, adapter_names)
        if not names:
            return
        _, merged, _ = self.merged_weight([*self.merged_adapters, *names])
        if not torch.isfinite(merged).all():
            raise ValueError(f"the merged weight must be finite, got NaN or Inf: check the adapters {names}")
        if self.unmerged_weight is None:
            self.unmerged_weight = self.base_layer.weight.data
        self.base_layer.weight.data = merged
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the untouched weight back, bit for bit. On a layer that is not merged this does nothing."""
        if self.unmerged_weight is not None:
            self.base_layer.weight.data = self.unmerged_weight
            self.unmerged_weight = None
            self.merged_adapters.clear()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True
