"""The pickled members that numpy writes into npz files: a value or a dict of arrays and plain values, rebuilt here."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from subspace3d.plain_pickle import Call, Name, parse

_CORES = ("numpy.core", "numpy._core")
_RECONSTRUCT = {f"{core}.multiarray._reconstruct" for core in _CORES}
_SCALAR = {f"{core}.multiarray.scalar" for core in _CORES}
_FROM_BUFFER = {f"{core}.numeric._frombuffer" for core in _CORES}
_NAMES = frozenset({*_RECONSTRUCT, *_SCALAR, *_FROM_BUFFER, "numpy.ndarray", "numpy.dtype", "collections.OrderedDict"})
_PLAIN_DTYPE = re.compile(r"[biufc](1|2|4|8|16)|[US][1-9]\d{0,6}")
_OBJECT = "O8"
_LARGEST = 1 << 28  # bytes of all arrays together


def read_object(data: bytes) -> Any:
    """The one object in a pickled array without axes, as ``np.savez(file, name={...})`` writes it.

    Args:
        data (bytes): what follows the header of the member.

    Returns:
        numbers, text, bytes, None, lists and dicts of them, numpy arrays and scalars of plain types.

    Raises:
        ValueError: it is malformed or holds anything else; the message names what.
    """
    array = parse(data, _NAMES)
    if not (isinstance(array, Call) and array.name in _RECONSTRUCT):
        raise ValueError("it holds no numpy array")
    _, shape, dtype, _, items = _array_state(array)
    if _code(dtype)[0] != _OBJECT or shape != () or not isinstance(items, list) or len(items) != 1:
        raise ValueError("it must hold one object, without axes")
    return _Builder().plain(items[0])


class _Builder:
    """Makes the arrays; one that is used in several places is made once, so that all of them fit in `_LARGEST`."""

    def __init__(self) -> None:
        self._made: dict[int, Any] = {}
        self._left = _LARGEST

    def plain(self, value: Any) -> Any:
        """``value`` with arrays in place of the calls that make them; `parse` has bounded its depth."""
        if isinstance(value, Call):
            if id(value) not in self._made:
                self._made[id(value)] = self._call(value)
            return self._made[id(value)]
        if isinstance(value, dict):
            return {key: self.plain(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.plain(item) for item in value]
        if value is None or isinstance(value, bool | int | float | str | bytes):
            return value
        if isinstance(value, tuple) and all(isinstance(item, bool | int | float | str) for item in value):
            return value
        raise ValueError(f"it holds a {value.name if isinstance(value, Name) else type(value).__name__}")

    def _call(self, call: Call) -> Any:
        if call.name in _RECONSTRUCT:
            _, shape, dtype, fortran, content = _array_state(call)
            return self._array(content, dtype, shape, "F" if fortran else "C")
        if call.name in _FROM_BUFFER and len(call.arguments) == 4 and not call.has_state:
            content, dtype, shape, order = call.arguments
            return self._array(content, dtype, shape, order)
        if call.name in _SCALAR and len(call.arguments) == 2 and not call.has_state:
            return self._array(call.arguments[1], call.arguments[0], (), "C")[()]
        raise ValueError(f"it holds a {call.name}, which is no array")

    def _array(self, content: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
        code, byte_order = _code(dtype)
        if not _PLAIN_DTYPE.fullmatch(code):
            raise ValueError(f"it holds an array of type {code!r}, only plain numbers and text are read")
        try:
            kind = np.dtype(code).newbyteorder(byte_order)  # type: ignore[arg-type]
        except TypeError as error:  # such as b4
            raise ValueError(f"it holds an array of type {code!r}: {error}") from error
        if (
            not isinstance(shape, tuple)
            or not all(type(side) is int and side >= 0 for side in shape)
            or len(shape) > 32
        ):
            raise ValueError("it holds an array with a shape that is none")
        if (
            not isinstance(content, bytes)
            or math.prod(shape) * kind.itemsize != len(content)
            or order not in ("C", "F")
        ):
            raise ValueError(f"it holds an array {list(shape)} of {kind} whose content does not fit")
        self._left -= len(content)
        if self._left < 0:
            raise ValueError(f"its arrays have more than {_LARGEST} bytes")
        # a copy: what is read from bytes cannot be written to
        return np.frombuffer(content, kind).reshape(shape, order=order).copy()


def _array_state(call: Call) -> tuple[Any, Any, Any, Any, Any]:
    state = call.state
    if not isinstance(state, tuple) or len(state) != 5:
        raise ValueError("it holds an array without its content")
    return state


def _code(dtype: Any) -> tuple[str, str]:
    """Type code and byte order of a pickled dtype."""
    if not isinstance(dtype, Call) or dtype.name != "numpy.dtype" or not dtype.arguments:
        raise ValueError("it holds an array without a type")
    code, state = dtype.arguments[0], dtype.state
    if not isinstance(code, str):
        raise ValueError("it holds an array without a type")
    order = state[1] if isinstance(state, tuple) and len(state) > 1 else "="
    if order not in ("<", ">", "|", "="):
        raise ValueError("it holds an array without a byte order")
    return code, order
