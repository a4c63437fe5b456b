"""Settings of commands: read from YAML or TOML, and written, resolved, beside a result."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from subspace3d import outputs, records
from subspace3d.files import write_text
from subspace3d.schema import require as require
from subspace3d.tables import check_plain, read_table


def flag(name: str) -> Any:
    """The flag of a setting whose name Python has reserved; evaluated by the command line alone."""
    import tyro

    return tyro.conf.arg(name=name)


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
    """Write ``config`` as YAML; ``provenance`` entries go under the key ``provenance``, which `flags` skips.

    Raises:
        ValueError: something else than settings of this command is at ``path``.
    """
    import yaml

    settings = to_dict(config)
    if provenance:
        settings["provenance"] = provenance
    path = outputs.claim(path, outputs.settings_like(settings))
    write_text(path, yaml.safe_dump(settings, sort_keys=False))


def flags(path: Path, config_class: type) -> list[str]:
    """The settings in a YAML or TOML file as command-line flags of ``config_class``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML or TOML, a key that ``config_class`` does not have, or a value that no setting has.
    """
    try:
        settings = read_table(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"config: no such file: {path}") from None
    settings.pop("provenance", None)
    check_plain(settings, path)
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
    different = differing(record, config, names)
    records.check_same(
        record,
        {key: old for key, (old, _) in different.items()},
        {key: now for key, (_, now) in different.items()},
        f"--overwrite replaces the {made} of this name",
    )


def differing(record: Path, config: Any, names: tuple[str, ...]) -> dict[str, tuple[Any, Any]]:
    """Of the fields ``names`` those that differ from what `save` wrote to ``record``: key -> (there, now).

    Raises:
        ValueError: ``record`` is there and does not hold settings.
    """
    if not record.is_file():
        return {}
    now = to_dict(config)
    # a setting that an earlier version did not have was as its default is
    unset = {_key(field): _plain(field.default) for field in dataclasses.fields(config)}
    stored = read_table(record)
    check_plain(stored, record)
    before = {**unset, **stored}
    return records.differing(before, {name.rstrip("_"): now[name.rstrip("_")] for name in names})


def _flags(settings: dict[str, Any], config_class: type, prefix: str, path: Path) -> list[str]:
    fields = {_key(field): field for field in dataclasses.fields(config_class)}
    renamed = getattr(config_class, "RENAMED", {})
    settings = {renamed.get(key, key): value for key, value in settings.items()}
    unknown = sorted(str(key) for key in settings if key not in fields)
    if unknown:
        where = prefix.rstrip(".") or "this command"
        raise ValueError(f"config: {path} has unknown keys {unknown}; {where} takes {sorted(fields)}")
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
