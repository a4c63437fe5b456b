"""What the spectrum of a mined module shows, and where in the network the module sits."""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# A drop is a step that is large in itself and large against its neighbours: see `find_drops`.
DROP_RATIO = 1.5
DROP_CONTRAST = 3.0
_NEIGHBOURS = 5
# Beyond this share of the largest value, float32 adapters hold rounding noise, not structure.
_NOISE = 1e-6

# The four behaviours of the paper's Fig. 2, in the order in which they are reported.
BEHAVIOURS = ("at rank", "at rank and beyond", "beyond rank", "none")


@dataclass(frozen=True)
class ModulePlace:
    """Where a module stands: ``aggregator.frame_blocks.3.attn.qkv`` is family, layer, kind.

    Attributes:
        family: the name before the first number, e.g. ``aggregator.frame_blocks``; empty when there is no number.
        layer: that number; None when there is none.
        kind: the name after it, e.g. ``attn.qkv``; the whole name when there is no number.
    """

    family: str
    layer: int | None
    kind: str


def place(name: str) -> ModulePlace:
    """Split a module name at its first number."""
    match = re.fullmatch(r"(?P<family>.+?)\.(?P<layer>\d+)(?:\.(?P<kind>.+))?", name)
    if match is None:
        return ModulePlace("", None, name)
    return ModulePlace(match["family"], int(match["layer"]), match["kind"] or match["family"].rpartition(".")[2])


def steps(singular_values: Sequence[float]) -> list[float]:
    """``d_i = ln(s_i / s_(i+1))``, values below 1e-6 of the first taken as that floor; empty when all are zero.

    Args:
        singular_values: descending.
    """
    if not singular_values or singular_values[0] <= 0:
        return []
    logs = [math.log(max(value, _NOISE * singular_values[0])) for value in singular_values]
    return [here - there for here, there in itertools.pairwise(logs)]


def find_drops(singular_values: Sequence[float]) -> list[int]:
    """All i (counted from 1) with a drop between the i-th and the (i + 1)-th singular value.

    With the d of `steps`, i is a drop if ``d_i >= ln 1.5`` and ``d_i`` is at least three times the median
    of the d of its five neighbours on either side.

    Args:
        singular_values: descending.
    """
    logs = steps(singular_values)
    drops = []
    for index, step in enumerate(logs):
        around = logs[max(0, index - _NEIGHBOURS) : index] + logs[index + 1 : index + 1 + _NEIGHBOURS]
        usual = statistics.median(around) if around else 0.0
        if step >= math.log(DROP_RATIO) and step >= DROP_CONTRAST * usual:
            drops.append(index + 1)
    return drops


def behaviour(drops: list[int], rank: int, length: int) -> str | None:
    """Name what the drops at and beyond the adapter rank say, one of `BEHAVIOURS`.

    ``at rank``: the adapters share one subspace of their own rank; ``beyond rank``: it is larger than one adapter;
    ``at rank and beyond``: both; ``none``: no shared subspace stands out. None when the spectrum ends at the rank
    (``length <= rank``), so that nothing could be seen.
    """
    if length <= rank:
        return None
    at, beyond = rank in drops, any(drop > rank for drop in drops)
    if at:
        return "at rank and beyond" if beyond else "at rank"
    return "beyond rank" if beyond else "none"
