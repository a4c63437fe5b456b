"""Cores and adapters without a gradient are named."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import subspace_ext as se
from subspace3d.training.gradient_watch import GradientWatch, watched_parameters


class Reader(nn.Module):
    """Calls one of its layers, and reads the weight of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read = (
            se.SubspaceLinear.from_linear(nn.Linear(4, 4), torch.randn(4, 2), torch.randn(4, 2)) for _ in range(2)
        )
        self.head = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(nn.functional.linear(self.called(x), self.read.weight))


def _steps(model: nn.Module, watch: GradientWatch, count: int) -> list[tuple[str, ...]]:
    found = []
    for _ in range(count):
        model.zero_grad()
        model(torch.randn(3, 4)).sum().backward()
        found.append(watch.after_backward())
    return found


def test_a_core_whose_weight_is_read_is_named_once() -> None:
    model = Reader()
    watched = watched_parameters(model)
    assert set(watched) == {"called.core.c", "read.core.c"}
    watch = GradientWatch(watched)
    with pytest.warns(
        UserWarning, match=r"1 of 2 cores and adapters got no gradient in the first 3 steps: read\.core\.c"
    ):
        assert _steps(model, watch, 4) == [(), (), ("read.core.c",), ()]


def test_nothing_is_said_where_all_learn() -> None:
    model = Reader()
    model.read = nn.Linear(4, 4)  # type: ignore[assignment]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _steps(model, GradientWatch(watched_parameters(model), steps=1), 3)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        GradientWatch({}, steps=0)
