"""The record of the command fit: fit.json."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from typing_extensions import TypedDict

from subspace3d.files import read_record
from subspace3d.schema import NOT_EMPTY, PositiveInt, Rule, check

FORMAT = "subspace3d-fit"
VERSION = 1


# of one half of the batches measured on the other a share may be below 0; what is drawn must stay finite
_Share = Annotated[float, Rule("a share of the energy", lambda value: abs(value) <= 1e3)] | None
_Norm = Annotated[float, Rule("a norm of at most 1e100", lambda value: 0 <= value <= 1e100)]


class _Sides(TypedDict):
    core: _Share
    U: _Share
    V: _Share


class _Shares(TypedDict):
    basis: _Sides
    psv: _Sides
    random: _Sides
    gradient: _Sides


class _ByK(TypedDict):
    basis: list[_Share]
    psv: list[_Share]
    random: list[_Share]
    gradient: list[_Share]


class _Suggested(TypedDict):
    K: int
    k: int | None
    attributes: list[str] | None


class _Module(TypedDict):
    norm: _Norm
    K: PositiveInt
    shares: _Shares


class FitRecord(TypedDict):
    inputs: dict[str, Any]
    sentence: str
    teacher: NotRequired[Literal["depth", "views", "both"]]  # none: depth
    verdict: Literal["fits", "weak", "chance"]
    K: PositiveInt
    shares: _Shares
    by_K: _ByK
    modules: Annotated[dict[str, _Module], NOT_EMPTY]
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
