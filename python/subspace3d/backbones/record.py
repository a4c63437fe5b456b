"""Loading the backbone a run starts from, and a record by which the same weights are found again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from subspace3d.backbones import model_card
from subspace3d.backbones.find import find_backbone
from subspace3d.files import load_metadata, sha256
from subspace3d.log import logger

_LONGEST = 200

RANDOM = "random"
HUB = "hub"
"""The published weights, downloaded when asked for by this name and never otherwise."""
SHIPPED = "shipped"
UNKNOWN = "unknown"


@dataclass(frozen=True)
class BackboneRecord:
    """Which weights a backbone had.

    Attributes:
        name: a preset, or ``package.module:factory``.
        weights: path of the file, ``shipped`` (with the package) or ``random``.
        sha256: hash of the file; of random weights: empty.
        seed: from which random weights were drawn.
        licence: of the weights, as they or the caller call it; `UNKNOWN` where nobody says it.
    """

    name: str
    weights: str
    sha256: str
    seed: int = 0
    licence: str = ""

    @property
    def identity(self) -> str:
        """Short name that differs for different weights; adapters carry it as their base model."""
        if self.weights == SHIPPED:
            return self.name
        return f"{self.name}@{self.sha256[:12] or f'random-{self.seed}'}"

    def flags(self) -> str:
        """What a command is told to use the same weights, after a space; nothing where it uses them anyway."""
        if self.name == "vggt-nano" and self.weights == SHIPPED:
            return ""
        weights = "" if self.weights == SHIPPED else f" --weights {shlex.quote(self.weights)}"
        return f" --backbone {shlex.quote(self.name)}{weights}"

    def to_dict(self) -> dict:
        return asdict(self)


def record_backbone(
    name: str, weights: Path | None, seed: int = 0, licence: str = "", licences: Mapping[str, str] | None = None
) -> BackboneRecord:
    """The record of a file of weights, of those shipped (None), of `RANDOM` ones or those on the `HUB`.

    A run's record names the file by its absolute path, which may lie anywhere: it is opened only to be hashed, and
    used only with the hash recorded. Its licence is the one given, or that of ``licences``, hash -> licence, or the one
    that the header of the file or a model card beside it names, or that of the weights published for the backbone; a
    warning asks for one that nobody knows. Who writes none down gives `UNKNOWN`.

    Raises:
        FileNotFoundError: the weights are not there.
        ValueError: they are no regular file, or there are none of this name on the hub.
    """
    if str(weights) == RANDOM:
        return BackboneRecord(name, RANDOM, "", seed, licence or "none: random weights")
    backbone = find_backbone(name)
    if weights is None:
        # the builder knows which backbones ship with the package and says so
        file = backbone.shipped
        source, digest = SHIPPED, sha256(file) if file is not None and file.is_file() else ""
    else:
        if str(weights) == HUB:
            weights = backbone.download()
        if not weights.exists():
            raise FileNotFoundError(f"weights: no such file: {weights}; {RANDOM} and {HUB} are taken too")
        source, digest = str(weights.resolve()), sha256(weights)
    read = read_licence(weights) if weights is not None else None
    licence = licence or (licences or {}).get(digest) or read or backbone.licence or ""
    if not licence:
        of = weights or f"the weights of {name}"
        logger.warning(f"the licence of {of} is not known; --licence names it, and it is written beside results")
    return BackboneRecord(name, source, digest, licence=licence or UNKNOWN)


def read_licence(weights: Path) -> str | None:
    """The licence that the header of a safetensors file names, or the model card (README.md) beside it; None: neither.

    A card names it as the Hub does, ``license: NAME`` or ``license_name: NAME`` between two lines of three dashes.
    """
    if weights.suffix == ".safetensors":
        metadata = load_metadata(weights)
        named = metadata.get("license") or metadata.get("licence")
        if named:
            return named[:_LONGEST]
    return model_card.licence_of_card(weights.resolve().with_name(model_card.NAME))


def load_backbone(record: BackboneRecord) -> nn.Module:
    """Build the backbone a record names.

    Raises:
        FileNotFoundError: its weights are not there any more.
        ValueError: they are other weights than those recorded.
    """
    if record.weights == RANDOM:
        torch.manual_seed(record.seed)
        return find_backbone(record.name).build(RANDOM)
    path = None if record.weights == SHIPPED else Path(record.weights)
    now = record_backbone(record.name, path, licence=record.licence or UNKNOWN)
    if now.sha256 != record.sha256:
        raise ValueError(
            f"weights of {record.name} ({record.weights}) must have sha256 {record.sha256[:12]}..., "
            f"as when this was made, got {now.sha256[:12]}..."
        )
    return find_backbone(record.name).build(path)
