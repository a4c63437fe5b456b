"""The trained part of a layer: two bases, the core between them, and the effective weight kept between forwards.

A core sits beside any base layer. Where the base computes x w^T + bias and nothing else, with a frozen weight in
floating point, the update can be added to the weight once and one product computed with the sum (the effective weight).
Beside every other base (a forward of its own, hooks, parametrizations, weights of 8 or 4 bits, a weight or bias that is
trained) the update is added to what the base returns.

This module alone knows when a kept effective weight is stale.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.optim.optimizer import register_optimizer_step_post_hook

from subspace_ext import _native
from subspace_ext.effective import Batch, DeviceMaker, HostMaker, Sources, make_once, merged_weight, on_device
from subspace_ext.ops.subspace_conv2d import add_beside_conv2d, subspace_conv2d
from subspace_ext.ops.subspace_linear import (
    PLANS,
    Effective,
    add_beside,
    apply_checked,
    autocast_dtype,
    check_core,
    check_input,
    checked_plan,
    choose_effective,
    effective_linear,
    exporting,
    transforming,
    without_autocast,
)

Rounding = Literal["nearest", "stochastic"]
ROUNDINGS = ("nearest", "stochastic")
WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_TENSORS = (Tensor, nn.Parameter)

_optimizer_steps = 0
# Set once a step is captured in a CUDA graph: its replays change cores and no counter tells.
_hidden_steps = False
_counting = False
# Making weights writes to memory that layers keep; threads that find a weight stale take turns.
_making = threading.RLock()


def _count_optimizer_step(*_: Any) -> None:
    global _optimizer_steps, _hidden_steps
    _optimizer_steps += 1
    _hidden_steps = _hidden_steps or capturing()


def _start_counting() -> None:
    """Fused optimisers and those that write through `.data` change a core without raising its version counter."""
    global _counting
    if not _counting:
        register_optimizer_step_post_hook(_count_optimizer_step)
        _counting = True


def capturing() -> bool:
    """True while the current stream is captured into a CUDA graph."""
    # the flag, and not the function around it, because every forward asks
    return torch.cuda._initialized and torch.cuda.is_current_stream_capturing()


def keepable() -> bool:
    """False where a later forward could not tell whether a weight made now is true, or could not train with it."""
    return not _hidden_steps and not capturing() and not torch.is_inference_mode_enabled()


def plain_weight(base: nn.Module, kind: type[nn.Linear] | type[nn.Conv2d]) -> Tensor | None:
    """The weight of a base that computes with it what `kind` does, and nothing else; None for any other base.

    Looked at in every forward: hooks, parametrizations and `requires_grad` come and go.
    """
    cls = type(base)
    if cls.forward is not kind.forward or "forward" in base.__dict__ or cls.__call__ is not nn.Module.__call__:
        return None
    if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
        return None
    if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
        return None
    if kind is nn.Conv2d and cls._conv_forward is not nn.Conv2d._conv_forward:  # type: ignore[attr-defined]
        return None
    parameters = base._parameters
    if "bias" not in parameters:
        return None
    weight, bias = parameters.get("weight"), parameters["bias"]
    if weight is None or weight.dtype not in WEIGHT_DTYPES:
        return None
    if type(weight) not in _TENSORS and not _is_fake(weight):
        return None
    if (weight.requires_grad or (bias is not None and bias.requires_grad)) and torch.is_grad_enabled():
        return None
    return weight


def checked_scale(scale: float) -> float:
    """The factor of the update. Raises ValueError unless it is finite."""
    if not math.isfinite(float(scale)):
        raise ValueError(f"scale must be finite, got {scale}")
    return float(scale)


def _is_fake(tensor: Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


def _never_called(*_: Any) -> None:
    """A core is never called as a module. nn.TransformerEncoderLayer, which in eval mode reads the weights of its
    linears past their forward, does not where any module inside it has a hook."""


class _Kept:
    """An effective weight and what it was made from."""

    __slots__ = ("address", "base", "core", "effective", "key", "maker", "size", "used")

    def __init__(
        self, base: nn.Module, key: tuple, c: Tensor, maker: DeviceMaker | HostMaker, effective: Effective
    ) -> None:
        self.base, self.key, self.maker, self.effective = base, key, maker, effective
        self.core: Tensor | None = None
        if c.is_cpu:
            self.core = c.detach().clone()
            self.address, self.size = self.core.data_ptr(), c.numel() * c.element_size()
        self.used = False

    def shows(self, c: Tensor) -> bool:
        """Whether a core at the address in the key still holds the values; bit by bit."""
        assert self.core is not None
        if _native.available() and c.is_contiguous():
            return _native.module().same_bytes(self.key[0], self.address, self.size)
        return torch.equal(c, self.core)


class SubspaceCore(nn.Module):
    """s U c V^T beside a frozen weight: bases `U [out, K]` and `V [in, K]`, and the trained core `c [K, K]`.

    Effective weight. In training mode it is kept, one for each compute dtype, and used again by later forwards
    (gradient accumulation, checkpointing) while place and version of `c`, weight, bias, `U` and `V`, the scale and
    the number of optimiser steps taken in this process stay the same. Writes to `c` that raise no version counter, as
    through `.data`, are seen too: on a CPU `c` is compared with the values the weight was made from, in every forward;
    on a GPU, where that would have to wait for the device, a weight serves no forward after a backward pass has
    given `c` a gradient, nor any forward without gradients. In eval mode and in inference mode nothing is kept, nor in
    a forward captured in a CUDA graph or once an optimiser step was captured. Not seen: a write through `.data` to the
    frozen weight, bias or bases in training mode; and on a GPU to `c` between two forwards with neither a backward pass
    nor an optimiser step between them. Call `forget()` after one.

    Rounding. "stochastic" rounds the effective weight to a half-precision dtype by a fixed hash of its position: a
    weight that exists in half precision only then gains the digits that an update of relative size 1e-3 needs, on
    average over the matrix. Merging rounds in the same way.
    """

    U: Tensor
    V: Tensor
    c: nn.Parameter

    def __init__(self, U: Tensor, c: Tensor, V: Tensor, scale: float = 1.0, rounding: Rounding = "nearest") -> None:
        """Args: U [out, K], c [K, K], V [in, K] on one device.

        Raises:
            ValueError: shapes or devices that do not match, dtypes that are not floating, unknown rounding, a scale
                that is not finite.
        """
        if rounding not in ROUNDINGS:
            raise ValueError(f"rounding must be one of {', '.join(ROUNDINGS)}, got {rounding!r}")
        check_core(U, c, V)
        for name, other in (("U", U), ("c", c), ("V", V)):
            if other.dtype not in WEIGHT_DTYPES:
                raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {other.dtype}")
            if other.device != U.device:
                raise ValueError(f"{name} must be on the device of U, {U.device}, got {other.device}")
        super().__init__()
        self.register_buffer("U", U.detach())
        self.register_buffer("V", V.detach())
        self.c = c if isinstance(c, nn.Parameter) else nn.Parameter(c.detach())
        self.scale = checked_scale(scale)
        self.rounding: Rounding = rounding
        self.augments = True
        """Whether on a GPU one matrix holds the effective weight of a linear with both bases around it."""
        self._forget_all()
        self.register_forward_pre_hook(_never_called)
        _start_counting()

    @property
    def rank(self) -> int:
        """K, the number of columns of U and V."""
        return self.U.shape[1]

    @property
    def seed(self) -> int | None:
        """Of stochastic rounding; None rounds to nearest."""
        return 0 if self.rounding == "stochastic" else None

    def merged_weight(self, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """w + scale * U c V^T, accumulated in float32 or wider and rounded once; shaped like `weight`."""
        return merged_weight(
            weight.detach(), self.c.detach(), self.U, self.V, self.scale, dtype or weight.dtype, self.seed
        )

    def forget(self) -> None:
        """Drop the kept effective weights; the next forward makes one anew."""
        self._kept: dict[torch.dtype, _Kept] = {}
        self._makers: dict[torch.dtype, DeviceMaker | HostMaker] = {}

    def linear(self, base: nn.Module, x: Tensor, plan: str = "auto") -> Tensor:
        """y = base(x) + scale * ((x V) c^T) U^T; x [..., in] -> y [..., out]. `plan` is that of `subspace_linear`."""
        if plan not in PLANS:
            plan = checked_plan(plan)
        w = plain_weight(base, nn.Linear)
        compiling = torch.compiler.is_compiling()
        if w is None or x.is_nested or (exporting() if compiling else transforming()):
            return self.add_to_linear(base(x), x)
        c = self._parameters.get("c")
        kept_by_name = c is not None
        c = self.c if c is None else c
        tokens_last = x.shape[-1] if x.dim() else 0
        if x.dim() == 0 or tokens_last != w.shape[1]:
            raise ValueError(f"x must be [..., in] with in = {w.shape[1]}, got shape {tuple(x.shape)}")
        autocast = autocast_dtype(x)
        dtype = x.dtype if autocast is None else autocast
        exact = self.rounding == "nearest"
        effective = plan == "effective" or choose_effective(plan, x.numel() // max(1, tokens_last), w, exact)
        bias = base._parameters["bias"]
        assert bias is None or isinstance(bias, Tensor)
        ready = None
        if effective and not compiling and kept_by_name:
            ready = self._current(base, dtype, c)
        if ready is None or x.device != w.device:
            check_input(x, w, bias, self.U, c, self.V, autocast=autocast is not None)
            if effective and not compiling:
                ready = self._make(base, dtype, c, self.augments, kept_by_name)
        if ready is not None:
            if autocast is None:
                return effective_linear(x, ready, c)
            with without_autocast(x.device.type):
                return effective_linear(x.to(dtype), ready, c)
        if autocast is not None:
            x = x.to(dtype)
        w_eff = self.merged_weight(w, dtype) if effective and compiling else None
        return apply_checked(x, w, bias, self.U, c, self.V, self.scale, effective, w_eff)

    def add_to_linear(self, y: Tensor, x: Tensor) -> Tensor:
        """y + scale * ((x V) c^T) U^T, in the dtype of y [..., out], which any base layer made of x [..., in].

        Raises:
            ValueError: shapes or devices that do not belong together.
        """
        self._check_device(y)
        if x.is_nested:
            return add_beside(y, x, self.U, self.c, self.V, self.scale)
        expected = (*x.shape[:-1], self.U.shape[0])
        if x.dim() == 0 or x.shape[-1] != self.V.shape[0]:
            raise ValueError(f"x must be [..., in] with in = {self.V.shape[0]}, got shape {tuple(x.shape)}")
        if not isinstance(y, Tensor) or tuple(y.shape) != expected:
            got = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(f"the base layer must return [..., out] = {list(expected)}, got {got}")
        return add_beside(y, x, self.U, self.c, self.V, self.scale)

    def _check_device(self, y: Any) -> None:
        """Of tensors that lie on the meta device some of torch's products make numbers without an error."""
        for name, tensor in (("U", self.U), ("c", self.c), ("V", self.V)):
            if isinstance(y, Tensor) and tensor.device != y.device:
                raise ValueError(
                    f"{name} must be on the device of what the base layer returns, {y.device}, got {tensor.device}"
                )

    def conv2d(self, base: nn.Conv2d, x: Tensor) -> Tensor:
        """y = base(x) + scale * conv2d(x, reshape(U c V^T)); x [B, Cin, H, W] or [Cin, H, W]."""
        if x.dim() not in (3, 4) or x.shape[-3] != base.in_channels:
            raise ValueError(f"x must be [B, Cin, H, W] with Cin = {base.in_channels}, got shape {tuple(x.shape)}")
        w = plain_weight(base, nn.Conv2d)
        compiling = torch.compiler.is_compiling()
        if w is None or (exporting() if compiling else transforming()):
            return self.add_to_conv2d(base, base(x), x)
        c = self._parameters.get("c")
        kept_by_name = c is not None
        c = self.c if c is None else c
        dtype = autocast_dtype(x)
        bias = base._parameters["bias"]
        check_input(x, w, bias, self.U, c, self.V, autocast=dtype is not None)
        x, padding = padded(base, x)
        if dtype is not None:
            x = x.to(dtype)  # after the padding, of which autocast computes some kinds in float32
        batch = x if x.dim() == 4 else x[None]
        geometry = (base.stride, padding, base.dilation)
        ready = w_eff = None
        if compiling:
            w_eff = self.merged_weight(w, x.dtype)
        else:
            ready = self._current(base, x.dtype, c) if kept_by_name else None
            ready = ready or self._make(base, x.dtype, c, False, kept_by_name)
        y = subspace_conv2d(batch, w, bias, self.U, c, self.V, self.scale, geometry, w_eff, ready)
        return y if x.dim() == 4 else y[0]

    def add_to_conv2d(self, base: nn.Conv2d, y: Tensor, x: Tensor) -> Tensor:
        """y + scale * conv2d(x, reshape(U c V^T)) with the geometry of `base`, in the dtype of y, which is base(x)."""
        self._check_device(y)
        x, padding = padded(base, x)
        kernel = (base.in_channels, *base.kernel_size)
        return add_beside_conv2d(
            y, x, self.U, self.c, self.V, self.scale, kernel, (base.stride, padding, base.dilation)
        )

    # ---- the kept effective weight -----------------------------------------------------------------------------------
    def _forget_all(self) -> None:
        self.forget()
        self._group: EffectiveGroup | None = None

    def _key(self, base: nn.Module, c: Tensor) -> tuple:
        """Differs whenever an effective weight of one dtype may differ; made in every forward, so it is flat."""
        parameters, buffers = base._parameters, self._buffers
        weight, bias = parameters["weight"], parameters["bias"]
        U, V = buffers["U"], buffers["V"]
        assert weight is not None and U is not None and V is not None
        # shape and strides too: a part of a tensor, or its transpose, begins at the same address
        return (
            c.data_ptr(), c._version, c.stride(), weight.data_ptr(), weight._version, weight.stride(),
            U.data_ptr(), U._version, U.shape, U.stride(), V.data_ptr(), V._version, V.shape, V.stride(),
            None if bias is None else bias.data_ptr(), None if bias is None else bias._version,
            self.scale, self.rounding, _optimizer_steps,
        )  # fmt: skip

    def _current(self, base: nn.Module, dtype: torch.dtype, c: Tensor) -> Effective | None:
        """The kept effective weight, if there is one in `dtype` and it is true to what the layer holds."""
        kept = self._kept.get(dtype)
        if kept is None or not self.training or not keepable() or type(c) not in _TENSORS:
            return None
        if kept.key != self._key(base, c):
            return None
        if kept.core is None:
            # inside a backward pass nobody changes the core between a backward and a recomputed forward
            if (kept.effective.spent or not torch.is_grad_enabled()) and torch._C._current_graph_task_id() == -1:
                return None
        elif not kept.shows(c):
            return None
        kept.used = True
        return kept.effective

    def _make(self, base: nn.Module, dtype: torch.dtype, c: Tensor, augment: bool, keep: bool) -> Effective | None:
        """A new effective weight in `dtype`, kept in training mode; None leaves it to the op."""
        sources = self._sources(base, c, augment)
        tensors = sources.tensors()
        plain = all(type(tensor) in _TENSORS for tensor in tensors)
        if not self.training or not keep or not plain or torch.is_inference_mode_enabled():
            return make_once(sources, dtype) if self.rounding == "stochastic" and plain else None
        if any(tensor.is_inference() for tensor in tensors):
            return make_once(sources, dtype) if self.rounding == "stochastic" else None
        with _making:
            if not keepable():
                if not on_device(sources, dtype):
                    return make_once(sources, dtype)
                # Memory from a graph's own pool must not outlive the capture.
                maker = DeviceMaker(sources, dtype) if capturing() else self._maker(sources, dtype)
                assert isinstance(maker, DeviceMaker)
                return maker.make(self.seed, changed=True)
            made = self._current(base, dtype, c)
            if made is not None:
                return made  # another thread was faster
            # another thread may forget at any moment, so nothing is looked up twice
            kept, group = self._kept.get(dtype), self._group
            if group is not None and kept is not None and kept.base is base:
                made = group.make(dtype, self)
                if made is not None:
                    return made
            maker, key = self._maker(sources, dtype), self._key(base, c)
            if isinstance(maker, DeviceMaker):
                made = maker.make(self.seed, kept is None or kept.key != key)
            else:
                made = maker.make()
            self._keep(base, c, maker, made, key).used = True
            return made

    def _sources(self, base: nn.Module, c: Tensor, augment: bool) -> Sources:
        weight, bias = base._parameters["weight"], base._parameters["bias"]
        assert weight is not None
        return Sources(c, weight, self.U, self.V, bias, self.scale, self.seed, augment)

    def _maker(self, sources: Sources, dtype: torch.dtype) -> DeviceMaker | HostMaker:
        """What makes weights in `dtype`, made anew where other tensors are in place of those it was made for."""
        maker = self._makers.get(dtype)
        if maker is None or maker.place != maker.place_of(sources, dtype):
            maker = (DeviceMaker if on_device(sources, dtype) else HostMaker)(sources, dtype)
            self._makers[dtype] = maker
        return maker

    def _keep(self, base: nn.Module, c: Tensor, maker: DeviceMaker | HostMaker, made: Effective, key: tuple) -> _Kept:
        # the maker keeps the storages alive: no other tensor can come to lie at an address in the key
        kept = self._kept[maker.dtype] = _Kept(base, key, c, maker, made)
        return kept

    def _apply(self, fn, recurse=True):
        self.forget()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}, "_makers": {}, "_group": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _start_counting()

    def _load_from_state_dict(self, *args) -> None:
        self.forget()
        super()._load_from_state_dict(*args)

    def extra_repr(self) -> str:
        return f"out={self.U.shape[0]}, in={self.V.shape[0]}, K={self.rank}, scale={self.scale:g}"


