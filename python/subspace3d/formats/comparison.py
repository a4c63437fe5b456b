"""Layout of comparison.json; docs/formats.md has every field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from subspace3d.schema import Count, check

FORMAT = "subspace3d-comparison"
VERSION = 2

_Value = float | None


class _Names(TypedDict):
    A: str | None
    B: str | None


class _Level(TypedDict):
    overlap: _Value
    random: _Value
    others: _Value
    agree: Count
    measured: Count


class _Block(_Level):
    family: str
    layer: int | None


class _Row(TypedDict):
    overlap: _Value
    random: str | None


class _Side(_Level):
    blocks: list[_Block]
    modules: dict[str, _Row]


class _Sides(TypedDict):
    output: _Side
    input: _Side


class _Random(TypedDict):
    mean: float
    threshold: float


class _Module(TypedDict):
    family: str
    layer: int | None


class _Ranks(TypedDict):
    median: _Value


class _Spectrum(TypedDict):
    stable_rank: _Ranks


class _Shared(TypedDict):
    explained: _Value
    held_out: _Value


class _SpectrumOfEither(TypedDict):
    A: dict[str, _Spectrum]
    B: dict[str, _Spectrum]


class _SharedOfEither(TypedDict):
    A: dict[str, _Shared]
    B: dict[str, _Shared]


class ComparisonRecord(TypedDict):
    """What is drawn of comparison.json; ``agreement`` holds the attributes and, as ``random``, the sizes."""

    base_models: _Names
    attributes: list[str]
    modules: dict[str, _Module]
    agreement: dict[str, Any] | None
    spectra: _SpectrumOfEither
    shared: _SharedOfEither
    same_mining: bool
    sentence: str


def check_together(record: Any, path: Path) -> None:
    """What the types of the fields alone do not say.

    Raises:
        ValueError: an attribute, a module or a size that is named has no entry; names the file.
    """
    attributes = record["attributes"]
    if not attributes:
        raise ValueError(f"{path}: attributes must not be empty")
    for table in ("spectra", "shared"):
        for name in ("A", "B"):
            absent = [attribute for attribute in attributes if attribute not in record[table][name]]
            if absent:
                raise ValueError(f"{path}: {table}.{name} must have {absent[0]!r}")
    if record["agreement"] is None:
        return
    sizes = check(record["agreement"].get("random"), dict[str, _Random], f"{path}: agreement.random")
    for attribute in attributes:
        where = f"{path}: agreement.{attribute}"
        sides = check(record["agreement"].get(attribute), _Sides, where)
        for level in (sides["output"], sides["input"]):
            for name, row in level["modules"].items():
                if name not in record["modules"] or (row["random"] is not None and row["random"] not in sizes):
                    raise ValueError(f"{where}: {name} must be one of modules and its random one of the sizes")
