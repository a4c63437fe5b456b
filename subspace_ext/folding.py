"""Folded weights kept between forwards: never stale, and on a GPU written in place, a whole model in one launch.

A kept fold is known by a key of everything it was made from. On a GPU each layer owns one matrix in which the fold and
both bases lie ready for a single product (`ops.subspace_linear.Folded`); a new fold overwrites its corner, and autograd
refuses to run a backward pass whose fold has been overwritten since.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from subspace_ext.ops.rank_update import Job, Launch
from subspace_ext.ops.subspace_linear import Folded

if TYPE_CHECKING:
    from subspace_ext.nn import _SubspaceLayer

_optimizer_steps = 0
# Set once a step is captured in a CUDA graph: its replays change cores and no counter tells.
_hidden_steps = False


def _count_optimizer_step(*_: Any) -> None:
    global _optimizer_steps, _hidden_steps
    _optimizer_steps += 1
    _hidden_steps = _hidden_steps or capturing()


# Fused optimisers and those that write through `.data` change a core without raising its version counter.
register_optimizer_step_post_hook(_count_optimizer_step)


def capturing() -> bool:
    """True while the current stream is captured into a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def keepable() -> bool:
    """False where a later forward could not tell whether a fold made now is still true."""
    return not _hidden_steps and not capturing()


def sources(layer: _SubspaceLayer) -> list[Tensor]:
    """What a fold is made from."""
    tensors = [layer.c, layer.weight, layer.U, layer.V]
    return tensors if layer.bias is None else [*tensors, layer.bias]


def key_of(layer: _SubspaceLayer, dtype: torch.dtype) -> tuple:
    """Differs whenever a fold of the layer in `dtype` may differ.

    Made for every layer in every forward, so it is flat and goes past the module's attribute lookup where it can: a
    wrapper may hold weight and bias as plain attributes.
    """
    parameters, buffers = layer._parameters, layer._buffers
    # `get` with a default would look the attribute up in any case
    weight = parameters["weight"] if "weight" in parameters else layer.weight  # noqa: SIM401
    bias = parameters["bias"] if "bias" in parameters else layer.bias  # noqa: SIM401
    c, U, V = parameters["c"], buffers["U"], buffers["V"]
    assert c is not None and weight is not None and U is not None and V is not None
    return (
        c.data_ptr(), c._version, weight.data_ptr(), weight._version,
        U.data_ptr(), U._version, V.data_ptr(), V._version,
        None if bias is None else bias.data_ptr(), None if bias is None else bias._version,
        layer.scale, layer.rounding, dtype, _optimizer_steps,
    )  # fmt: skip


class FoldBuffer:
    """A layer's matrix on a GPU, [[w_eff, s U], [V^T, 0]] (a convolution's w_eff alone), and the job that fills it."""

    def __init__(self, layer: _SubspaceLayer, dtype: torch.dtype) -> None:
        weight, rank = layer.weight.detach().flatten(1), layer.rank
        out_size, in_size = weight.shape
        self.place = self.place_of(layer, dtype)
        self._core = layer.c.detach()
        # The kernel reads float32 factors; these are copies only where the layer holds another dtype.
        self._mid = self._core.float()
        if layer.augments:
            # Rows of whole 16 bytes, as matrix products want them.
            width = (in_size + rank + 7) // 8 * 8
            augmented = torch.zeros(out_size + rank, width, dtype=dtype, device=weight.device)
            augmented[:out_size, in_size : in_size + rank] = layer.scale * layer.U
            augmented[out_size:, :in_size] = layer.V.t()
            bias = None
            if layer.bias is not None:
                bias = torch.cat([layer.bias.detach(), layer.bias.new_zeros(rank)]).to(dtype)
            target = augmented[:out_size, :in_size]
            u, v = augmented[:out_size, in_size : in_size + rank], augmented[out_size:, :in_size].t()
            self.folded = Folded(target, u, v, bias, augmented)
        else:
            target = torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format)
            bias = None if layer.bias is None else layer.bias.detach().to(dtype)
            scaled = (layer.scale * layer.U).to(dtype)
            self.folded = Folded(target.view(layer.weight.shape), scaled, layer.V.to(dtype), bias)
        self.job = Job(target, weight, layer.U.float(), self._mid, layer.V.float(), layer.scale)
        self._launch: Launch | None = None

    @staticmethod
    def place_of(layer: _SubspaceLayer, dtype: torch.dtype) -> tuple:
        """Differs when the buffer or its job has to be made anew, rather than filled again."""
        bias = layer.bias
        return (
            layer.c.data_ptr(),
            layer.weight.data_ptr(),
            *((basis.data_ptr(), basis._version) for basis in (layer.U, layer.V)),
            None if bias is None else (bias.data_ptr(), bias._version),
            layer.scale,
            dtype,
        )

    def prepare(self) -> None:
        """What has to happen before the job runs: the core in float32, and autograd told of the change."""
        if self._mid.data_ptr() != self._core.data_ptr():
            self._mid.copy_(self._core)
        torch.autograd.graph.increment_version(self.folded.weight)

    def fill(self, seed: int | None) -> None:
        """Folds anew, for this layer alone."""
        self._launch = self._launch or Launch([self.job])
        self.prepare()
        self._launch(seed)


class FoldGroup:
    """Layers whose stale folds are made together: the first that is asked for one folds all, in one launch a dtype."""

    def __init__(self, layers: Iterable[_SubspaceLayer]) -> None:
        self.layers = tuple(layers)
        # By dtypes of fold and weight: the buffers of the last launch, held so that no other can be taken for one of
        # them, and the launch.
        self._launches: dict[tuple[torch.dtype, torch.dtype], tuple[list[FoldBuffer], Launch]] = {}
        for layer in self.layers:
            layer._group = self

    def fill(self, dtype: torch.dtype, seed: int | None) -> None:
        """Folds every layer that was folded in `dtype` before, rounds as the caller does, and is stale."""
        by_weight: dict[torch.dtype, list[_SubspaceLayer]] = {}
        for layer in self.layers:
            if layer.has_stale_fold(dtype, seed):
                by_weight.setdefault(layer.weight.dtype, []).append(layer)
        for weight_dtype, layers in by_weight.items():
            buffers = [layer.buffer_in(dtype) for layer in layers]
            before, launch = self._launches.get((dtype, weight_dtype), ([], None))
            # Buffers have no equality of their own, so lists of them are equal when they hold the same ones.
            if launch is None or before != buffers:
                launch = Launch([buffer.job for buffer in buffers])
                self._launches[dtype, weight_dtype] = buffers, launch
            for buffer in buffers:
                buffer.prepare()
            launch(seed)
            for layer in layers:
                layer.keep(dtype)
