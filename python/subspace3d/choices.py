"""The words that settings choose from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

Attribute = Literal["texture", "geometry", "camera", "lighting"]
ATTRIBUTES: tuple[Attribute, ...] = get_args(Attribute)
Method = Literal["none", "full", "bias", "lora", "pissa", "adalora", "psv", "subspace"]
METHODS: tuple[Method, ...] = get_args(Method)
OWN_WEIGHTS: tuple[Method, ...] = ("full", "bias")
"""Methods that add nothing and train parameters of the backbone."""
LORA_METHODS: tuple[Method, ...] = ("lora", "pissa", "adalora")
"""Methods that train low-rank adapters alone."""
CORE_METHODS: tuple[Method, ...] = ("psv", "subspace")
"""Methods that train cores in a frozen basis."""
Heads = Literal["lora", "frozen"]
HEADS: tuple[Heads, ...] = get_args(Heads)
Task = Literal["faces", "bodies", "glass"]
TASKS: tuple[Task, ...] = get_args(Task)
Variant = Literal["auto", "cuda", "llvm", "scalar"]
ProtocolName = Literal["subspace3d", "authors", "vggt", "pi3", "cut3r", "da3", "all"]


def in_order(attributes: Iterable[str]) -> list[str]:
    """The names of `ATTRIBUTES` in their order, then others by the alphabet."""
    order: dict[str, int] = {name: index for index, name in enumerate(ATTRIBUTES)}
    return sorted(attributes, key=lambda name: (order.get(name, len(order)), name))
