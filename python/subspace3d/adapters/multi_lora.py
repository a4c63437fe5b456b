"""Several LoRAs on one frozen network at a time, each for its own share of the batch."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from subspace3d.backbones.find import backbone_of


def add_updates(result: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """``y_i = result_i + s (x_i A_i^T) B_i^T`` for the i-th of n equal shares of the first axis.

    Args:
        result (Tensor): what the frozen layer gives, ``[n m, ..., out]``.
        x (Tensor): its input, ``[n m, ..., in]``.
        a (Tensor): ``[n, r, in]``.
        b (Tensor): ``[n, out, r]``.
        scale (float): s.

    Returns:
        Tensor: ``[n m, ..., out]``.

    Raises:
        ValueError: the first axis of ``x`` has no n equal shares.
    """
    _check_shares(x, len(a))
    rows = x[..., 0].numel() // len(a)
    inner = torch.bmm(x.reshape(len(a), rows, x.shape[-1]), a.mT)
    # of networks in half precision, whose LoRAs PEFT keeps in float32
    wide = torch.promote_types(result.dtype, inner.dtype)
    blocks = result.reshape(len(a), rows, result.shape[-1]).to(wide)
    return torch.baddbmm(blocks, inner.to(wide), b.mT.to(wide), alpha=scale).view(result.shape)


def add_updates_ref(
    result: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float
) -> torch.Tensor:
    """`add_updates`, one adapter after the other as PEFT's layer has it."""
    _check_shares(x, len(a))
    shares = (each.unflatten(0, (len(a), len(x) // len(a))) for each in (result, x))
    return torch.cat([mine + x_i @ a_i.mT @ b_i.mT * scale for mine, x_i, a_i, b_i in zip(*shares, a, b)])


class MultiLora(nn.Module):
    """A frozen Linear, and on the i-th share of the batch the i-th of the chosen LoRAs: `add_updates`.

    Args:
        layers (Sequence): PEFT's layers around one base layer, each with the LoRA ``default``, of one rank and scaling;
            their parameters become those of this module, too.
        chosen (list[int]): indices into ``layers``, in the order of the shares; changed from outside.

    Raises:
        ValueError: dropout, a variant of LoRA, or different scalings.
    """

    def __init__(self, layers: Sequence[Any], chosen: list[int]) -> None:
        super().__init__()
        scales = {layer.scaling["default"] for layer in layers}
        plain = all(
            isinstance(layer.lora_dropout["default"], nn.Identity) and not layer.lora_variant for layer in layers
        )
        if len(scales) != 1 or not plain:
            raise ValueError(
                f"layers must be plain LoRAs of one scaling without dropout, got scalings {sorted(scales)}"
            )
        self.base_layer = layers[0].get_base_layer()
        self.lora_A = nn.ModuleList(layer.lora_A["default"] for layer in layers)
        self.lora_B = nn.ModuleList(layer.lora_B["default"] for layer in layers)
        self.scale: float = scales.pop()
        self.chosen = chosen

    def __getattr__(self, name: str) -> Any:
        """What parents ask a Linear for: its weight, bias and sizes."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [n m, ..., in]`` -> ``[n m, ..., out]``, with n LoRAs chosen."""
        result = self.base_layer(x)
        a, b = (
            torch.stack([side[index].get_parameter("weight") for index in self.chosen])
            for side in (self.lora_A, self.lora_B)
        )
        # as PEFT's layer does: a batch may come in another type than that of the factors
        return add_updates(result, x.to(a.dtype), a, b, self.scale).to(result.dtype)


def share_weights(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """A copy of the modules that contain those called ``names``; these, all others and all tensors are shared."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    above = {name[:end] for name in names for end, letter in enumerate(name) if letter == "."}
    memo |= {id(module): module for name, module in model.named_modules() if name and name not in above}
    backbone = backbone_of(model)
    memo[id(backbone)] = backbone
    return copy.deepcopy(model, memo)


@contextlib.contextmanager
def joined(model: nn.Module, tuned: Sequence[nn.Module]) -> Iterator[list[int]]:
    """Within it ``model`` computes with the LoRAs of ``tuned``, each on its own equal share of the scenes.

    Adapted Linears run once for all, see `MultiLora`. A part of the network, one of its direct children, that holds an
    adapted convolution runs share by share instead: nothing is gained by joining convolutions, and such heads take
    their images in chunks that no share ends with.

    Args:
        model (nn.Module): the plain network; as it was afterwards.
        tuned (Sequence[nn.Module]): PeftModels, each around a copy of it that `share_weights` made.

    Yields:
        list[int]: indices of those the next batch is for, in its order; all of them at first.
    """
    from peft.tuners.lora import LoraLayer

    chosen = list(range(len(tuned)))
    copies = [each.get_base_model() for each in tuned]  # type: ignore[operator]
    names = [name for name, module in copies[0].named_modules() if isinstance(module, LoraLayer)]
    plain = {name: model.get_submodule(name) for name in names}
    parts = {name.partition(".")[0] for name, module in plain.items() if not isinstance(module, nn.Linear)}
    with contextlib.ExitStack() as stack:
        for part in sorted(parts):
            forward = functools.partial(_share_by_share, chosen, [each.get_submodule(part) for each in copies])
            stack.enter_context(_forward_of(model.get_submodule(part), forward))
        for name, module in plain.items():
            if name.partition(".")[0] not in parts:
                stack.callback(_replace, model, name, module)
                _replace(model, name, MultiLora([each.get_submodule(name) for each in copies], chosen))
        yield chosen


def _share_by_share(chosen: list[int], modules: Sequence[nn.Module], *args: Any, **kwargs: Any) -> Any:
    """The i-th of the chosen modules on the i-th share of the first axis of every tensor; results joined again."""
    leaves, structure = tree_flatten((args, kwargs))
    shares = [_split(leaf, len(chosen)) if torch.is_tensor(leaf) else [leaf] * len(chosen) for leaf in leaves]
    results = []
    for share, index in enumerate(chosen):
        positional, named = tree_unflatten([leaf[share] for leaf in shares], structure)
        results.append(modules[index](*positional, **named))
    return tree_map(lambda *pieces: torch.cat(pieces) if torch.is_tensor(pieces[0]) else pieces[0], *results)


@contextlib.contextmanager
def _forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _split(x: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    _check_shares(x, count)
    return x.chunk(count)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _check_shares(x: torch.Tensor, count: int) -> None:
    if not count or not x.ndim or len(x) % count:
        raise ValueError(f"x must have one or more equal shares for {count} adapters, got shape {tuple(x.shape)}")
