"""Sizes that are measured: the linears of VGGT-1B's aggregator."""

from __future__ import annotations

from dataclasses import dataclass

TOKENS_PER_VIEW = 1374
"""Tokens of one 518 x 518 image: 37 x 37 patches, one camera token, four registers."""
BLOCKS = 48
"""Blocks of the aggregator; each has the four linears once."""


@dataclass(frozen=True)
class LinearShape:
    name: str
    in_features: int
    out_features: int


SHAPES = {
    shape.name: shape
    for shape in (
        LinearShape("qkv", 1024, 3072),
        LinearShape("proj", 1024, 1024),
        LinearShape("fc1", 1024, 4096),
        LinearShape("fc2", 4096, 1024),
    )
}
