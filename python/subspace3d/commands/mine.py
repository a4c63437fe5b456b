"""A folder of LoRA adapters of one attribute -> one subspace file."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from subspace3d import files, outputs, records
from subspace3d.log import logger
from subspace3d.settings import require

if TYPE_CHECKING:
    from subspace3d.formats.adapter import Adapter


@dataclass(frozen=True)
class MineConfig:
    """Mine the subspace that all PEFT adapters below ADAPTERS share, module by module."""

    adapters: Path
    """Every PEFT adapter folder below it is one adapter."""
    out: Path
    """Subspace file (.safetensors)."""
    k: int | Literal["auto"] = 16
    """Rank of the shared subspace; auto: by module, as many directions as stand above those of unrelated adapters."""
    model: Literal["mean", "shared", "auto"] = "mean"
    """What adapters share. mean: one mean update, as in the paper. shared: one subspace, each adapter with its own
    core. auto: the one by which an adapter that is left out lies more in what the others share."""
    join: Path | None = None
    """Gradient adapters (adapt --gradient-only) of the same attribute, joined: output directions of both, input
    directions of the gradients."""
    p: float = 1.0
    """Exponent of the residual norm, 0 < p <= 2; 2 is the plain mean."""
    eps: float = 1e-3
    """Smoothing, relative to the median norm of the updates."""
    max_iter: int = 50
    """Most IRLS iterations."""
    tol: float = 1e-6
    """Stop when no weight moves by more than this, relative."""
    base_model: str = ""
    """Name of the base model where the adapters call it by several; empty: they must agree."""

    def __post_init__(self) -> None:
        whole = isinstance(self.k, int) and self.k >= 1
        require(self.k == "auto" or whole, "k", "an integer of at least 1, or auto", self.k)
        require(0 < self.p <= 2, "p", "in (0, 2]", self.p)
        require(self.eps > 0, "eps", "positive", self.eps)
        require(self.max_iter >= 1, "max_iter", "at least 1", self.max_iter)
        require(self.tol >= 0, "tol", "at least 0", self.tol)

    def lock(self) -> tuple[Path, str]:
        """The file alone."""
        return self.out.parent, self.out.name

    def reads(self) -> list[tuple[str, Path]]:
        return outputs.named(adapters=self.adapters, join=self.join)

    def writes(self) -> list[outputs.Output]:
        return [outputs.Output("out", self.out, outputs.SUBSPACE)]


def run(config: MineConfig) -> Path:
    """Mine the adapters below ``config.adapters`` (`mining.mine.mine_adapters`) and write ``config.out``.

    Nothing is computed when ``config.out`` was made from the same adapters with the same settings.

    Returns:
        ``config.out``.

    Raises:
        FileNotFoundError: there is no adapter below ``config.adapters``.
        ValueError: ``config.out`` does not end in .safetensors, an adapter that cannot be read, adapters of different
            base models or modules, or ``k`` larger than the sum of the adapters' ranks in every module.
    """
    from subspace3d.formats.adapter import read_adapter
    from subspace3d.formats.adapter_folders import search_adapters
    from subspace3d.formats.run import licence_of_adapter
    from subspace3d.formats.subspace import SubspaceFile, save_subspace
    from subspace3d.mining.join import join
    from subspace3d.mining.mine import IrlsSettings, check_same_modules, mine_adapters, summary

    config = outputs.check(config)
    # in a folder of subspaces a file of any other name would be overlooked
    require(config.out.suffix == ".safetensors", "out", "a name that ends in .safetensors", str(config.out))
    found = search_adapters(config.adapters)
    beside = search_adapters(config.join) if config.join else None
    joined = beside.folders if beside else []
    taken = found.summary() + (f"; joined: {beside.summary()}" if beside else "")
    inputs = _inputs(config, found.folders, joined)
    if _is_done(config.out, inputs):
        logger.info(f"{config.out}: already mined with the same settings; {taken}")
        return config.out
    adapters = [read_adapter(folder) for folder in found.folders]
    _report_ignored(adapters)
    settings = IrlsSettings(config.p, config.eps, config.max_iter, config.tol)
    mined = mine_adapters(adapters, config.k, settings, f"mine {config.out.stem}", config.model, config.base_model)
    modules, details = mined.modules, mined.details
    notes = {config.out.stem if beside is None else f"{config.out.stem}, adapters": mined.notes}
    chosen: dict[str, Any] = {"model": mined.model, "source": _source(adapters)}
    if mined.held_out:
        chosen["held_out"] = asdict(mined.held_out)
    if joined:
        gradients = [read_adapter(folder) for folder in joined]
        if _source(gradients) != "gradient":
            raise ValueError(f"join must hold gradient adapters (adapt --gradient-only), got others in {config.join}")
        _report_ignored(gradients)
        check_same_modules([adapters[0], *gradients], config.base_model)
        label = f"{config.out.stem}, gradients"
        own = mine_adapters(gradients, config.k, settings, f"mine {label}", mined.model, config.base_model)
        modules, details = join(modules, own.modules), own.details
        notes[label] = own.notes
    licences = sorted({text for folder in (*found.folders, *joined) if (text := licence_of_adapter(folder))})
    header = {"base_model": adapters[0].base_model, "licence": licences, **inputs, **chosen, "modules": details}
    save_subspace(config.out, modules, header)
    for source, sentences in notes.items():
        for note in sentences:
            logger.info(f"{source}: {note}")
    logger.info(f"{summary(SubspaceFile(modules, header))} -> {config.out}")
    logger.info(taken)
    named = _flags(header["base_model"])
    out = shlex.quote(str(config.out))
    first = f"fit --subspaces {out} --scenes YOUR_SCENES --out FIT{named}"
    then = f"finetune --subspaces {out} --scenes YOUR_SCENES --out RUN{named}"
    logger.info(f"next: subspace3d {first}, or subspace3d {then}")
    return config.out


def _inputs(config: MineConfig, folders: Sequence[Path], joined: Sequence[Path]) -> dict[str, Any]:
    """Everything the result depends on, as it stands in the header."""
    settings = {name: getattr(config, name) for name in ("k", "p", "eps", "max_iter", "tol")}
    inputs = {"adapters": _hashes(config.adapters, folders), "asked_model": config.model, **settings}
    if config.base_model:
        inputs["base_model"] = config.base_model
    # with gradients joined, spectra, weights and energies are theirs
    return inputs if config.join is None else {**inputs, "join": _hashes(config.join, joined)}


def _hashes(root: Path, folders: Sequence[Path]) -> list[dict[str, str]]:
    from subspace3d.formats.adapter import CONFIG_NAME, WEIGHTS_NAME

    return [
        {
            "path": folder.relative_to(root).as_posix(),
            "sha256": files.sha256(folder / WEIGHTS_NAME),
            "config_sha256": files.sha256(folder / CONFIG_NAME),
        }
        for folder in folders
    ]


def _source(adapters: Sequence[Adapter]) -> str:
    """tuned, gradient, or mixed."""
    sources = {adapter.source for adapter in adapters}
    return sources.pop() if len(sources) == 1 else "mixed"


def _is_done(path: Path, inputs: dict[str, Any]) -> bool:
    from subspace3d.formats.subspace import load_subspace

    if not Path(path).exists():
        return False
    try:
        header = load_subspace(path).header
    except ValueError as error:
        logger.info(f"mining anew: {error}")
        return False
    # files of before there was a choice do not name it; a file without join is no result with it, nor the reverse
    before = {"asked_model": "mean", **header}
    return not records.differing(before, inputs) and ("join" in header) == ("join" in inputs)


def _report_ignored(adapters: Sequence[Adapter]) -> None:
    for prefix in dict.fromkeys(prefix for adapter in adapters for prefix in adapter.unwrapped):
        count = sum(prefix in adapter.unwrapped for adapter in adapters)
        logger.info(f"  the wrapper's prefix {prefix!r} was taken off the names of {count} adapters' modules")
    ignored = sorted({key for adapter in adapters for key in adapter.ignored})
    if ignored:
        more = f" and {len(ignored) - 1} more" if ignored[1:] else ""
        logger.info(f"  not part of any LoRA update and left out: {ignored[0]}{more}")


def _flags(base_model: str | None) -> str:
    """What a command is told to use the backbone of these adapters, after a space."""
    from subspace3d.backbones.presets import PRESETS

    name, _, weights = (base_model or "").partition("@")
    if name in ("", "vggt-nano") and not weights:
        return ""
    # adapters of other software may call it by a name of the hub or a path, which is no backbone here
    known = name in PRESETS or ":" in name
    return f" --backbone {name if known else 'ITS_NAME'}" + (" --weights THE_SAME" if weights or not known else "")
