"""The PEFT layer of the subspace method: a frozen Linear or Conv2d with a core, a LoRA, or both, per adapter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

import subspace_ext as se
from subspace_ext.core import padded, plain_weight
from subspace_ext.merging import mergeable_weight, merged_layer
from subspace_ext.ops.lora import lora_conv2d, lora_linear
from subspace_ext.ops.rank_update_ref import accumulation_dtype
from subspace_ext.ops.subspace_linear import autocast_dtype, checked_plan, plain_operations_only, without_autocast


class SubspaceLayer(nn.Module, BaseTunerLayer):
    """y = base(x) + s ((x V) c^T) U^T + (alpha / r) (x A^T) B^T, the core or the LoRA may be absent.

    ``c``, ``A`` and ``B`` are trained; ``c`` and ``B`` start at zero. A Conv2d is the same on its unrolled weight. The
    base layer is kept as it is; one that computes ``x w^T + bias`` and nothing else runs through the fused ops of
    `subspace_ext`, beside any other (quantised weights, hooks, a forward of its own) the update is computed.
    """

    adapter_layer_names = ("subspace_core", "lora_A", "lora_B")
    other_param_names = ("lora_scaling",)

    def __init__(self, base_layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._is_linear = isinstance(base_layer, nn.Linear)
        if isinstance(base_layer, nn.Linear):
            self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        else:
            self.in_features, self.out_features = base_layer.in_channels, base_layer.out_channels
        # ModuleDicts; typed loosely because mypy knows no entry's own type
        self.subspace_core: Any = nn.ModuleDict()
        self.lora_A: Any = nn.ModuleDict()
        self.lora_B: Any = nn.ModuleDict()
        self.lora_scaling: dict[str, float] = {}
        self.plans: dict[str, str] = {}
        self.merged_adapters: list[str] = []
        # while merged: the untouched base layer, in a tuple so that it is no module of this one
        self._untouched: tuple[nn.Module, ...] = ()

    def add_core(self, adapter: str, U: torch.Tensor, V: torch.Tensor, scale: float, plan: str) -> None:
        """Give ``adapter`` a core of zeros between ``U [out, K]`` and ``V [in, K]``."""
        weight = self.base_layer.weight
        # weights of the meta device are still to come; bases moved there would be lost
        device = U.device if weight.is_meta else weight.device
        # in one layout, so that an adapter gives the same bits before it is saved and after it is loaded
        U, V = U.to(device).contiguous(), V.to(device).contiguous()
        c = torch.zeros(U.shape[1], U.shape[1], dtype=torch.float32, device=device)
        self.plans[adapter] = checked_plan(plan)
        self.subspace_core[adapter] = se.SubspaceCore(U, c, V, scale).train(self.base_layer.training)

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
        if self.disable_adapters or self.merged:
            base = self._untouched[0] if self.disable_adapters and self._untouched else self.base_layer
            return base(x, *args, **kwargs)
        base = self.base_layer
        cores = [name for name in self.active_adapters if name in self.subspace_core]
        loras = [name for name in self.active_adapters if name in self.lora_A]
        if args or kwargs or not cores:
            y = None if cores or args or kwargs or len(loras) != 1 else self._fused_lora(x, loras[0])
            if y is not None:
                return y
            y, beside = base(x, *args, **kwargs), cores
        else:
            first = self.subspace_core[cores[0]]
            y = first.linear(base, x, self.plans[cores[0]]) if self._is_linear else first.conv2d(base, x)
            beside = cores[1:]
        for name in beside:
            core = self.subspace_core[name]
            y = core.add_to_linear(y, x) if self._is_linear else core.add_to_conv2d(base, y, x)
        for name in loras:
            a, b = self.lora_A[name], self.lora_B[name]
            low = b(a(self._cast_input_dtype(x, a.weight.dtype)))
            y = y + (low * self.lora_scaling[name]).to(y.dtype)
        return y

    def _fused_lora(self, x: torch.Tensor, adapter: str) -> torch.Tensor | None:
        """The base layer with a LoRA, in one op; None where it does not fit and the modules have to run."""
        base: Any = self.base_layer
        weight = plain_weight(base, nn.Linear if self._is_linear else nn.Conv2d)
        if weight is None or weight.dtype != torch.float32 or x.dtype != torch.float32 or plain_operations_only():
            return None
        a, b, scaling = self.lora_A[adapter].weight, self.lora_B[adapter].weight, self.lora_scaling[adapter]
        dtype = autocast_dtype(x)
        with without_autocast(x.device.type):
            if dtype is not None:
                x = x.to(dtype)
            if self._is_linear:
                return lora_linear(x, weight, base.bias, a, b, scaling)
            x, padding = padded(base, x)
            batch = x if x.dim() == 4 else x[None]
            y = lora_conv2d(batch, weight, base.bias, a, b, scaling, (base.stride, padding, base.dilation))
            return y if x.dim() == 4 else y[0]

    @torch.no_grad()
    def lora_factors(
        self, adapter: str, dtype: torch.dtype = torch.float32
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """``B [out, r']`` and ``A [r', in]`` with ``delta W = B A``: the core's ``s U c`` and ``V^T``, then the LoRA's.

        None when this layer has nothing of ``adapter``.
        """
        left, right = [], []
        if adapter in self.subspace_core:
            core = self.subspace_core[adapter]
            left.append(core.scale * (core.U.double() @ core.c.double()))
            right.append(core.V.T)
        if adapter in self.lora_A:
            left.append(self.lora_scaling[adapter] * self.lora_B[adapter].weight.flatten(1).to(dtype))
            right.append(self.lora_A[adapter].weight.flatten(1))
        if not left:
            return None
        return torch.cat([b.to(dtype) for b in left], 1), torch.cat([a.to(dtype) for a in right])

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """The update of ``adapter``, shaped like the weight; zeros when this layer has nothing of it.

        float32 (float64 for a float64 weight).
        """
        weight = self.base_layer.weight
        wide = accumulation_dtype(weight.dtype)
        factors = self.lora_factors(adapter, wide)
        shape = (self.out_features, self.in_features) if self._is_linear else weight.shape
        if factors is None:
            return torch.zeros(shape, dtype=wide, device=weight.device)
        return (factors[0] @ factors[1]).view(shape)

    @torch.no_grad()
    def merged_weight(self, adapters: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The untouched w; w plus the updates of ``adapters``, added in float32 or wider, rounded once; their sum.

        Raises:
            ValueError: the weight is computed from others, or not stored in floating point.
        """
        weight = mergeable_weight((*self._untouched, self.base_layer)[0])
        update = torch.zeros_like(weight, dtype=accumulation_dtype(weight.dtype))
        for adapter in adapters:
            update += self.get_delta_weight(adapter)
        return weight, (weight + update).to(weight.dtype), update

    def check_mergeable(self, name: str, adapters: Sequence[str]) -> None:
        """Raise ValueError, naming the module, where ``adapters`` would change it and it cannot be merged into."""
        changes = any(adapter in self.subspace_core or adapter in self.lora_A for adapter in adapters)
        base = (*self._untouched, self.base_layer)[0]
        if not changes or plain_weight(base, nn.Linear if self._is_linear else nn.Conv2d) is not None:
            return
        try:
            self.merged_base(adapters)
        except ValueError as error:
            raise ValueError(f"{name} cannot be merged into: {error}") from error

    def merged_base(self, adapters: Sequence[str]) -> nn.Module:
        """A base layer with the updates of ``adapters`` in its weight; see `subspace_ext.merging.merged_layer`.

        Raises:
            ValueError: its weight would not be finite, or the base layer is one that cannot be merged into.
        """
        _, merged, _ = self.merged_weight(adapters)
        if not torch.isfinite(merged).all():
            raise ValueError(f"the merged weight must be finite, got NaN or Inf: check the adapters {list(adapters)}")
        return merged_layer((*self._untouched, self.base_layer)[0], merged)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put a layer with the merged weight in the place of the base layer, which is kept, so unmerge() is exact.

        ``safe_merge`` is PEFT's; a weight that is not finite is refused in either case.

        Raises:
            ValueError: see `merged_base`.
        """
        names = check_adapters_to_merge(self, adapter_names)
        if not names:
            return
        merged = self.merged_base([*self.merged_adapters, *names])
        if not self._untouched:
            self._untouched = (self.base_layer,)
        self.base_layer = merged  # type: ignore[assignment]
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the untouched base layer back. On a layer that is not merged this does nothing."""
        if self._untouched:
            (self.base_layer,) = self._untouched  # type: ignore[assignment]
            self._untouched = ()
            self.merged_adapters.clear()

    def _apply(self, fn, recurse=True):
        for base in self._untouched:
            base._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True
