"""Layers: a frozen Linear or Conv2d, kept as it is, with a trained core beside it."""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from subspace_ext.core import WEIGHT_DTYPES, EffectiveGroup, Rounding, SubspaceCore, checked_scale
from subspace_ext.merging import mergeable_weight, merged_layer
from subspace_ext.ops.subspace_linear import check_core, checked_plan

Self = TypeVar("Self", bound="_SubspaceLayer")
_OF_CORE = ("c", "U", "V")


def _of_base(name: str, doc: str) -> Any:
    return property(lambda layer: getattr(layer.base_layer, name), doc=doc)


def _of_core(name: str, doc: str) -> Any:
    return property(lambda layer: getattr(layer.core, name), doc=doc)


class _SubspaceLayer(nn.Module):
    """What SubspaceLinear and SubspaceConv2d share: a base layer, a core, and merging.

    A state dict has the names of the parameters and buffers: `base_layer.weight`, `core.c`. One of the layer that was
    replaced loads too, and one of version 0.1, which has `weight`, `U`, `V`, `c`.
    """

    weight: nn.Parameter = _of_base("weight", "w of the base layer, to read; the merged one while merged.")
    bias: nn.Parameter | None = _of_base("bias", "The base layer's bias, to read.")
    c: nn.Parameter = _of_core("c", "The core [K, K].")
    U: Tensor = _of_core("U", "[out, K].")
    V: Tensor = _of_core("V", "[in, K].")
    rank: int = _of_core("rank", "K, the number of columns of U and V.")
    rounding: Rounding = _of_core("rounding", 'How an effective weight is rounded: "nearest" or "stochastic".')

    base_layer: nn.Module
    core: SubspaceCore

    def __init__(
        self, base: nn.Module, out_size: int, in_size: int, U: Tensor, V: Tensor, scale: float, rounding: Rounding
    ) -> None:
        super().__init__()
        names = {name for name, _ in [*base.named_parameters(), *base.named_buffers()]}.intersection(_OF_CORE)
        if names:
            raise ValueError(f"the base layer must hold nothing called {', '.join(_OF_CORE)}, got {min(names)}")
        weight = getattr(base, "weight", None)
        if not isinstance(weight, Tensor):
            raise ValueError(f"the base layer must have a weight, got {type(base).__name__} without one")
        plain = type(base).forward in (nn.Linear.forward, nn.Conv2d.forward)
        if plain and type(weight) is nn.Parameter and weight.dtype not in WEIGHT_DTYPES:
            raise ValueError(
                f"weight must be float16, bfloat16, float32 or float64 where the layer has no forward for another, got "
                f"{weight.dtype}"
            )
        # weights of the meta device are still to come; bases moved there would be lost
        device = U.device if weight.is_meta else weight.device
        U, V = U.detach().to(device), V.detach().to(device)
        core = torch.zeros(U.shape[-1], U.shape[-1], dtype=torch.float32, device=device)
        check_core(U, core, V, out_size, in_size)
        self.base_layer = base.requires_grad_(False)
        self.core = SubspaceCore(U, core, V, scale, rounding)
        # While merged: the untouched base layer. In a tuple, so that it is no module of this one.
        self._untouched: tuple[nn.Module, ...] = ()
        self.train(base.training)

    @property
    def scale(self) -> float:
        """s of the update."""
        return self.core.scale

    @scale.setter
    def scale(self, scale: float) -> None:
        self.core.scale = checked_scale(scale)

    @property
    def merged(self) -> bool:
        """True between merge() and unmerge()."""
        return bool(self._untouched)

    def merged_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """w + scale * U c V^T, accumulated in float32 or wider and rounded once; shaped like `weight`.

        Raises:
            ValueError: the base layer's weight is computed, or not stored in floating point.
        """
        return self.core.merged_weight(mergeable_weight((*self._untouched, self.base_layer)[0]), dtype)

    @torch.no_grad()
    def merge(self: Self) -> Self:
        """Put a layer with the merged weight in the place of the base layer; forwards then train nothing.

        The base layer itself stays untouched, so other uses of it or of its weight do not change, memory grows by one
        weight until unmerge(), and unmerge() is exact. state_dict() gives the unmerged state in either case. Merging a
        merged layer does nothing.

        Raises:
            ValueError: the merged weight would not be finite; or the base layer has no weight to merge into, or does
                something else with it than a plain layer (see `merging.merged_layer`).
        """
        if not self._untouched:
            base = self.base_layer
            self.base_layer = merged_layer(base, self.merged_weight())
            self._untouched = (base,)
            self.core.forget()
        return self

    def unmerge(self: Self) -> Self:
        """Put the untouched base layer back. On a layer that is not merged this does nothing."""
        if self._untouched:
            (self.base_layer,) = self._untouched
            self._untouched = ()
        return self

    def forget(self) -> None:
        """Drop the kept effective weights: needed after writes that `SubspaceCore` cannot see."""
        self.core.forget()

    def refold(self) -> None:
        """Former name of `forget`."""
        warnings.warn("refold() is now called forget()", DeprecationWarning, stacklevel=2)
        self.forget()

    def _apply(self, fn, recurse=True):
        for base in self._untouched:
            base._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
        """See nn.Module; of a merged layer the unmerged state."""
        state = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        for base in self._untouched:
            base.state_dict(destination=state, prefix=f"{prefix}base_layer.", keep_vars=keep_vars)
        return state

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        if self.merged:
            raise ValueError(f"{prefix or 'the layer'} must be unmerged before a state dict is loaded into it")
        for key in [key for key in state_dict if key.startswith(prefix)]:
            name = key[len(prefix) :]
            if not name.startswith(("base_layer.", "core.")):
                home = "core." if name in _OF_CORE else "base_layer."
                state_dict[prefix + home + name] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


