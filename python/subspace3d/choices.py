"""The words that settings choose from."""

from __future__ import annotations

from typing import Literal

Attribute = Literal["texture", "geometry", "camera", "lighting"]
ATTRIBUTES: tuple[Attribute, ...] = ("texture", "geometry", "camera", "lighting")
Method = Literal["none", "full", "bias", "lora", "pissa", "adalora", "psv", "subspace"]
METHODS: tuple[Method, ...] = ("none", "full", "bias", "lora", "pissa", "adalora", "psv", "subspace")
CORE_METHODS: tuple[Method, ...] = ("psv", "subspace")
Heads = Literal["lora", "frozen"]
HEADS: tuple[Heads, ...] = ("lora", "frozen")
Task = Literal["faces", "bodies", "glass"]
TASKS: tuple[Task, ...] = ("faces", "bodies", "glass")
Variant = Literal["auto", "cuda", "llvm", "scalar"]
ProtocolName = Literal["subspace3d", "authors", "vggt", "pi3", "cut3r", "da3", "all"]
