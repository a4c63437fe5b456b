"""Reading settings from YAML or TOML and writing the resolved ones beside a result."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from subspace3d.files import write_text

_LARGEST_FILE = 1 << 20
_MOST_VALUES = 10_000


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain YAML and JSON values: paths become strings, tuples lists."""
    table: dict[str, Any] = _plain(config)
    return table


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {_key(field): _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value


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
    if not path.is_file():
        raise FileNotFoundError(f"config: no such file: {path}")
    settings = read_table(path)
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
        names (tuple): the fields that must be as they were; one that the settings were written without has its
            default there.
        made (str): what would be added to, for the message.

    Raises:
        ValueError: one of the fields differs, or ``record`` does not hold settings.
    """
    if not record.is_file():
        return
    old = read_table(record)
    now = to_dict(config)
    keys = [name.rstrip("_") for name in names]
    if any(key in old for key in keys):
        old = {_key(field): _plain(field.default) for field in dataclasses.fields(config)} | old
    different = [key for key in keys if old.get(key) != now[key]]
    if different:
        listed = ", ".join(f"{key} {old.get(key)!r} there, {now[key]!r} now" for key in different)
        raise ValueError(f"out must hold no {made} of this name made with other settings: {record} has {listed}")


def read_table(path: Path) -> dict[str, Any]:
    """The table in a YAML or TOML file, of at most 10,000 values when all its references are followed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML or TOML, no table, or too many values; names the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise ValueError(f"it is larger than {_LARGEST_FILE} bytes")
        table = _parse(path.read_text(encoding="utf-8"), path.suffix)
        _count(table)
    except Exception as error:  # the parsers raise what they happen to run into, RecursionError among it
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(table, dict):
        raise ValueError(f"{path} must hold a table of settings, got {type(table).__name__}")
    return table


def _count(value: Any, before: int = 0) -> int:
    """Number of values so far; a few lines of references to references can stand for more than memory holds."""
    before += 1
    if before > _MOST_VALUES:
        raise ValueError(f"it stands for more than {_MOST_VALUES} values")
    children = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple, set)) else ()
    for child in children:
        before = _count(child, before)
    return before


def _parse(text: str, suffix: str) -> Any:
    if suffix == ".toml":
        if sys.version_info >= (3, 11):
            import tomllib
        else:
            import tomli as tomllib
        return tomllib.loads(text)
    import yaml

    return yaml.safe_load(text)


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
