"""Records are checked against types; a mismatch is named by entry, rule and value."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

import pytest
from typing_extensions import TypedDict

from subspace3d.schema import Positive, PositiveInt, Rule, check


class _Inner(TypedDict):
    x: Positive
    note: NotRequired[str | None]


class _Record(TypedDict):
    kind: Literal["a", "b"]
    count: PositiveInt
    rows: list[list[float]]
    inner: dict[str, _Inner]
    pair: NotRequired[Annotated[list[int], Rule("two integers", lambda value: len(value) == 2)]]
    either: NotRequired[str | list[str]]
    anything: NotRequired[Any]


VALID: dict[str, Any] = {"kind": "a", "count": 2, "rows": [[1, 2.5], []], "inner": {"m": {"x": 1e-3, "note": None}}}


def test_what_fits_is_given_back_with_keys_that_are_not_named() -> None:
    record = {**VALID, "pair": [1, 2], "either": ["a"], "anything": {"b": []}, "more": object()}
    assert check(record, _Record, "f.json") is record


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "c"}, r"f\.json: kind must be 'a' or 'b', got 'c'"),
        ({"count": True}, "count must be a positive integer, got True"),
        ({"count": 0}, "count must be a positive integer, got 0"),
        ({"count": 2.0}, "count must be a positive integer, got 2.0"),
        ({"rows": [[1], [1, "x"]]}, r"rows\[1\]\[1\] must be a number, got 'x'"),
        ({"rows": [[float("nan")]]}, r"rows\[0\]\[0\] must be a number, got nan"),
        ({"rows": [[10**400]]}, r"rows\[0\]\[0\] must be a number, got an integer of more than 60 digits"),
        ({"inner": {"m": {"x": -1}}}, r"inner\.m\.x must be a positive number, got -1"),
        ({"inner": {"m": {}}}, r"inner\.m must be an object with 'x', got an object of 0 entries"),
        ({"inner": [1]}, "inner must be an object, got a list of 1 entries"),
        ({"pair": [1]}, "pair must be two integers"),
        ({"either": 3}, "either must be text or a list, got 3"),
        ({"either": ["a", 3]}, r"either\[1\] must be text, got 3"),
        ({"kind": "x" * 500}, r"got '" + "x" * 80 + "'$"),
    ],
)
def test_mismatches_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check({**VALID, **change}, _Record, "f.json")


def test_missing_entries_and_other_kinds_are_named() -> None:
    with pytest.raises(ValueError, match=r"f\.json must be an object with 'count', got an object of 1 entries"):
        check({"kind": "a"}, _Record, "f.json")
    with pytest.raises(ValueError, match=r"f\.json must be an object, got \[?'?3"):
        check(3, _Record, "f.json")
