"""Hypothesis strategies that turn a valid file into a hostile one."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

HOSTILE_TEXT = (
    "", "..", "../../../../etc/passwd", "/etc/passwd", "/dev/zero", "a\0b", "x" * 5000, "\ud800",
    "<script>alert(1)</script>", "' onerror='x", "$\\frac{", "(a+)+$", "(?P<", "nan", "1e999",
    "images/../../outside.png",
)  # fmt: skip
HOSTILE_NUMBERS = (
    0, -1, 1, 2**31, 2**63, -(2**63), 10**400, 0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), float("-inf"),
)  # fmt: skip

leaves = st.one_of(
    st.none(), st.booleans(), st.sampled_from(HOSTILE_NUMBERS), st.sampled_from(HOSTILE_TEXT), st.text(max_size=8)
)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def damaged_bytes(draw: Any, content: bytes) -> bytes:
    """One to four of: a bit flipped, bytes overwritten, cut out, put in or repeated, the rest cut off."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.sampled_from(("flip", "overwrite", "cut", "insert", "repeat", "truncate")))
        if kind == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "overwrite":
            patch = draw(st.binary(min_size=1, max_size=8))
            data[at : at + len(patch)] = patch
        elif kind == "cut":
            del data[at : at + draw(st.integers(1, 64))]
        elif kind == "insert":
            data[at:at] = draw(st.sampled_from((b"\xff" * 8, b"\x00" * 8, b"9" * 12, b"[" * 2000, b'{"a":'))) or b""
        elif kind == "repeat":
            data[at:at] = data[at : at + draw(st.integers(1, 64))]
        else:
            del data[at:]
    return bytes(data)


@st.composite
def damaged_record(draw: Any, record: Any) -> bytes:
    """JSON in which one to three entries, wherever they are, became something else or went."""
    record = copy.deepcopy(record)
    for _ in range(draw(st.integers(1, 3))):
        parent, key, node = None, None, record
        while isinstance(node, (dict, list)) and node and (parent is None or draw(st.integers(0, 3))):
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            parent, key = node, draw(st.sampled_from(keys))
            node = parent[key]
        if parent is None:
            record = draw(values)
        elif draw(st.integers(0, 4)) == 0:
            del parent[key]
        else:
            parent[key] = draw(values)
    return json.dumps(record).encode()
