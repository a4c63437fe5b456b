"""The record of the command fit: fit.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from subspace3d.files import read_record
from subspace3d.schema import check

FORMAT = "subspace3d-fit"
VERSION = 1


class _Suggested(TypedDict):
    K: int
    k: int | None
    attributes: list[str] | None


class _Module(TypedDict):
    norm: float
    K: int
    shares: dict[str, dict[str, float | None]]


class FitRecord(TypedDict):
    inputs: dict[str, Any]
    sentence: str
    teacher: NotRequired[Literal["depth", "views", "both"]]  # none: depth
    verdict: Literal["fits", "weak", "chance"]
    K: int
    shares: dict[str, dict[str, float | None]]
    by_K: dict[str, list[float | None]]
    modules: dict[str, _Module]
    suggested: _Suggested


def read_fit(path: Path) -> dict[str, Any] | None:
    """What `commands.fit` wrote; None where there is nothing of this version.

    Raises:
        ValueError: it is no JSON object, or not whole; names the file and the entry.
    """
    if not path.is_file():
        return None
    record = read_record(path)
    if record.get("format") != FORMAT or record.get("version") != VERSION:
        return None
    check(record, FitRecord, path)
    return record
