"""The figures of the analysis by name, drawn by matplotlib from the content of analysis.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subspace3d import files, outputs
from subspace3d.reporting.adapter_figures import draw_explained, draw_stability, draw_weights
from subspace3d.reporting.disentanglement_figures import draw_disentanglement, draw_disentanglement_layers
from subspace3d.reporting.figures import to_png
from subspace3d.reporting.spectra_figures import draw_behaviours, draw_largest, draw_spectra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# A drawer returns None where the analysis has nothing of that kind: one attribute only, or no adapters given.
DRAWERS: dict[str, Callable[[Mapping[str, Any]], Figure | None]] = {
    "spectra": draw_spectra,
    "behaviours": draw_behaviours,
    "largest": draw_largest,
    "disentanglement": draw_disentanglement,
    "disentanglement_layers": draw_disentanglement_layers,
    "weights": draw_weights,
    "stability": draw_stability,
    "explained": draw_explained,
}


def draw_analysis(analysis: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw every figure of `DRAWERS` that the analysis has the numbers for, as ``<name>.png``.

    Args:
        analysis: what `subspace3d.mining.analyze.analyze` returns, or its JSON file read again.
        folder: where the figures go; made if needed.

    Returns:
        the files written.
    """
    folder = outputs.claim(folder, outputs.ANALYSIS, "folder")
    written = []
    for name, draw in DRAWERS.items():
        figure = draw(analysis)
        if figure is not None:
            path = Path(folder) / f"{name}.png"
            with files.atomic_path(path) as temporary:
                temporary.write_bytes(to_png(figure))
            written.append(path)
    return written
