"""Reading settings from YAML or TOML and writing the resolved ones beside a result."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from subspace3d.files import write_text
from subspace3d.reading import read_text

_LARGEST_FILE = 1 << 18
_MOST_VALUES = 10_000
_MOST_DOTS, _DEEPEST = 1000, 50


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain YAML and JSON values: paths become strings, tuples lists."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {_key(field): plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, (tuple, list)):
            return [plain(item) for item in value]
        return value

    return plain(config)


def save(path: Path, config: Any, **provenance: Any) -> None:
    """Write ``config`` as YAML; ``provenance`` entries go under the key ``provenance``, which `flags` skips."""
    import yaml

    settings = to_dict(config)
    if provenance:
        settings["provenance"] = provenance
    write_text(path, yaml.safe_dump(settings, sort_keys=False))


def flags(path: Path, config_class: type) -> list[str]:
    """The settings in a YAML or TOML file as command-line flags of ``config_class``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML or TOML, or a key that ``config_class`` does not have.
    """
    try:
        settings = read_table(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"config: no such file: {path}") from None
    settings.pop("provenance", None)
    return _flags(settings, config_class, prefix="", path=path)


def _key(field: dataclasses.Field) -> str:
    """A setting's name in files: without the underscore behind a word that Python has reserved."""
    return field.name.rstrip("_")


def check_same(record: Path, config: Any, names: tuple[str, ...], made: str) -> None:
    """Refuse to add to what other settings have made.

    Args:
        record (Path): settings that `save` wrote before; nothing is checked while there are none.
        config: the settings now.
        names (tuple): the fields that must be as they were.
        made (str): what would be added to, for the message.

    Raises:
        ValueError: one of the fields differs, or ``record`` does not hold settings.
    """
    if not record.is_file():
        return
    old = read_table(record)
    now = to_dict(config)
    keys = [name.rstrip("_") for name in names]
    different = [key for key in keys if old.get(key) != now[key]]
    if different:
        listed = ", ".join(f"{key} {old.get(key)!r} there, {now[key]!r} now" for key in different)
        raise ValueError(f"out must hold no {made} of this name made with other settings: {record} has {listed}")


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


def _parse(text: str, suffix: str) -> Any:
    if suffix == ".toml":
        if sys.version_info >= (3, 11):
            import tomllib
        else:
            import tomli as tomllib
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


def _flags(settings: dict[str, Any], config_class: type, prefix: str, path: Path) -> list[str]:
    fields = {_key(field): field for field in dataclasses.fields(config_class)}
    unknown = sorted(str(key) for key in settings if key not in fields)
    if unknown:
        raise ValueError(f"config: {path} has unknown keys {unknown}; {prefix or 'this verb'} takes {sorted(fields)}")
    result: list[str] = []
    for key, value in settings.items():
        flag = f"--{prefix}{key}".replace("_", "-")
        nested = fields[key].default_factory
        if isinstance(value, dict):
            if not (isinstance(nested, type) and dataclasses.is_dataclass(nested)):
                raise ValueError(f"config: {path}: {prefix}{key} must be a single value, got a table")
            result += _flags(value, nested, prefix=f"{prefix}{key}.", path=path)
        elif isinstance(value, bool):
            result.append(flag if value else f"--{prefix}no-{key}".replace("_", "-"))
        elif isinstance(value, list):
            if any(isinstance(item, (list, dict)) for item in value):
                raise ValueError(f"config: {path}: {prefix}{key} must be a list of single values")
            result += [flag, *map(str, value)]
        else:
            result += [flag, str(value)]
    return result
