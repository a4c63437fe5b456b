"""The result of a fine-tuning run on disk: OUT/tuned, a record with hashes and what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from subspace3d.files import inside, read_record, sha256

FORMAT = "subspace3d-tuned"
VERSION = 2
ADAPTER = "adapter"
BASIS = "basis.safetensors"
WEIGHTS = "model.safetensors"


def read_tuned(out: Path) -> dict[str, Any]:
    """tuned.json of a run folder (or of its ``tuned`` folder itself), its files checked against their hashes.

    Raises:
        FileNotFoundError: there is no result, or one of its files is missing.
        ValueError: another format, or a file that is not the one recorded.
    """
    folder = tuned_folder(out)
    record = read_record(folder / "tuned.json")
    if record.get("format") != FORMAT or record.get("version") != VERSION:
        raise ValueError(f"{folder / 'tuned.json'} must have format {FORMAT!r} version {VERSION}")
    for key in ("files", "backbone", "settings"):
        if not isinstance(record.get(key), dict):
            raise ValueError(f"{folder / 'tuned.json'}: {key} must be an object, got {record.get(key)!r:.80}")
    if not isinstance(record.get("method"), str):
        raise ValueError(f"{folder / 'tuned.json'}: method must be text, got {record.get('method')!r:.80}")
    for name, digest in record["files"].items():
        path = inside(folder, name, f"{folder / 'tuned.json'}: files")
        if not isinstance(digest, str) or sha256(path) != digest:
            raise ValueError(f"{path} must have the sha256 in tuned.json ({str(digest)[:12]}...), it was changed")
    return record


def tuned_folder(out: Path) -> Path:
    """The folder that holds tuned.json: ``out/tuned``, or ``out`` itself.

    Raises:
        FileNotFoundError: neither does.
    """
    for folder in (Path(out) / "tuned", Path(out)):
        if (folder / "tuned.json").is_file():
            return folder
    raise FileNotFoundError(f"no tuned result (tuned.json) in {out}")
