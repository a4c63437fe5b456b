"""Where effective weights are made: for one layer or a whole model at once, on a GPU in place.

On a GPU each layer owns one matrix in which the weight and both bases lie ready for a single product
(`ops.subspace_linear.Effective`); a new weight overwrites its corner, and autograd refuses to run a backward pass whose
weight has been overwritten since. On a CPU every weight gets memory of its own, so that no backward pass loses its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from subspace_ext.ops.effective_weight import effective_weight
from subspace_ext.ops.rank_update import HostLaunch, HostUpdate, Job, Launch, fits, fits_host
from subspace_ext.ops.subspace_linear import Effective, without_autocast


class Sources(NamedTuple):
    """What an effective weight is made from; all but the last three are tensors as the layer holds them."""

    c: Tensor  # [K, K]
    weight: Tensor  # [out, in], or [out, Cin, kh, kw]
    U: Tensor  # [out, K]
    V: Tensor  # [in, K]
    bias: Tensor | None  # [out]
    scale: float
    seed: int | None  # of stochastic rounding; None rounds to nearest
    augment: bool  # whether one matrix shall hold the weight with both bases around it

    def tensors(self) -> list[Tensor]:
        tensors = [self.c, self.weight, self.U, self.V]
        return tensors if self.bias is None else [*tensors, self.bias]


def merged_weight(
    weight: Tensor, c: Tensor, U: Tensor, V: Tensor, scale: float, dtype: torch.dtype, seed: int | None = None
) -> Tensor:
    """cast(w + scale * U c V^T), accumulated in float32 or wider and rounded once; shaped like `weight`."""
    return effective_weight(weight.flatten(1), U, c, V, scale, dtype, seed).view(weight.shape)


@torch.no_grad()
def make_once(sources: Sources, dtype: torch.dtype) -> Effective:
    """An effective weight that shares nothing with others."""
    c, weight, U, V, bias, scale, seed, _ = sources
    with without_autocast(weight.device.type):
        merged = merged_weight(weight, c, U, V, scale, dtype, seed)
        return Effective(merged, (scale * U).to(dtype), V.to(dtype), None if bias is None else bias.to(dtype))


class _Maker:
    """Makes the effective weights of one core in one dtype, again and again; holds what does not change with `c`."""

    alone = False
    """Whether its weight cannot be made in one call with others."""

    def __init__(self, sources: Sources, dtype: torch.dtype) -> None:
        self.dtype, self.augment = dtype, sources.augment
        self.place = self.place_of(sources, dtype)
        # Storages that stay alive while their addresses are compared.
        self._aliases = [tensor.detach() for tensor in sources.tensors()]

    @staticmethod
    def place_of(sources: Sources, dtype: torch.dtype) -> tuple:
        """Differs when a maker has to be made anew."""
        _, _, U, V, bias, scale, seed, augment = sources
        layouts = [(tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) for tensor in sources.tensors()]
        versions = U._version, V._version, None if bias is None else bias._version
        return (*layouts, versions, scale, seed, augment, dtype)


class DeviceMaker(_Maker):
    """A layer's matrix on a GPU, [[w_eff, s U], [V^T, 0]] (a convolution's w_eff alone), and the job that fills it."""

    def __init__(self, sources: Sources, dtype: torch.dtype) -> None:
        super().__init__(sources, dtype)
        weight, rank = sources.weight.detach().flatten(1), sources.U.shape[1]
        out_size, in_size = weight.shape
        bias, scale = sources.bias, sources.scale
        self._core = sources.c.detach()
        # The kernel reads float32 factors; these are copies only where the core has another dtype.
        self._mid = self._core.float()
        if sources.augment:
            # Rows of whole 16 bytes, as matrix products want them.
            width = (in_size + rank + 7) // 8 * 8
            augmented = torch.zeros(out_size + rank, width, dtype=dtype, device=weight.device)
            augmented[:out_size, in_size : in_size + rank] = scale * sources.U
            augmented[out_size:, :in_size] = sources.V.t()
            if bias is not None:
                bias = torch.cat([bias.detach(), bias.new_zeros(rank)]).to(dtype)
            target = augmented[:out_size, :in_size]
            u, v = augmented[:out_size, in_size : in_size + rank], augmented[out_size:, :in_size].t()
            self.effective = Effective(target, u, v, bias, augmented)
        else:
            target = torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format)
            bias = None if bias is None else bias.detach().to(dtype)
            scaled = (scale * sources.U).to(dtype)
            self.effective = Effective(target.view(sources.weight.shape), scaled, sources.V.to(dtype), bias)
        self.job = Job(target, weight, sources.U.float(), self._mid, sources.V.float(), scale)
        self._launch: Launch | None = None

    def prepare(self, changed: bool) -> None:
        """What has to happen before the job runs: the core in float32, and autograd told of a change.

        Where nothing autograd counts has changed, a weight is written again in case the core was, behind its back; a
        graph that still waits for its backward pass then stays as good as it was.
        """
        if self._mid.data_ptr() != self._core.data_ptr():
            self._mid.copy_(self._core)
        if changed:
            torch.autograd.graph.increment_version(self.effective.weight)
        self.effective.spent = False

    def make(self, seed: int | None, changed: bool) -> Effective:
        """The weight of this layer alone."""
        self._launch = self._launch or Launch([self.job])
        self.prepare(changed)
        self._launch(seed)
        return self.effective


class HostMaker(_Maker):
    """On a CPU: both bases and the bias in the dtype of the call, and the update for the native kernel if it fits."""

    def __init__(self, sources: Sources, dtype: torch.dtype) -> None:
        super().__init__(sources, dtype)
        c, weight, U, V, bias, scale, self._seed, _ = sources
        with without_autocast(weight.device.type):
            self._u, self._v = (scale * U).to(dtype), V.to(dtype)
            self._bias = None if bias is None else bias.detach().to(dtype)
        self._c, self._weight, self._scale, self._U, self._V = (
            c.detach(),
            weight.detach(),
            scale,
            U.detach(),
            V.detach(),
        )
        native = self._seed is None and weight.is_contiguous()
        self.alone = not (native and fits_host(self._weight.flatten(1), self._U, self._c, self._V, dtype))
        self._launch: HostLaunch | None = None

    @property
    def update(self) -> HostUpdate:
        return HostUpdate(self._weight.flatten(1), self._U, self._c, self._V, self._scale)

    def wrap(self, weight: Tensor) -> Effective:
        return Effective(weight.view(self._weight.shape), self._u, self._v, self._bias)

    def make(self) -> Effective:
        """The weight of this layer alone, in memory of its own."""
        if self.alone:
            with without_autocast(self._weight.device.type):
                merged = merged_weight(self._weight, self._c, self._U, self._V, self._scale, self.dtype, self._seed)
            return self.wrap(merged)
        self._launch = self._launch or HostLaunch([self.update], self.dtype)
        return self.wrap(self._launch()[0])


def on_device(sources: Sources, dtype: torch.dtype) -> bool:
    """Whether the GPU's kernel makes this weight, in a matrix of the layer's own."""
    return sources.weight.is_contiguous() and fits(sources.weight, sources.U, sources.c.detach(), sources.V, dtype)


class Batch:
    """Makers whose weights are made by one call, put together once for as long as the makers stay the same."""

    def __init__(self, makers: Sequence[DeviceMaker | HostMaker]) -> None:
        self.makers = list(makers)
        devices = [maker for maker in makers if isinstance(maker, DeviceMaker)]
        hosts = [maker for maker in makers if isinstance(maker, HostMaker)]
        self._devices, self._hosts = devices, hosts
        self._device_launch = Launch([maker.job for maker in devices]) if devices else None
        self._host_launch = HostLaunch([maker.update for maker in hosts], hosts[0].dtype) if hosts else None

    def make(self, seed: int | None, changed: Sequence[bool]) -> list[Effective]:
        """The weights, in the order of the makers, which are all of one kind."""
        if self._host_launch is not None:
            return [maker.wrap(weight) for maker, weight in zip(self._hosts, self._host_launch())]
        assert self._device_launch is not None
        for maker, its in zip(self._devices, changed):
            maker.prepare(its)
        self._device_launch(seed)
        return [maker.effective for maker in self._devices]
