"""Spectra, disentanglement and, given the adapters, stability of mined subspaces: analysis.json and its figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from subspace3d import files, outputs
from subspace3d.log import logger


@dataclass(frozen=True)
class AnalyzeConfig:
    """Spectra, disentanglement and, given the adapters, stability of mined subspaces as JSON and PNG."""

    subspaces: tuple[Path, ...]
    """Subspace files, or folders of them; a file's stem names its attribute."""
    out: Path
    """Folder for analysis.json and the figures."""
    adapters: tuple[Path, ...] = ()
    """Folders with the adapters that the subspaces were mined from. With them each adapter is left out in turn: is the
    subspace stable, and how much of an adapter that it has not seen does it explain?"""

    def reads(self) -> list[tuple[str, Path]]:
        return outputs.named(subspaces=self.subspaces, adapters=self.adapters)

    def writes(self) -> list[outputs.Output]:
        return [outputs.Output("out", self.out, outputs.ANALYSIS)]


def run(config: AnalyzeConfig) -> Path:
    """Compare the subspaces of several attributes and write ``analysis.json`` and its figures to ``config.out``.

    With ``config.adapters`` the mining is repeated without each adapter in turn. Nothing is done when everything asked
    for was already made from the same files.

    Returns:
        the path of ``analysis.json``.

    Raises:
        FileNotFoundError: a subspace file does not exist, or there is no adapter below a folder of them.
        ValueError: a file cannot be read, the files are of different base models or modules, or an adapter that a
            subspace was mined from is not found.
    """
    from subspace3d.formats.subspace import find_subspaces, load_subspace
    from subspace3d.mining.analyze import analyze, describe
    from subspace3d.mining.cross_validation import cross_validate, find_mined_adapters
    from subspace3d.reporting import analysis_figures

    config = outputs.check(config)
    path = config.out / "analysis.json"
    found = find_subspaces(config.subspaces)
    inputs = {attribute: files.sha256(file) for attribute, file in found.items()}
    if _is_done(path, inputs, bool(config.adapters)):
        logger.info(f"{path}: already made from the same {len(inputs)} subspace files")
        return path
    subspaces = {attribute: load_subspace(file) for attribute, file in found.items()}
    analysis = {**analyze(subspaces), "inputs": inputs}
    if config.adapters:
        adapters = find_mined_adapters(subspaces, config.adapters)
        analysis["cross_validation"] = cross_validate(subspaces, analysis["attributes"], adapters)
    outputs.mark(config.out, outputs.ANALYSIS)
    analysis_figures.draw_analysis(analysis, config.out)
    # written last: whoever sees it finds the figures beside it
    files.write_json(path, analysis)
    for line in describe(analysis):
        logger.info(line)
    logger.info(f"analysis -> {path}")
    logger.info(f"next: subspace3d report {config.out.parent}")
    return path


def _is_done(path: Path, inputs: Mapping[str, str], with_adapters: bool) -> bool:
    from subspace3d.formats.analysis import VERSION

    if not path.is_file():
        return False
    try:
        analysis = files.read_record(path)
    except ValueError as error:
        logger.info(f"analyzing anew: {error}")
        return False
    same = analysis.get("version") == VERSION and analysis.get("inputs") == inputs
    return same and (analysis.get("cross_validation") is not None or not with_adapters)
