"""What the figures of the analysis share: colours, the panels' order, titles and legends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from subspace3d.reporting.figures import COLOURS, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RANDOM_COLOUR = "#777777"
_ATTRIBUTE_COLOURS = dict(zip(("texture", "geometry", "camera", "lighting"), COLOURS))
# Pairs of attributes: none of the colours above, so that no pair is taken for an attribute.
_PAIR_COLOURS = ("#332288", "#44AA99", "#AA4499", "#C4A000", "#88CCEE", "#882255", "#117733", "#777777")

_MOST_KINDS = 4
_USUAL_KINDS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def attribute_colour(name: str, index: int) -> str:
    return _ATTRIBUTE_COLOURS.get(name, COLOURS[(index + 4) % len(COLOURS)])


def pair_colour(index: int) -> str:
    return _PAIR_COLOURS[index % len(_PAIR_COLOURS)]


def title(axis: Axes, text: str, colour: str = INK) -> None:
    axis.set_title(text, fontsize=9.5, color=colour, loc="left")


def legend(figure: Figure, handles: Sequence[Any]) -> None:
    rows = 1 + len(handles) // 7
    columns = -(-len(handles) // rows)
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False, fontsize=9)


def finish_layers(axes: Sequence[Sequence[Axes]], columns: Sequence[str]) -> None:
    """Heads and axes of a grid of panels of values in 0..1 over the layers, a column for each kind of module."""
    from matplotlib.ticker import MaxNLocator

    for axis, kind in zip(axes[0], columns):
        title(axis, kind)
    for axis in axes[-1]:
        axis.set_xlabel("layer", fontsize=8.5)
    axes[0][0].set_ylim(-0.03, 1.05)
    axes[0][0].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))


def kinds(modules: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The kinds with the most modules: those of a transformer block first, the others by name."""
    counts = Counter(module["kind"] for module in modules.values())
    order = {kind: index for index, kind in enumerate(_USUAL_KINDS)}
    chosen = [kind for kind, _ in counts.most_common(_MOST_KINDS)]
    return sorted(chosen, key=lambda kind: (order.get(kind, len(order)), kind))


def families(modules: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The two families with the most modules of the drawn kinds: frame and global blocks of a VGGT."""
    shown = kinds(modules)
    return [name for name, _ in Counter(m["family"] for m in modules.values() if m["kind"] in shown).most_common(2)]


def by_layer(modules: Mapping[str, Mapping[str, Any]], kind: str, family: str) -> list[tuple[int, str]]:
    """(layer, module name) of one kind and family, in the order of the layers."""
    found = [(m["layer"] or 0, name) for name, m in modules.items() if m["kind"] == kind and m["family"] == family]
    return sorted(found)
