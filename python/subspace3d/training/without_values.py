"""Running a network on tensors that have shapes and no values: what of it would read a value, or keep such a tensor."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

# of a rotary embedding: what makes its tables, what turns half a head by them, where it keeps them
_ROTARY = (
    ("_compute_frequency_components", "_apply_1d_rope", "frequency_cache"),  # VGGT's
    ("get_cos_sin", "apply_rope1d", "cache"),  # CroCo's, which Pi3 and its relatives use
)


@contextlib.contextmanager
def without_values(model: nn.Module) -> Iterator[None]:
    """Within it ``model`` computes on fake tensors what it computes on real ones, and is afterwards as it was before.

    Numbers drawn in a forward, by which MapAnything chooses among inputs that it is not given here, are one half. The
    rotary embeddings that the code of VGGT and that of CroCo have handed down take the size of their table from the
    largest position; here it is the number of tokens. Tables that modules keep between calls are put back.
    """
    tables = list(_tables(model))
    before = [dict(table) for table in tables]
    rotary = [
        (module, names)
        for module in model.modules()
        for names in _ROTARY
        if all(hasattr(module, name) for name in names)
    ]
    try:
        for table in tables:
            table.clear()
        for module, (tables_of, turn, _) in rotary:
            module.forward = functools.partial(_rotate, getattr(module, tables_of), getattr(module, turn))
        with _Draws():
            yield
    finally:
        for module, _ in rotary:
            del module.forward
        for table, content in zip(tables, before):
            table.clear()
            table.update(content)


class _Draws(TorchFunctionMode):
    """What ``torch.rand`` draws is one half, so that a forward can decide by ``draw < p``, alone or with ``any``."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, tuple[Any, float]] = {}  # by identity, with the tensor, so that no other gets its place

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        of = self._known.get(id(args[0])) if args else None
        if of is not None and func is torch.Tensor.__bool__:
            return bool(of[1])
        result = func(*args, **(kwargs or {}))
        if func is torch.rand:
            self._known[id(result)] = result, 0.5
        elif of is not None and func in (torch.Tensor.lt, torch.Tensor.__lt__) and isinstance(args[1], (int, float)):
            self._known[id(result)] = result, of[1] < args[1]
        elif of is not None and func in (torch.Tensor.any, torch.any) and len(args) == 1:
            self._known[id(result)] = result, of[1]
        return result


def _tables(model: nn.Module) -> Iterator[dict[Any, Any]]:
    """Dictionaries of tensors that modules, or plain objects of theirs, hold: those with cache in their name."""
    seen: set[int] = set()
    for module in model.modules():
        for holder in (module, *vars(module).values()):
            if isinstance(holder, (torch.Tensor, type)) or not hasattr(holder, "__dict__"):
                continue
            for name, value in vars(holder).items():
                if "cache" in name and isinstance(value, dict) and id(value) not in seen:
                    seen.add(id(value))
                    yield value


def _rotate(tables_of: Any, turn: Any, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The rotary embedding of one module, with a table of as many rows as there are tokens."""
    rows = positions.shape[-2] + 1
    tables = tables_of(tokens.size(-1) // 2, rows, tokens.device, tokens.dtype)
    halves = tokens.chunk(2, dim=-1)
    return torch.cat([turn(half, positions[..., axis], *tables) for axis, half in enumerate(halves)], dim=-1)
