"""Modules around the ops: a frozen Linear or Conv2d with a trained core `c` between two fixed bases."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from subspace_ext import folding
from subspace_ext.ops.fold_weight import fold_weight
from subspace_ext.ops.rank_update import fits
from subspace_ext.ops.subspace_conv2d import subspace_conv2d
from subspace_ext.ops.subspace_linear import (
    PLANS,
    Folded,
    apply_checked,
    autocast_dtype,
    check_input,
    check_update,
    choose_fold,
    folded_linear,
    without_autocast,
)

Self = TypeVar("Self", bound="_SubspaceLayer")
Rounding = Literal["nearest", "stochastic"]
ROUNDINGS = ("nearest", "stochastic")


class _Kept(NamedTuple):
    """A fold and what it was made from."""

    dtype: torch.dtype
    key: tuple
    aliases: list[Tensor]
    folded: Folded


class _SubspaceLayer(nn.Module):
    """What SubspaceLinear and SubspaceConv2d share: bases, core, merging and the fold kept between forwards.

    Folded weight. In training mode a fold is kept and used again by later forwards (gradient accumulation,
    checkpointing) for as long as storage and version of `c`, `weight`, `U` and `V`, the scale, the compute dtype and
    the number of optimiser steps taken in this process stay the same. In eval mode every forward folds anew, so an
    average swapped in for evaluation is seen however it was written; so does every forward captured in a CUDA graph,
    and every forward once an optimiser step was captured. Not seen: a write through `.data` in training mode outside
    an optimiser's `step`; call `refold()` after one. `group_folds(model)` makes the folds of a model one launch.

    Rounding. "stochastic" rounds the folded weight to a half-precision dtype by a fixed hash of its position: a weight
    that exists in half precision only then gains the digits that an update of relative size 1e-3 needs, on average
    over the matrix. Merging rounds in the same way.
    """

    augments = False  # whether the op takes the fold with both bases around it

    weight: nn.Parameter
    bias: nn.Parameter | None
    U: Tensor
    V: Tensor
    _base_weight: Tensor | None

    def __init__(
        self, weight: Tensor, bias: Tensor | None, U: Tensor, V: Tensor, scale: float, rounding: Rounding
    ) -> None:
        if rounding not in ROUNDINGS:
            raise ValueError(f"rounding must be one of {', '.join(ROUNDINGS)}, got {rounding!r}")
        super().__init__()
        bases = [basis.detach().to(weight.device) for basis in (U, V)]
        core = torch.zeros(bases[0].shape[-1], bases[0].shape[-1], dtype=torch.float32, device=weight.device)
        frozen_bias = None if bias is None else bias.detach()
        check_update(weight.detach(), frozen_bias, bases[0], core, bases[1])
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = None if frozen_bias is None else nn.Parameter(frozen_bias, requires_grad=False)
        self.register_buffer("U", bases[0])
        self.register_buffer("V", bases[1])
        # Holds the untouched weight while merged; follows .to() like any buffer and never enters a state dict.
        self.register_buffer("_base_weight", None, persistent=False)
        self.c = nn.Parameter(core)
        self.scale = float(scale)
        self.rounding: Rounding = rounding
        self._kept: _Kept | None = None
        self._buffer: folding.FoldBuffer | None = None
        self._group: folding.FoldGroup | None = None

    @property
    def merged(self) -> bool:
        """True between merge() and unmerge()."""
        return self._buffers["_base_weight"] is not None

    @property
    def rank(self) -> int:
        """K, the number of columns of U and V."""
        return self.U.shape[1]

    @property
    def seed(self) -> int | None:
        """Of stochastic rounding; None rounds to nearest."""
        return 0 if self.rounding == "stochastic" else None

    def merged_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """w + scale * U c V^T, accumulated in float32 or wider and rounded once; shaped like `weight`."""
        base = self.weight.detach() if self._base_weight is None else self._base_weight
        core = self.c.detach()
        flat = fold_weight(base.flatten(1), self.U, core, self.V, self.scale, dtype or base.dtype, self.seed)
        return flat.view(base.shape)

    @torch.no_grad()
    def merge(self: Self) -> Self:
        """Put the merged weight in the place of `weight`; forwards then do no low-rank work and train nothing.

        The untouched weight is kept, so memory grows by one weight until unmerge(), which is exact. state_dict()
        gives the unmerged state in either case. Merging a merged layer does nothing.

        Raises:
            ValueError: the merged weight would not be finite.
        """
        if not self.merged:
            merged = self.merged_weight()
            if not torch.isfinite(merged).all():
                raise ValueError("the merged weight must be finite, got NaN or Inf: check c, U, V and scale")
            self._base_weight = self.weight.data
            self.weight.data = merged
            self.refold()
        return self

    def unmerge(self: Self) -> Self:
        """Put the untouched weight back, bit for bit. On a layer that is not merged this does nothing."""
        if self._base_weight is not None:
            self.weight.data = self._base_weight
            self._base_weight = None
            self.refold()
        return self

    def refold(self) -> None:
        """Forget the kept fold."""
        self._kept = None
        self._buffer = None

    def _current_fold(self, dtype: torch.dtype) -> Folded | None:
        """The kept fold, if it is one in `dtype` and true to what the layer holds."""
        kept = self._kept
        if kept is None or kept.dtype != dtype or not self.training or not folding.keepable():
            return None
        return kept.folded if kept.key == folding.key_of(self, dtype) else None

    def _fold(self, dtype: torch.dtype) -> Folded | None:
        """A new fold in `dtype`, kept in training mode; None leaves folding to the op."""
        if not self.training or any(tensor.is_inference() for tensor in folding.sources(self)):
            return self._fold_anew(dtype) if self.rounding == "stochastic" else None
        if not folding.keepable():
            return self._fold_into(self.buffer_in(dtype)) if self._native(dtype) else self._fold_anew(dtype)
        if not self._native(dtype):
            self._keep(dtype, self._fold_anew(dtype))
        elif self._group is not None and self.has_stale_fold(dtype, self.seed):
            self._group.fill(dtype, self.seed)
        else:
            self._fold_into(self.buffer_in(dtype))
            self.keep(dtype)
        assert self._kept is not None
        return self._kept.folded

    def _native(self, dtype: torch.dtype) -> bool:
        """Whether a kernel folds this layer, into a buffer of its own."""
        return self.weight.is_contiguous() and fits(self.weight, self.U, self.c.detach(), self.V, dtype)

    @torch.no_grad()
    def _fold_anew(self, dtype: torch.dtype) -> Folded:
        with without_autocast(self.weight.device.type):
            bias = None if self.bias is None else self.bias.to(dtype)
            return Folded(self.merged_weight(dtype), (self.scale * self.U).to(dtype), self.V.to(dtype), bias)

    def _fold_into(self, buffer: folding.FoldBuffer) -> Folded:
        buffer.fill(self.seed)
        return buffer.folded

    @torch.no_grad()
    def buffer_in(self, dtype: torch.dtype) -> folding.FoldBuffer:
        """The buffer for folds in `dtype`, made anew where the kept one lies elsewhere or holds other bases."""
        buffer = self._buffer
        if buffer is None or buffer.place != folding.FoldBuffer.place_of(self, dtype):
            buffer = folding.FoldBuffer(self, dtype)
            # Memory from a graph's own pool must not outlive the capture.
            self._buffer = self._buffer if folding.capturing() else buffer
        return buffer

    def has_stale_fold(self, dtype: torch.dtype, seed: int | None) -> bool:
        """Whether this layer was folded in `dtype` and rounded by `seed` before, and changed since."""
        kept = self._kept
        if kept is None or not self.training or kept.dtype != dtype or self.seed != seed or not self._native(dtype):
            return False
        return kept.key != folding.key_of(self, dtype)

    def keep(self, dtype: torch.dtype) -> None:
        """Remember that the buffer now holds the fold of what the layer holds."""
        self._keep(dtype, self.buffer_in(dtype).folded)

    def _keep(self, dtype: torch.dtype, folded: Folded) -> None:
        # Aliases keep the storages alive: no other tensor can come to lie at an address in the key.
        aliases = [tensor.detach() for tensor in folding.sources(self)]
        self._kept = _Kept(dtype, folding.key_of(self, dtype), aliases, folded)

    def _apply(self, fn, recurse=True):
        self.refold()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None, "_buffer": None, "_group": None}

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            destination[prefix + "weight"] = self._base_weight

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        if self.merged:
            raise ValueError(f"{prefix or 'the layer'} must be unmerged before a state dict is loaded into it")
        self.refold()
        super()._load_from_state_dict(state_dict, prefix, *args)


class SubspaceLinear(_SubspaceLayer):
    """y = x w^T + bias + scale * ((x V) c^T) U^T; only `c` is trained, and it starts at zero.

    `weight` and `bias` keep their names, so the state dict of the plain layer still fits. `plan` is that of
    `subspace_linear` and may be set at any time.
    """

    augments = True

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        U: Tensor,
        V: Tensor,
        scale: float = 1.0,
        plan: str = "auto",
        rounding: Rounding = "nearest",
    ) -> None:
        """Args: weight [out, in], bias [out] or None, U [out, K], V [in, K]; weight and bias are shared, not copied.

        Raises:
            ValueError: shapes that do not match, unknown plan or rounding.
        """
        if plan not in PLANS:
            raise ValueError(f"plan must be one of {', '.join(PLANS)}, got {plan!r}")
        if weight.dim() != 2:
            raise ValueError(f"weight must be [out, in], got shape {tuple(weight.shape)}")
        super().__init__(weight, bias, U, V, scale, rounding)
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
        """The layer that stands in for `linear`, sharing its weight; U [out, K], V [in, K].

        Raises:
            ValueError: not a torch.nn.Linear, or shapes that do not match it.
        """
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"linear must be a torch.nn.Linear, got {type(linear).__name__}")
        layer = cls(linear.weight, linear.bias, U, V, scale, plan, rounding)
        layer.train(linear.training)
        return layer

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> y [..., out]."""
        if self.merged:
            return nn.functional.linear(x, self.weight, self.bias)
        if self.plan not in PLANS:
            raise ValueError(f"plan must be one of {', '.join(PLANS)}, got {self.plan!r}")
        w = self.weight
        if x.dim() == 0 or x.shape[-1] != w.shape[1]:
            raise ValueError(f"x must be [..., in] with in = {w.shape[1]}, got shape {tuple(x.shape)}")
        autocast = autocast_dtype(x)
        dtype = x.dtype if autocast is None else autocast
        plan = self.plan
        fold = plan == "fold" or choose_fold(plan, x.numel() // w.shape[1], w, exact=self.rounding == "nearest")
        compiling = torch.compiler.is_compiling()
        folded = self._current_fold(dtype) if fold and not compiling else None
        if folded is None or x.device != w.device:
            check_input(x, w, self.bias, self.U, self.c, self.V, autocast=autocast is not None)
            folded = self._fold(dtype) if fold and not compiling else None
        if folded is not None:
            if autocast is None:
                return folded_linear(x, folded, self.c)
            with without_autocast(x.device.type):
                return folded_linear(x.to(dtype), folded, self.c)
        if autocast is not None:
            x = x.to(dtype)
        w_eff = self.merged_weight(dtype) if fold and compiling else None
        return apply_checked(x, w, self.bias, self.U, self.c, self.V, self.scale, fold, w_eff)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, K={self.rank},"
            f" bias={self.bias is not None}, scale={self.scale:g}, plan={self.plan!r}, merged={self.merged}"
        )


