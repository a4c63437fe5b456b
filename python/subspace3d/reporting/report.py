"""One HTML page about a run folder that needs nothing else to be read, not even a network."""

from __future__ import annotations

from pathlib import Path

from subspace3d import files
from subspace3d.reporting import (
    analysis_sections,
    comparison_section,
    depth_section,
    fit_section,
    result_sections,
    run_sections,
    space_section,
)
from subspace3d.reporting.collect import RunContent, collect
from subspace3d.reporting.html import page


def write_report(run: Path, path: Path) -> None:
    """Write the page of a run folder to ``path``; parts of the run that are missing are named on it.

    Raises:
        FileNotFoundError: the run folder does not exist or holds nothing to report.
        ValueError: one of its files cannot be read.
    """
    content = collect(run)
    try:
        text = render(content)
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError) as error:
        raise ValueError(
            f"run: {run} has a results.json, analysis.json, comparison.json, tuned.json or metrics.jsonl that does "
            f"not have the layout of this version: {error!r:.200}"
        ) from error
    files.write_text(path, text)


def render(content: RunContent) -> str:
    """The whole page as text."""
    sections = [
        ("run", "What was run", run_sections.summary(content)),
        ("results", "Results", result_sections.results(content)),
        ("costs", "Costs", result_sections.costs(content)),
        ("space", "In space", space_section.space(content)),
        ("depth", "Depth", depth_section.depth(content)),
        ("training", "Training", result_sections.training(content)),
        ("fit", "Fit", fit_section.fit(content.fit)),
        ("spectra", "Spectra", analysis_sections.spectra(content.analysis)),
        ("largest", "Strength by layer", analysis_sections.largest(content.analysis)),
        ("disentanglement", "Disentanglement", analysis_sections.disentanglement(content.analysis)),
        ("weights", "Adapter weights", analysis_sections.weights(content.analysis)),
        ("provenance", "Provenance", run_sections.provenance(content)),
        ("reading", "How to read this", run_sections.reading()),
    ]
    few = run_sections.few(content)
    if few is not None:
        sections.insert(1, ("few", "A few images", few))
    compared = comparison_section.comparison(content.comparison)
    if compared is not None:
        place = [anchor for anchor, _, _ in sections].index("provenance")
        sections.insert(place, ("comparison", "Two checkpoints", compared))
    return page(f"subspace3d: {content.run.resolve().name}", _subtitle(content), sections)


def _subtitle(content: RunContent) -> str:
    parts = []
    if content.results is not None:
        parts.append(
            f"{len(content.results.value['methods'])} methods on {len(content.results.value['scenes'])} test scenes"
        )
    if content.analysis is not None:
        attributes = ", ".join(content.analysis.value["attributes"])
        parts.append(f"subspaces of {attributes} in {len(content.analysis.value['modules'])} modules")
    if content.comparison is not None:
        parts.append("two checkpoints compared")
    return "; ".join(parts) or "training runs only"
