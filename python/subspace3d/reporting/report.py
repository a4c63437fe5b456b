"""The stage ``report``: one HTML page about a run folder that needs nothing else to be read, not even a network."""

from __future__ import annotations

import datetime
import platform
from importlib.metadata import version
from pathlib import Path

from subspace3d import __version__, files
from subspace3d.configs import ReportConfig
from subspace3d.progress import format_duration
from subspace3d.reporting import analysis_sections, result_sections
from subspace3d.reporting.collect import RunContent, collect
from subspace3d.reporting.html import Html, definitions, details, element, page, section


def run(config: ReportConfig) -> Path:
    """Write the page; parts of the run that are missing are named on it.

    Returns:
        the page's path.

    Raises:
        FileNotFoundError: the run folder does not exist or holds nothing to report.
        ValueError: one of its files cannot be read.
    """
    content = collect(config.run)
    path = config.out or config.run / "report" / "index.html"
    try:
        text = render(content)
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError) as error:
        raise ValueError(
            f"run: {config.run} has a results.json, analysis.json, tuned.json or metrics.jsonl that does not have the "
            f"layout of this version: {error!r:.200}"
        ) from error
    files.write_text(path, text)
    print(f"report -> {path}", flush=True)
    return path


def render(content: RunContent) -> str:
    """The whole page as text."""
    sections = [
        ("results", "Results", result_sections.results(content)),
        ("pictures", "Depth", result_sections.pictures(content)),
        ("training", "Training", result_sections.training(content)),
        ("spectra", "Spectra", analysis_sections.spectra(content.analysis)),
        ("largest", "Strength by layer", analysis_sections.largest(content.analysis)),
        ("disentanglement", "Disentanglement", analysis_sections.disentanglement(content.analysis)),
        ("weights", "Adapter weights", analysis_sections.weights(content.analysis)),
        ("run", "What was run", _run_section(content)),
        ("reading", "How to read this", _reading(content)),
    ]
    name = content.run.resolve().name
    return page(f"subspace3d: {name}", _subtitle(content), sections)


def _subtitle(content: RunContent) -> str:
    parts = []
    if content.results is not None:
        parts.append(
            f"{len(content.results.value['methods'])} methods on {len(content.results.value['scenes'])} test scenes"
        )
    if content.analysis is not None:
        attributes = ", ".join(content.analysis.value["attributes"])
        parts.append(f"subspaces of {attributes} in {len(content.analysis.value['modules'])} modules")
    return "; ".join(parts) or "training runs only"


def _run_section(content: RunContent) -> Html:
    newest = max(
        (item.path.stat().st_mtime for item in (content.results, content.analysis) if item is not None),
        default=None,
    )
    date = "unknown" if newest is None else f"{datetime.datetime.fromtimestamp(newest):%Y-%m-%d %H:%M}"
    seeds = sorted({str(record.get("settings", {}).get("seed")) for record in content.tuned.values()})
    backbones = sorted({_backbone_name(record) for record in content.tuned.values()})
    machines = sorted({record["environment"]["device"] for record in content.tuned.values() if "environment" in record})
    seconds = sum((record.get("training") or {}).get("seconds", 0) for record in content.tuned.values())
    items = [
        ("Run folder", str(content.run)),
        ("Results from", date),
        ("subspace3d", __version__),
        ("PyTorch", version("torch")),
        ("Python", platform.python_version()),
        ("Tuned on", ", ".join(machines) or "not recorded"),
        ("Backbone", ", ".join(backbones) or "not recorded"),
        ("Training seed", ", ".join(seeds) or "not recorded"),
        ("Fine-tuning time in all", format_duration(seconds) if seconds else "not recorded"),
    ]
    if content.settings is None:
        settings = element("p", "The run folder has no config.yaml, so its settings are not known.", class_="missing")
    else:
        settings = details("Settings (config.yaml)", element("pre", content.settings, tabindex="0"))
    return section("run", "What was run", definitions(items), settings)


def _backbone_name(record: dict) -> str:
    backbone = record.get("backbone", "unknown")
    return str(backbone.get("name", backbone)) if isinstance(backbone, dict) else str(backbone)


def _reading(content: RunContent) -> Html:
    nano = any("nano" in _backbone_name(record) for record in content.tuned.values())
    texts = [
        "Acc is the mean distance from predicted to true points and Comp the mean distance back, in scene units, after "
        "a similarity alignment and ICP; NC is the mean agreement of normals, 1 at best. AbsRel is the mean relative "
        "depth error after one scale per scene; raw columns are without any alignment. Rotation and translation errors "
        "are angles between relative camera poses.",
        "A mean over few scenes moves by chance. Before believing a difference, look at the scenes one by one, and at "
        "how many of them improved.",
        "An eigenvalue of 1 says that two attributes change a module in orthogonal directions, 0 that they share one. "
        "In few dimensions random subspaces are not orthogonal either, so the random level beside it is the measure.",
    ]
    if nano:
        texts.insert(
            0,
            "This run used vggt-nano, a VGGT small enough for a laptop. Its numbers compare methods under equal "
            "conditions at that scale; they are not the paper's, and they do not say which method wins on VGGT-1B.",
        )
    return section("reading", "How to read this", *(element("p", text) for text in texts))
