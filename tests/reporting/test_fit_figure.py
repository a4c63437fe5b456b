"""The figure of fit: how it names blocks."""

from __future__ import annotations

import pytest

from subspace3d.reporting.figures import panels
from subspace3d.reporting.fit_figure import _SOURCES, _draw_layers

HEADS = ("camera_head.pose_branch.fc1", "camera_head.trunk.0.mlp.fc1", "depth_head.projects.1")


@pytest.mark.parametrize(
    ("depth", "heads", "expected"),
    [
        (2, HEADS, ["frame 0", "global 0", "frame 1", "global 1", "trunk 0", "projects 1", "others"]),
        (6, (), ["frame 0", "global 0", "frame 1", "global 1"]),
        (8, (), ["frame 0", "frame 1", "frame 2", "frame 3"]),
        (24, HEADS, ["frame 0", "global 2", "frame 5", "global 7"]),
    ],
)
def test_blocks_are_named_in_their_order_and_no_more_than_there_is_room_for(
    depth: int, heads: tuple[str, ...], expected: list[str]
) -> None:
    blocks = [f"aggregator.{kind}_blocks.{index}" for index in range(depth) for kind in ("frame", "global")]
    names = [f"{block}.{layer}" for block in blocks for layer in ("attn.qkv", "mlp.fc1")] + list(heads)
    module = {"norm": 1.0, "shares": {source: {"core": 0.1} for source in _SOURCES}}
    _, ((axis,),) = panels(1, 1, 4, 3)
    _draw_layers(axis, {"K": 4, "modules": dict.fromkeys(names, module)})
    labels = [label.get_text() for label in axis.get_xticklabels()]
    assert labels[: len(expected)] == expected and len(labels) <= 12
