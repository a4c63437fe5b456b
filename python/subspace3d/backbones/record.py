"""Loading the backbone a run starts from, and a record by which the same weights are found again."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from subspace3d.backbones.protocol import find_backbone
from subspace3d.files import sha256

RANDOM = "random"
HUB = "hub"
"""The published weights, downloaded when asked for by this name and never otherwise."""
SHIPPED = "shipped"


@dataclass(frozen=True)
class BackboneRecord:
    """Which weights a backbone had.

    Attributes:
        name: a preset, or ``package.module:factory``.
        weights: path of the file, ``shipped`` (with the package) or ``random``.
        sha256: hash of the file; of random weights: empty.
        seed: from which random weights were drawn.
    """

    name: str
    weights: str
    sha256: str
    seed: int = 0

    @property
    def identity(self) -> str:
        """Short name that differs for different weights; adapters carry it as their base model."""
        if self.weights == SHIPPED:
            return self.name
        return f"{self.name}@{self.sha256[:12] or f'random-{self.seed}'}"

    def to_dict(self) -> dict:
        return asdict(self)


def record_backbone(name: str, weights: Path | None, seed: int = 0) -> BackboneRecord:
    """The record of a file of weights, of those shipped (None), of `RANDOM` ones or those on the `HUB`.

    A run's record names the file by its absolute path, which may lie anywhere: it is opened only to be hashed, and
    used only with the hash recorded.

    Raises:
        FileNotFoundError: the weights are not there.
        ValueError: they are no regular file, or there are none of this name on the hub.
    """
    if str(weights) == RANDOM:
        return BackboneRecord(name, RANDOM, "", seed)
    backbone = find_backbone(name)
    if weights is None:
        # the builder knows which backbones ship with the package and says so
        file = backbone.shipped
        return BackboneRecord(name, SHIPPED, sha256(file) if file is not None and file.is_file() else "")
    if str(weights) == HUB:
        weights = backbone.download()
    if not weights.exists():
        raise FileNotFoundError(f"weights: no such file: {weights}; {RANDOM} and {HUB} are taken too")
    return BackboneRecord(name, str(weights.resolve()), sha256(weights))


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
    now = record_backbone(record.name, path)
    if now.sha256 != record.sha256:
        raise ValueError(
            f"weights of {record.name} ({record.weights}) must have sha256 {record.sha256[:12]}..., "
            f"as when this was made, got {now.sha256[:12]}..."
        )
    return find_backbone(record.name).build(path)
