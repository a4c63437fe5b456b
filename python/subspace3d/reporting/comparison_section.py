"""The section of the report about two checkpoints side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from subspace3d.reporting.collect import Document
from subspace3d.reporting.html import Html, details, element, plot, section, table

_TITLE = "In which layers do two checkpoints agree?"
_SIDES = ("output", "input")
_DIRECTIONS = (
    "Above: overlap of the subspaces that the two checkpoints have for one attribute, mean over the modules of a "
    "block. A filled point: more than half of these modules lie above the threshold, which about one of 30,000 random "
    "subspaces of the same sizes exceeds. Dotted: subspaces of different attributes; where they lie as high, the two "
    "share directions that are not the attribute's own. "
)
_BELOW = (
    "Stable rank of the mean update, and the share of the adapters' energy inside their subspace, of either checkpoint."
)


def comparison(document: Document | None) -> Html | None:
    """What ``analyze --compare`` found; None where it was not run."""
    if document is None:
        return None
    from subspace3d.reporting.comparison import comparison_png

    record = document.value
    directions = record["agreement"] is not None
    drawn = "Stable rank and shared energy of both checkpoints."
    if directions:
        drawn = f"Overlap by block on either side, beside that of random subspaces. {drawn}"
    figure = plot(comparison_png(record), drawn, (_DIRECTIONS if directions else "") + _BELOW)
    body = [element("p", record["sentence"] + "."), figure]
    if directions:
        body += [_layers(record), details("Every block", _blocks(record))]
    if not record["same_mining"]:
        text = "The subspaces were not mined alike (adapters, rank, k, model, source): ranks and shares differ by that."
        body.append(element("p", text, class_="note"))
    return section("comparison", _TITLE, *body)


def _layers(record: Mapping[str, Any]) -> Html:
    """Which blocks agree, and how many modules."""
    from subspace3d.reporting.comparison import agreeing_blocks

    rows = []
    for attribute in record["attributes"]:
        for side in _SIDES:
            level = record["agreement"][attribute][side]
            blocks = ", ".join(agreeing_blocks(record, attribute, side)) or "none"
            agree = f"{level['agree']} of {level['measured']}"
            rows.append(
                [attribute, side, blocks, agree, *(_number(level[key]) for key in ("overlap", "random", "others"))]
            )
    header = ["attribute", "side", "blocks that agree", "modules", "overlap", "random", "other attributes"]
    return table(header, rows, "Blocks of which more than half of the modules agree, and means over all modules.")


def _blocks(record: Mapping[str, Any]) -> Html:
    from subspace3d.reporting.comparison import block_name

    rows = []
    for attribute in record["attributes"]:
        for side in _SIDES:
            for block in record["agreement"][attribute][side]["blocks"]:
                agree = f"{block['agree']} of {block['measured']}"
                values = (_number(block[key]) for key in ("overlap", "random", "others"))
                rows.append([attribute, side, block_name(block), agree, *values])
    return table(["attribute", "side", "block", "modules that agree", "overlap", "random", "other attributes"], rows)


def _number(value: float | None) -> str:
    return "\u2013" if value is None else f"{value:.3f}"
