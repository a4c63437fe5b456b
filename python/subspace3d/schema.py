"""Checks what was read from JSON against a type: the one way in which records and headers are checked before use.

A schema is a type: ``int``, ``float``, ``str``, ``bool``, ``None``, ``list[T]``, ``dict[str, T]``, ``Literal[...]``,
unions, ``Any``, a ``TypedDict``, and any of them as ``Annotated[T, Rule(...)]``. Keys that a TypedDict does not name
are left as they are.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NotRequired, TypeVar, Union, get_args, get_origin

from typing_extensions import get_type_hints, is_typeddict

T = TypeVar("T")
_PLAIN = {
    int: "an integer", float: "a number", str: "text", bool: "true or false", type(None): "null",
}  # fmt: skip


@dataclass(frozen=True)
class Rule:
    """A further condition; ``says`` completes the sentence "NAME must be ..."."""

    says: str
    holds: Callable[[Any], bool]


POSITIVE = Rule("a positive number", lambda value: value > 0)
NOT_NEGATIVE = Rule("at least 0", lambda value: value >= 0)
NOT_EMPTY = Rule("not empty", lambda value: len(value) > 0)
Positive = Annotated[float, POSITIVE]
PositiveInt = Annotated[int, Rule("a positive integer", lambda value: value > 0)]
Count = Annotated[int, NOT_NEGATIVE]


class _MismatchError(Exception):
    def __init__(self, name: str, rule: str, value: object) -> None:
        super().__init__(name)
        self.name, self.rule, self.value = name, rule, value


def require(condition: bool, name: str, rule: str, value: object) -> None:
    """Raise ValueError with argument, rule and value unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"{name} must be {rule}, got {value!r}")


def check(value: Any, schema: type[T], what: object) -> T:
    """``value`` itself, which is a ``schema``.

    Args:
        value: what `json.loads` gave.
        schema (type): see the module's docstring; a ``float`` may be written as an integer and must be finite.
        what: the file, for messages.

    Raises:
        ValueError: it is not; names the file, the entry, the rule and the value.
    """
    try:
        _check(value, schema, "")
    except _MismatchError as found:
        got = _shown(found.value)
        name = f"{what}: {found.name.lstrip('.')}" if found.name else str(what)
        raise ValueError(f"{name} must be {found.rule}, got {got}") from None
    except RecursionError:
        raise ValueError(f"{what} is nested too deeply") from None
    return value


def _check(value: Any, schema: Any, name: str) -> None:
    if schema is Any:
        return
    origin, arguments = get_origin(schema), get_args(schema)
    if origin is Annotated:
        rules = [item for item in arguments[1:] if isinstance(item, Rule)]
        try:
            _check(value, arguments[0], name)
        except _MismatchError as found:
            if found.name == name and rules:
                raise _MismatchError(name, rules[0].says, value) from None
            raise
        for rule in rules:
            if not rule.holds(value):
                raise _MismatchError(name, rule.says, value)
    elif origin is NotRequired:
        _check(value, arguments[0], name)
    elif origin is Literal:
        if not any(type(value) is type(item) and value == item for item in arguments):
            raise _MismatchError(name, " or ".join(repr(item) for item in arguments), value)
    elif origin in (Union, types.UnionType):
        _check_union(value, arguments, name)
    elif is_typeddict(schema):
        _check_table(value, schema, name)
    elif origin is list:
        if not isinstance(value, list):
            raise _MismatchError(name, "a list", value)
        for index, item in enumerate(value):
            _check(item, arguments[0], f"{name}[{index}]")
    elif schema is dict or origin is dict:
        if not isinstance(value, dict):
            raise _MismatchError(name, "an object", value)
        for key, item in value.items() if arguments else ():
            _check(item, arguments[1], f"{name}.{key:.80}")
    else:
        _check_plain(value, schema, name)


def _check_plain(value: Any, schema: Any, name: str) -> None:
    if schema is float:
        fits = isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value)
    elif schema in _PLAIN:
        fits = type(value) is schema
    else:
        raise TypeError(f"no schema: {schema!r}")
    if not fits:
        raise _MismatchError(name, _PLAIN[schema], value)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def _check_union(value: Any, choices: tuple[Any, ...], name: str) -> None:
    """The message is that of the choice whose mismatch lies deepest."""
    deepest: _MismatchError | None = None
    for choice in choices:
        try:
            _check(value, choice, name)
        except _MismatchError as found:
            if deepest is None or len(found.name) > len(deepest.name):
                deepest = found
        else:
            return
    assert deepest is not None
    if deepest.name == name:
        rules = dict.fromkeys(_describe(choice) for choice in choices)
        raise _MismatchError(name, " or ".join(rules), value)
    raise deepest


def _describe(schema: Any) -> str:
    if get_origin(schema) is Annotated:
        return next((item.says for item in get_args(schema)[1:] if isinstance(item, Rule)), "")
    if get_origin(schema) is Literal:
        return " or ".join(repr(item) for item in get_args(schema))
    if get_origin(schema) is list:
        return "a list"
    return _PLAIN.get(schema, "an object")


def _check_table(value: Any, schema: Any, name: str) -> None:
    if not isinstance(value, dict):
        raise _MismatchError(name, "an object", value)
    entries = _entries(schema)
    missing = next(
        (key for key, item in entries.items() if get_origin(item) is not NotRequired and key not in value), ""
    )
    if missing:
        raise _MismatchError(name, f"an object with {missing!r}", value)
    for key, item in entries.items():
        if key in value:
            _check(value[key], item, f"{name}.{key}")


@functools.cache
def _entries(schema: Any) -> dict[str, Any]:
    # __required_keys__ does not know what stands in annotations that are text
    return get_type_hints(schema, include_extras=True)


def _shown(value: object) -> str:
    """At most 80 characters, at no more cost."""
    if isinstance(value, dict):
        return f"an object of {len(value)} entries"
    if isinstance(value, list):
        return f"a list of {len(value)} entries"
    if isinstance(value, int) and abs(value) > 1 << 200:
        return "an integer of more than 60 digits"
    return repr(value[:80] if isinstance(value, str) else value)
