"""Tables in YAML and TOML files, bounded before they are built."""

from __future__ import annotations

import math
import tomllib
from pathlib import Path
from typing import Any

from subspace3d.reading import read_text
from subspace3d.schema import require

_LARGEST_FILE = 1 << 18
_MOST_VALUES = 10_000
_MOST_DOTS, _DEEPEST = 1000, 50


def read_table(path: Path) -> dict[str, Any]:
    """The table in a YAML or TOML file, of at most 10,000 values when all its references are followed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML or TOML, no table, too many values, or merged tables; names the file.
    """
    text = read_text(path, _LARGEST_FILE)
    try:
        table = _parse(text, path.suffix)
    except Exception as error:  # the parsers raise what they happen to run into, RecursionError among it
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(table, dict):
        raise ValueError(f"{path} must hold a table of settings, got {type(table).__name__}")
    return table


def check_plain(table: dict[Any, Any], path: Path) -> None:
    """Raise ValueError unless keys are text and values what JSON has: YAML also makes dates, sets and bytes."""
    for key, value in table.items():
        require(isinstance(key, str), f"{path}: a key", "text", key)
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict):
                check_plain(item, path)
            else:
                # quoted, a date is text
                allowed = isinstance(item, (str, int, float, bool, list, type(None)))
                require(allowed, f"{path}: {key}", "text, a number, true, false or null", item)
                finite = not isinstance(item, float) or math.isfinite(item)
                require(finite, f"{path}: {key}", "a finite number", item)


def _parse(text: str, suffix: str) -> Any:
    if suffix == ".toml":
        # the parser takes quadratic time for a key of many parts
        if max(map(len, (line.split(".") for line in text.splitlines())), default=0) > _MOST_DOTS:
            raise ValueError(f"a line has more than {_MOST_DOTS} dots")
        return tomllib.loads(text)
    import yaml

    _check_yaml(text)
    return yaml.safe_load(text)


def _check_yaml(text: str) -> None:
    """Bound the values that ``text`` stands for before they are built.

    A few lines of references to references can stand for more than memory holds, and merging tables (``<<``) copies
    them, so that is not read.
    """
    import yaml

    sizes: dict[str | None, int] = {}
    open_nodes: list[tuple[str | None, int]] = []  # anchor, and how many values came before
    count = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor is not None:
                sizes[anchor] = count - before
            continue
        if isinstance(event, yaml.AliasEvent):
            count += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.NodeEvent):
            if isinstance(event, yaml.ScalarEvent):
                if event.value == "<<" and event.style is None:
                    raise ValueError("tables are not merged: <<")
                sizes[event.anchor] = 1
            else:
                open_nodes.append((event.anchor, count))
                if len(open_nodes) > _DEEPEST:  # the scanner takes quadratic time for more
                    raise ValueError(f"it is nested more than {_DEEPEST} deep")
            count += 1
        if count > _MOST_VALUES:
            raise ValueError(f"it stands for more than {_MOST_VALUES} values")