class SubspaceConv2d(_SubspaceLayer):
    """y = conv2d(x, w + scale * reshape(U c V^T), bias); only `c` is trained, and it starts at zero.

    The weight is unrolled to [out, Cin*kh*kw], the layout of `w.reshape(out, -1)`.
    """

    def __init__(
        self, conv: nn.Conv2d, U: Tensor, V: Tensor, scale: float = 1.0, rounding: Rounding = "nearest"
    ) -> None:
        """Args: conv with groups=1, whose weight and bias are shared; U [out, K], V [Cin*kh*kw, K].

        Raises:
            ValueError: not a torch.nn.Conv2d with groups=1, or shapes that do not match it.
        """
        if not isinstance(conv, nn.Conv2d):
            raise ValueError(
                "conv must be a torch.nn.Conv2d (a transposed convolution has no such update),"
                f" got {type(conv).__name__}"
            )
        if conv.groups != 1:
            raise ValueError(f"conv must have groups=1, got groups={conv.groups}")
        super().__init__(conv.weight, conv.bias, U, V, scale, rounding)
        self.stride = tuple(conv.stride)
        self.dilation = tuple(conv.dilation)
        self.padding = conv.padding
        self.padding_mode = conv.padding_mode
        self._border = tuple(conv._reversed_padding_repeated_twice)
        self.train(conv.training)

    @classmethod
    def from_conv(
        cls, conv: nn.Conv2d, U: Tensor, V: Tensor, scale: float = 1.0, rounding: Rounding = "nearest"
    ) -> SubspaceConv2d:
        """The layer that stands in for `conv`, sharing its weight; U [out, K], V [Cin*kh*kw, K]."""
        return cls(conv, U, V, scale, rounding)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, Cin, H, W] or [Cin, H, W] -> y [B, out, H', W'] or [out, H', W']."""
        w = self.weight
        if x.dim() not in (3, 4) or x.shape[-3] != w.shape[1]:
            raise ValueError(f"x must be [B, Cin, H, W] with Cin = {w.shape[1]}, got shape {tuple(x.shape)}")
        dtype = autocast_dtype(x)
        check_input(x, w, self.bias, self.U, self.c, self.V, autocast=dtype is not None)
        if dtype is not None:
            x = x.to(dtype)
        padding: tuple[int, ...] = (0, 0)
        if self.padding_mode != "zeros":
            x = nn.functional.pad(x, self._border, mode=self.padding_mode)
        elif isinstance(self.padding, str):
            x = nn.functional.pad(x, self._border)
        else:
            padding = tuple(self.padding)
        if self.merged:
            return nn.functional.conv2d(x, w, self.bias, self.stride, padding, self.dilation)
        batch = x if x.dim() == 4 else x[None]
        geometry = (self.stride, padding, self.dilation)
        w_eff: Tensor | None
        if torch.compiler.is_compiling():
            w_eff = self.merged_weight(x.dtype)
        else:
            folded = self._current_fold(x.dtype) or self._fold(x.dtype)
            w_eff = folded.weight if folded is not None else None
        y = subspace_conv2d(batch, w, self.bias, self.U, self.c, self.V, self.scale, geometry, w_eff)
        return y if x.dim() == 4 else y[0]

    def extra_repr(self) -> str:
        out_size, in_size, height, width = self.weight.shape
        return (
            f"{in_size}, {out_size}, kernel_size=({height}, {width}), stride={self.stride}, padding={self.padding},"
            f" dilation={self.dilation}, K={self.rank}, bias={self.bias is not None}, scale={self.scale:g},"
            f" merged={self.merged}"
        )


def group_folds(model: nn.Module) -> folding.FoldGroup | None:
    """Make the folds of all subspace layers in `model` one kernel launch an optimiser step instead of one a layer.

    Changes no result. Layers put in later need another call; on a CPU it makes no difference.

    Returns:
        FoldGroup: the group, kept alive by its layers; None when the model has no such layer.
    """
    layers = [module for module in model.modules() if isinstance(module, _SubspaceLayer)]
    return folding.FoldGroup(layers) if layers else None