class SubspaceLinear(_SubspaceLayer):
    """y = base(x) + scale * ((x V) c^T) U^T; only `c` is trained, and it starts at zero.

    A base layer that computes x w^T + bias and nothing else takes one of the plans of `subspace_linear`; `plan` may be
    set at any time. Any other (a forward of its own, hooks, parametrizations, weights of 8 or 4 bits, weight or bias
    trained) runs as it is, with the update beside it.
    """

    in_features: int = _of_base("in_features", "in.")
    out_features: int = _of_base("out_features", "out.")

    def __init__(
        self,
        linear: nn.Linear,
        U: Tensor,
        V: Tensor,
        scale: float = 1.0,
        plan: str = "auto",
        rounding: Rounding = "nearest",
    ) -> None:
        """Args: linear, which becomes the base layer and is frozen; U [out, K], V [in, K].

        Raises:
            ValueError: not a torch.nn.Linear, or one that is never called; shapes that do not match it, weights in
                float8 without a forward for them, unknown plan or rounding.
        """
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"linear must be a torch.nn.Linear, got {type(linear).__name__}")
        if isinstance(linear, nn.modules.linear.NonDynamicallyQuantizableLinear):
            raise ValueError(
                "linear must not be the out_proj of a torch.nn.MultiheadAttention, which reads its weight and never "
                "calls it: the core would have no effect"
            )
        plan = checked_plan(plan)
        super().__init__(linear, linear.out_features, linear.in_features, U, V, scale, rounding)
        self.plan = plan

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        U: Tensor,
        V: Tensor,
        scale: float = 1.0,
        plan: str = "auto",
        rounding: Rounding = "nearest",
    ) -> SubspaceLinear:
        """The layer that stands in for `linear`, which it holds and freezes; U [out, K], V [in, K]."""
        return cls(linear, U, V, scale, plan, rounding)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> y [..., out]."""
        modules = self._modules
        if self._untouched:
            return self.base_layer(x)
        return modules["core"].linear(modules["base_layer"], x, self.plan)  # type: ignore[union-attr, operator]

    def extra_repr(self) -> str:
        return f"K={self.rank}, scale={self.scale:g}, plan={self.plan!r}, merged={self.merged}"


class SubspaceConv2d(_SubspaceLayer):
    """y = base(x) + scale * conv2d(x, reshape(U c V^T)); only `c` is trained, and it starts at zero.

    The weight is unrolled to [out, Cin*kh*kw], the layout of `w.reshape(out, -1)`. A base layer that is a plain
    convolution runs with the effective weight, any other as it is, with the update beside it.
    """

    stride: tuple[int, ...] = _of_base("stride", "(vertical, horizontal), in pixels.")
    dilation: tuple[int, ...] = _of_base("dilation", "(vertical, horizontal), in pixels.")
    padding: tuple[int, ...] | str = _of_base("padding", "(vertical, horizontal), in pixels, or its name.")
    padding_mode: str = _of_base("padding_mode", "What the padding holds.")
    kernel_size: tuple[int, ...] = _of_base("kernel_size", "(vertical, horizontal), in pixels.")
    in_channels: int = _of_base("in_channels", "Cin.")
    out_channels: int = _of_base("out_channels", "out.")

    def __init__(
        self, conv: nn.Conv2d, U: Tensor, V: Tensor, scale: float = 1.0, rounding: Rounding = "nearest"
    ) -> None:
        """Args: conv with groups=1, which becomes the base layer and is frozen; U [out, K], V [Cin*kh*kw, K].

        Raises:
            ValueError: not a torch.nn.Conv2d with groups=1, shapes that do not match it, or unknown rounding.
        """
        if not isinstance(conv, nn.Conv2d):
            raise ValueError(
                "conv must be a torch.nn.Conv2d (a transposed convolution has no such update),"
                f" got {type(conv).__name__}"
            )
        if conv.groups != 1:
            raise ValueError(f"conv must have groups=1, got groups={conv.groups}")
        height, width = conv.kernel_size
        super().__init__(conv, conv.out_channels, conv.in_channels * height * width, U, V, scale, rounding)

    @classmethod
    def from_conv(
        cls, conv: nn.Conv2d, U: Tensor, V: Tensor, scale: float = 1.0, rounding: Rounding = "nearest"
    ) -> SubspaceConv2d:
        """The layer that stands in for `conv`, which it holds and freezes; U [out, K], V [Cin*kh*kw, K]."""
        return cls(conv, U, V, scale, rounding)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, Cin, H, W] or [Cin, H, W] -> y [B, out, H', W'] or [out, H', W']."""
        if self._untouched:
            return self.base_layer(x)
        base: Any = self.base_layer
        return self.core.conv2d(base, x)

    def extra_repr(self) -> str:
        return f"K={self.rank}, scale={self.scale:g}, merged={self.merged}"


def group_folds(model: nn.Module) -> EffectiveGroup | None:
    """Let the effective weights of all cores in `model` be made by one native call an optimiser step, not one a layer.

    Changes results by rounding at most. Layers put in later need another call.

    Returns:
        EffectiveGroup: the group, kept alive by its cores; None when the model has none.
    """
    cores = [module for module in model.modules() if isinstance(module, SubspaceCore)]
    return EffectiveGroup(cores) if cores else None
