"""The result of a fine-tuning run on disk: OUT/tuned, a record with hashes and what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NotRequired

from typing_extensions import TypedDict

from subspace3d.backbones.model_card import NAME as CARD
from subspace3d.backbones.model_card import licence_of_card
from subspace3d.choices import CORE_METHODS, OWN_WEIGHTS, Method
from subspace3d.files import inside, read_json, sha256
from subspace3d.schema import Count, Rule, check

FORMAT = "subspace3d-tuned"
VERSION = 2
ADAPTER = "adapter"
BASIS = "basis.safetensors"
WEIGHTS = "model.safetensors"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = f"{ADAPTER}/adapter_config.json", f"{ADAPTER}/adapter_model.safetensors"

_PLACES = ("random", "shipped")
_Seed = Annotated[int, Rule("an integer of 63 bits", lambda value: abs(value) < 1 << 63)]
_Weights = Annotated[
    str, Rule("random, shipped or an absolute path", lambda value: value in _PLACES or Path(value).is_absolute())
]
_Digest = Annotated[str, Rule("a sha256", lambda value: len(value) == 64 and value.isalnum())]


class BackboneTable(TypedDict):
    """`BackboneRecord` on disk."""

    name: str
    weights: _Weights
    sha256: str
    seed: NotRequired[_Seed]
    licence: NotRequired[str]


class TunedRecord(TypedDict):
    """tuned.json; docs/formats.md has every field."""

    format: str
    version: int
    method: Method
    backbone: BackboneTable
    settings: dict[str, Any]
    files: dict[str, _Digest]
    rank: NotRequired[Count]
    K: NotRequired[Count]
    basis: NotRequired[Any]
    trainable: NotRequired[dict[str, Count]]
    training: NotRequired[dict[str, Any] | None]
    few: NotRequired[dict[str, Any] | None]
    environment: NotRequired[dict[str, Any]]


class AdaptRecord(TypedDict):
    """adapt.json beside an adapter that ``adapt`` made."""

    settings: dict[str, Any]
    backbone: NotRequired[BackboneTable]
    scenes: NotRequired[str]
    trainable: NotRequired[dict[str, Count]]
    training: NotRequired[dict[str, Any] | None]


def licence_of_adapter(folder: Path) -> str | None:
    """What an adapter folder says of the licence of the weights it was tuned on; None: nothing.

    It stands in adapt.json beside the adapter, or for a run's adapter in the tuned.json above it, or in its card.

    Raises:
        ValueError: the record is malformed.
    """
    for path, schema in ((folder / "adapt.json", AdaptRecord), (folder.parent / "tuned.json", TunedRecord)):
        if path.is_file():
            record = check(read_json(path), dict[str, Any], path)
            check(record, schema, path)
            return (record.get("backbone") or {}).get("licence") or None
    return licence_of_card(folder / CARD)


def read_tuned(out: Path) -> TunedRecord:
    """tuned.json of a run folder (or of its ``tuned`` folder itself), its files checked against their hashes.

    Every file that `training.tuned.load_tuned` reads must be among them; of adapter_config.json version 0.1.0 kept no
    hash, there its content is checked alone.

    Raises:
        FileNotFoundError: there is no result, or one of its files is missing.
        ValueError: another format, or a file that is not the one recorded.
    """
    folder = tuned_folder(out)
    record = read_tuned_record(folder)
    for name in _needed(record["method"]):
        if name not in record["files"]:
            raise ValueError(f"{folder / 'tuned.json'}: files must name {name}, which {record['method']} consists of")
    for name, digest in record["files"].items():
        path = inside(folder, name, f"{folder / 'tuned.json'}: files")
        if sha256(path) != digest:
            raise ValueError(f"{path} must have the sha256 in tuned.json ({digest[:12]}...), it was changed")
    return record


def read_tuned_record(folder: Path) -> TunedRecord:
    """The tuned.json in ``folder``, its layout checked but not the files it names.

    Raises:
        FileNotFoundError: there is none.
        ValueError: another format or layout; names the entry.
    """
    path = folder / "tuned.json"
    record = check(read_json(path), dict[str, Any], path)
    if record.get("format") != FORMAT or record.get("version") != VERSION:
        raise ValueError(f"{path} must have format {FORMAT!r} version {VERSION}")
    return check(record, TunedRecord, path)


def _needed(method: str) -> tuple[str, ...]:
    if method == "none":
        return ()
    if method in OWN_WEIGHTS:
        return (WEIGHTS,)
    return (BASIS, ADAPTER_WEIGHTS) if method in CORE_METHODS else (ADAPTER_WEIGHTS,)


def tuned_folder(out: Path) -> Path:
    """The folder that holds tuned.json: ``out/tuned``, or ``out`` itself.

    Raises:
        FileNotFoundError: neither does.
    """
    for folder in (Path(out) / "tuned", Path(out)):
        if (folder / "tuned.json").is_file():
            return folder
    raise FileNotFoundError(f"no tuned result (tuned.json) in {out}")