def padded(base: nn.Conv2d, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """x with the padding that a convolution cannot add itself, and the padding that is left for it to add."""
    if base.padding_mode != "zeros":
        return nn.functional.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode), (0, 0)
    if isinstance(base.padding, str):
        return nn.functional.pad(x, base._reversed_padding_repeated_twice), (0, 0)
    return x, tuple(base.padding)


class EffectiveGroup:
    """Cores whose stale effective weights are made together: the first that needs one makes all, in one call a dtype.

    A weight that no forward used since it was made is dropped instead.
    """

    def __init__(self, cores: Iterable[SubspaceCore]) -> None:
        self.cores = tuple(cores)
        # By dtypes of result and weight and by kind of device. A batch holds its makers, so that no other can be taken
        # for one of them.
        self._batches: dict[tuple, Batch] = {}
        for core in self.cores:
            core._group = self

    def make(self, dtype: torch.dtype, wanted: SubspaceCore) -> Effective | None:
        """Makes the weight of `wanted`, and all others that had one in `dtype`, round alike and are stale.

        Returns:
            The weight of `wanted`; None where another thread has made it forget the former one.
        """
        found: dict[tuple, list[tuple]] = {}
        for core in self.cores:
            kept = core._kept.get(dtype)
            c = core._parameters.get("c")
            if kept is None or c is None or not core.training or core.seed != wanted.seed:
                continue
            if not {"weight", "bias"} <= kept.base._parameters.keys():
                continue  # computed from others since
            key = core._key(kept.base, c)
            stale = key != kept.key or (kept.effective.spent if kept.core is None else True)
            if core is not wanted:
                if not stale or (kept.core is not None and key == kept.key and kept.shows(c)):
                    continue
                if not kept.used:
                    core._kept.pop(dtype, None)
                    core._makers.pop(dtype, None)
                    continue
            sources = core._sources(kept.base, c, kept.maker.augment)
            maker = core._maker(sources, dtype)
            found.setdefault((type(maker), sources.weight.dtype, maker.alone), []).append(
                (core, kept.base, c, maker, key != kept.key, key)
            )
        result = None
        for kind, members in found.items():
            cores, bases, cs, makers, changed, keys = zip(*members)
            if kind[2] or len(members) == 1:
                made = [
                    maker.make(wanted.seed, its) if isinstance(maker, DeviceMaker) else maker.make()
                    for maker, its in zip(makers, changed)
                ]
            else:
                batch = self._batches.get((dtype, kind))
                # Makers have no equality of their own, so lists of them are equal when they hold the same ones.
                if batch is None or batch.makers != list(makers):
                    batch = self._batches[dtype, kind] = Batch(makers)
                made = batch.make(wanted.seed, changed)
            for core, base, c, maker, effective, key in zip(cores, bases, cs, makers, made, keys):
                kept = core._keep(base, c, maker, effective, key)
                if core is wanted:
                    kept.used, result = True, effective
        return result
