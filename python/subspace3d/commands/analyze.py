"""Spectra, disentanglement and stability of mined subspaces, or the subspaces of two checkpoints side by side."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subspace3d import files, outputs
from subspace3d.log import logger
from subspace3d.settings import require

if TYPE_CHECKING:
    from subspace3d.formats.subspace import SubspaceFile


@dataclass(frozen=True)
class AnalyzeConfig:
    """Spectra, disentanglement and, given the adapters, stability of mined subspaces as JSON and PNG."""

    out: Path
    """Folder for analysis.json (with --compare comparison.json) and the figures."""
    subspaces: tuple[Path, ...] = ()
    """Subspace files, or folders of them; a file's stem names its attribute."""
    adapters: tuple[Path, ...] = ()
    """Folders with the adapters that the subspaces were mined from. With them each adapter is left out in turn: is the
    subspace stable, and how much of an adapter that it has not seen does it explain?"""
    compare: tuple[Path, Path] | None = None
    """In the place of --subspaces: the subspaces of two checkpoints, two folders of files or two files. Which layers
    agree, beside random subspaces? Across architectures spectra, shared energy and the order of attributes alone."""

    def __post_init__(self) -> None:
        given = (bool(self.subspaces), self.compare is not None)
        require(sum(given) == 1, "subspaces or compare", "given, one of the two", self.subspaces or self.compare)

    def reads(self) -> list[tuple[str, Path]]:
        return outputs.named(subspaces=self.subspaces, adapters=self.adapters, compare=self.compare or ())

    def writes(self) -> list[outputs.Output]:
        return [outputs.Output("out", self.out, outputs.ANALYSIS)]


def run(config: AnalyzeConfig) -> Path:
    """Compare the subspaces of several attributes and write ``analysis.json`` and its figures to ``config.out``.

    With ``config.adapters`` the mining is repeated without each adapter in turn. With ``config.compare`` two
    checkpoints are compared instead, attribute by attribute: ``comparison.json``, ``.png`` and ``.md``. Nothing is done
    when everything asked for was already made from the same files.

    Returns:
        the path of ``analysis.json`` or ``comparison.json``.

    Raises:
        FileNotFoundError: a subspace file does not exist, or there is no adapter below a folder of them.
        ValueError: a file cannot be read, the files are of different base models or modules, or an adapter that a
            subspace was mined from is not found.
    """
    config = outputs.check(config)
    return _analyze(config) if config.compare is None else _compare(config, config.compare)


def _analyze(config: AnalyzeConfig) -> Path:
    from subspace3d.formats.analysis import VERSION
    from subspace3d.formats.subspace import find_subspaces, load_subspace
    from subspace3d.mining.analyze import analyze, describe
    from subspace3d.mining.cross_validation import cross_validate, find_mined_adapters
    from subspace3d.reporting import analysis_figures

    path = config.out / "analysis.json"
    found = find_subspaces(config.subspaces)
    inputs = {attribute: files.sha256(file) for attribute, file in found.items()}
    if _is_done(path, inputs, VERSION, "cross_validation" if config.adapters else None):
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
    logger.info(f"next: subspace3d report {shlex.quote(str(config.out.parent))}")
    return path


def _compare(config: AnalyzeConfig, pair: tuple[Path, Path]) -> Path:
    from subspace3d.formats.comparison import VERSION
    from subspace3d.formats.subspace import load_subspace
    from subspace3d.mining.compare import CHECKPOINTS, compare
    from subspace3d.reporting.comparison import attribute_table, block_table, draw_comparison

    path = config.out / "comparison.json"
    found = dict(zip(CHECKPOINTS, _paired(pair)))
    inputs = {name: {a: files.sha256(file) for a, file in files_of.items()} for name, files_of in found.items()}
    if _is_done(path, inputs, VERSION, "with_adapters" if config.adapters else None):
        logger.info(f"{path}: already made from the same subspace files")
        return path
    subspaces = {name: {a: load_subspace(file) for a, file in files_of.items()} for name, files_of in found.items()}
    held_out = {name: _held_out(files_of, config.adapters) for name, files_of in subspaces.items()}
    result = {
        **compare(subspaces["A"], subspaces["B"], held_out),
        "inputs": inputs,
        "with_adapters": bool(config.adapters) or None,
    }
    outputs.mark(config.out, outputs.ANALYSIS)
    draw_comparison(result, config.out / "comparison.png")
    table = attribute_table(result)
    text = [result["sentence"], "", *table, "", *block_table(result)]
    files.write_text(config.out / "comparison.md", "\n".join(text).strip() + "\n")
    files.write_json(path, result)
    for line in table:
        logger.info(line)
    for name in CHECKPOINTS:
        _say_left_out(name, result["left_out"], bool(result["modules"]))
    if inputs["A"] == inputs["B"]:
        logger.info("A and B are the same files, so they agree wherever anything was trained")
    if not result["same_mining"]:
        logger.info(
            "the files were not mined alike (shared.*: adapters, rank, k, model, source): shares and ranks differ"
        )
    logger.info(result["sentence"])
    logger.info(f"comparison -> {path}")
    logger.info(f"next: subspace3d report {shlex.quote(str(config.out.parent))}")
    return path


def _paired(pair: tuple[Path, Path]) -> list[dict[str, Path]]:
    """The files of either checkpoint by attribute; two single files are a pair whatever they are called."""
    from subspace3d.formats.subspace import find_subspaces

    one, two = (find_subspaces([path]) for path in pair)
    if all(path.is_file() for path in pair):
        two = dict(zip(one, two.values()))
    return [one, two]


def _held_out(subspaces: Mapping[str, SubspaceFile], roots: tuple[Path, ...]) -> dict[str, float | None]:
    """Attribute -> share of an adapter that was left out in what the others share, mean over adapters and modules.

    Modules count alike whatever their energy, as they do in the shares of subspace files beside which it stands.
    """
    from subspace3d.mining.cross_validation import cross_validate, find_mined_adapters, mean_of_known

    if not roots:
        return {}
    explained = cross_validate(subspaces, list(subspaces), find_mined_adapters(subspaces, roots))["explained"]
    return {
        attribute: mean_of_known((rows["held_out"] or {}).get("modules", {}).values())
        for attribute, rows in explained.items()
    }


def _say_left_out(name: str, left_out: Mapping[str, Any], are_compared: bool) -> None:
    attributes, modules = left_out["attributes"][name], left_out["modules"][name]
    if attributes:
        logger.info(f"{name} alone has the attributes {', '.join(attributes)}, which are left out")
    if modules and are_compared:
        logger.info(f"{len(modules)} modules of {name} have no partner of their name and size, such as {modules[0]}")


def _is_done(path: Path, inputs: Mapping[str, Any], version: int, part: str | None) -> bool:
    """Whether ``path`` was made from these files, with the ``part`` that only adapters give."""
    if not path.is_file():
        return False
    try:
        record = files.read_record(path)
    except ValueError as error:
        logger.info(f"analyzing anew: {error}")
        return False
    same = record.get("version") == version and record.get("inputs") == inputs
    return same and (part is None or record.get(part) is not None)
