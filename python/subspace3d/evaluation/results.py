"""The records of an evaluation: of a scene, of a method, which are kept to go on from, and of all: results.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from subspace3d.evaluation.protocols import PROTOCOLS
from subspace3d.evaluation.table import METRICS, QUANTITIES, Metric
from subspace3d.files import discard, read_record, write_json
from subspace3d.formats.results import FORMAT, KeptRecord, KeptScene
from subspace3d.log import logger
from subspace3d.records import digest

BASE = "base"
_KEPT_ALONE = ("key", "skipped", "pictures", "files")  # in the record of a method and not in results.json


@dataclass(frozen=True)
class KeptResults:
    """What an earlier evaluation has measured of one method: OUT/methods/<name>.json, scene by scene until that stands.

    Attributes:
        out: folder of the evaluation.
        name: of the method.
        key: what the numbers depend on; records with another one are not read.
        files: scene -> digest of the images, depth maps and masks that are measured; where a record has another one, it
            is not read either.
    """

    out: Path
    name: str
    key: Mapping[str, Any]
    files: Mapping[str, str]

    def method(self) -> dict[str, Any] | None:
        """The record of the method over all scenes, if there is one."""
        return self._read(self._file, self.key, KeptRecord)

    def keep_method(self, record: Mapping[str, Any]) -> None:
        write_json(self._file, {"key": self.key, **record})

    def scene(self, number: int) -> dict[str, Any] | None:
        """The record of one scene, if there is one."""
        return self._read(self._scenes / f"{number}.json", self._short_key, KeptScene)

    def keep_scene(self, number: int, record: Mapping[str, Any]) -> None:
        write_json(self._scenes / f"{number}.json", {"key": self._short_key, **record})

    def drop_scenes(self) -> None:
        """Delete the records of single scenes, once the method's own stands."""
        if self._scenes.is_dir():
            discard(self._scenes)

    @property
    def _file(self) -> Path:
        return self.out / "methods" / f"{self.name}.json"

    @property
    def _scenes(self) -> Path:
        return self.out / "methods" / f"{self.name}.parts"

    @cached_property
    def _short_key(self) -> dict[str, str]:
        # the key lists every scene: in each of their records it would grow with the square of their number
        return {"sha256": digest(self.key)}

    def _read(self, file: Path, key: Mapping[str, Any], layout: type[Any]) -> dict[str, Any] | None:
        """A record that was made from the same inputs and whose pictures still stand."""
        if not file.is_file():
            return None
        try:
            record = read_record(file, layout)
        except ValueError as error:
            logger.info(f"measuring anew: {error}")
            return None
        # records of before digests were kept have none
        if record["key"] != key or any(self.files.get(name) != it for name, it in record.get("files", {}).items()):
            return None
        named = [self.out / entry[kind] for entry in record["pictures"] for kind in ("true", "prediction")]
        return dict(record) if all(path.is_file() for path in named) else None


def empty_record(protocols: Iterable[str]) -> dict[str, Any]:
    """A record of no scenes, to which `add` adds."""
    return {
        "per_scene": {},
        "reasons": {},
        "details": {},
        "failed": {},
        "skipped": [],
        "pictures": [],
        "protocols": {protocol: {"per_scene": {}, "reasons": {}} for protocol in protocols},
        "files": {},
        "seconds": 0.0,
    }


def add(record: dict[str, Any], part: Mapping[str, Any]) -> None:
    """Add the record of one scene to that of all."""
    for name in ("per_scene", "reasons", "details", "failed", "files"):
        record[name] |= part.get(name, {})
    for name in ("skipped", "pictures", "seconds"):
        record[name] += part[name]
    for protocol, values in record["protocols"].items():
        for name in ("per_scene", "reasons"):
            values[name] |= part["protocols"][protocol][name]


def assemble(
    measured: Mapping[str, Mapping[str, Any]], protocol: Mapping[str, Any], units: Mapping[str, str]
) -> dict[str, Any]:
    """results.json from the records of all methods.

    Args:
        measured (Mapping): method -> its record.
        protocol (Mapping): what the numbers depend on, in words.
        units (Mapping): scene -> name of its unit. If the scenes that are measured differ in it, means of lengths are
            None.

    Raises:
        ValueError: no method has measured a scene; gives the reasons.
    """
    base = measured[BASE]
    evaluated = list(dict.fromkeys(scene for record in measured.values() for scene in record["per_scene"]))
    if not evaluated:
        reasons = [f"{entry['scene']}: {entry['reason']}" for entry in base["skipped"]]
        reasons += [
            f"{name} on {scene}: {why}" for name, rec in measured.items() for scene, why in rec["failed"].items()
        ]
        raise ValueError("no scene could be evaluated; " + "; ".join(reasons[:4]))
    units = {scene: units[scene] for scene in evaluated if scene in units}
    if len(set(units.values())) > 1:
        measured = {name: _without_lengths(record) for name, record in measured.items()}
    shown: dict[str, dict[str, Any]] = {}
    for name, record in measured.items():
        for entry in record["pictures"]:
            scene = shown.setdefault(entry["scene"], {"scene": entry["scene"], "true": entry["true"], "methods": {}})
            scene["methods"][name] = entry["prediction"]
    return {
        "format": FORMAT,
        "version": 1,
        "scenes": evaluated,
        "units": units,
        "skipped": base["skipped"],
        "protocol": dict(protocol),
        "metrics": {name: dataclasses.asdict(metric) for name, metric in METRICS.items()},
        "protocols": {
            name: {
                **PROTOCOLS[name].in_words(),
                "metrics": {
                    metric: {
                        "label": QUANTITIES[metric].label,
                        "lower_is_better": QUANTITIES[metric].lower_is_better,
                        "unit": QUANTITIES[metric].unit,
                    }
                    for metric in PROTOCOLS[name].metrics
                },
            }
            for name in protocol["protocols"]
        },
        "methods": {
            name: {key: value for key, value in record.items() if key not in _KEPT_ALONE}
            for name, record in measured.items()
        },
        "pictures": list(shown.values()),
    }


def _without_lengths(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a method without the means of lengths."""

    def known(values: Mapping[str, Any], metrics: Mapping[str, Metric], instead: int | None) -> dict[str, Any]:
        return {name: instead if metrics[name].unit == "scene" else value for name, value in values.items()}

    return {
        **record,
        "mean": known(record["mean"], METRICS, None),
        "scenes_in_mean": known(record.get("scenes_in_mean", {}), METRICS, 0),
        "protocols": {
            name: {**values, "mean": known(values["mean"], QUANTITIES, None)}
            for name, values in record["protocols"].items()
        },
    }
