"""The kinds of results, and what each is known by."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from subspace3d.outputs.rule import MARK, Kind, entries
from subspace3d.tables import read_table

_HEAD = 1 << 16  # bytes of a file that say what it is
_LARGEST_RECORD = 1 << 28
_CRC = re.compile(rb'"crc32":"[0-9a-f]{8}"')
_TOKENS = re.compile(r"[0-9a-f]{16}-[a-z]+-[a-z]+\d+")  # encoder, device and type, as the cache names its folders
_PEFT = ("adapter_config.json", "adapter_model.safetensors", "README.md")


def _head(path: Path) -> bytes:
    if not path.is_file():
        return b""
    with open(path, "rb") as file:
        return file.read(_HEAD)


def _has_header(name: str) -> Callable[[Path], bool]:
    """A safetensors file whose header names this format; also a damaged one."""
    return lambda path: f'\\"format\\": \\"{name}\\"'.encode() in _head(path)


def _is_checked_tensors(path: Path) -> bool:
    head = _head(path)
    return _CRC.search(head) is not None and b'"header":' not in head.partition(b"}")[0]


def _record(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is none that can be read."""
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST_RECORD:
            return {}
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _settings_of(*keys: str) -> Callable[[Path], bool]:
    """Settings of a command as `settings.save` writes them."""

    def is_own(path: Path) -> bool:
        try:
            return path.is_file() and set(keys) <= read_table(path).keys()
        except ValueError:
            # the settings of data sets are read again before they are written, with a message that says what is wrong
            return path.name.startswith("config-")

    return is_own


def settings_like(settings: dict[str, Any]) -> Kind:
    """Settings that have half of these keys or more: those of the same command, in whatever version."""

    def is_own(path: Path) -> bool:
        try:
            return 2 * len(settings.keys() & read_table(path).keys()) >= len(settings)
        except ValueError:
            return False

    return Kind("settings of this command", False, is_own)


def _is_marked(path: Path, kind: str) -> bool:
    return _record(path / MARK).get("kind") == kind


def _is_run(path: Path) -> bool:
    if _is_marked(path, RUN.what) or _is_tuned(path / "tuned"):
        return True
    if (path / "config.yaml").is_file():
        return FINETUNE_SETTINGS.is_own(path / "config.yaml")
    return any("step" in _record(state) for state in path.glob("checkpoints/step_*/state.json")) or _is_metrics(
        path / "metrics.jsonl"
    )


def _is_metrics(path: Path) -> bool:
    if not path.is_file():
        return False
    head = _head(path)
    first = head.partition(b"\n")[0]
    return not head or (first.startswith(b'{"step": ') and all(key in first for key in (b'"skipped": ', b'"images": ')))


def _is_tuned(path: Path) -> bool:
    return _record(path / "tuned.json").get("format") == "subspace3d-tuned"


def _tuned_content(path: Path) -> set[str]:
    files = _record(path / "tuned.json").get("files")
    return {"tuned.json", *(f"adapter/{name}" for name in _PEFT), *(files if isinstance(files, dict) else ())}


def _is_scene(path: Path) -> bool:
    return _record(path / "scene.json").get("format") == "subspace3d-scene"


def _scene_content(path: Path) -> set[str]:
    frames = _record(path / "scene.json").get("frames")
    named = {
        frame.get(key)
        for frame in (frames if isinstance(frames, list) else ())
        if isinstance(frame, dict)
        for key in ("image", "depth", "mask")
    }
    return {"scene.json", *(os.path.normpath(name) for name in named if isinstance(name, str))}


def _dataset_content(path: Path) -> set[str]:
    scenes = [scene for scene in path.iterdir() if _is_scene(scene)]
    return {os.path.join(scene.name, name) for scene in scenes for name in _scene_content(scene)}


def _is_dataset(path: Path) -> bool:
    return all(_is_scene(path / name) for name in entries(path))


def _is_adapted(path: Path) -> bool:
    return isinstance(_record(path / "adapt.json").get("settings"), dict)


def _adapted_content(path: Path) -> set[str]:
    events = {f"tensorboard/{file.name}" for file in path.glob("tensorboard/events.out.tfevents.*")}
    return {*_PEFT, "adapt.json", "metrics.jsonl", *events}


def _is_exported(path: Path) -> bool:
    return (path / "adapter_config.json").is_file() and _is_checked_tensors(path / "adapter_model.safetensors")


def _is_analysis(path: Path) -> bool:
    found = _record(path / "analysis.json").get("format") == "subspace3d-analysis"
    return found or _is_marked(path, ANALYSIS.what)


def _is_fit(path: Path) -> bool:
    return _record(path / "fit.json").get("format") == "subspace3d-fit" or _is_marked(path, FIT.what)


def _is_evaluation(path: Path) -> bool:
    if _is_marked(path, EVALUATION.what) or _record(path / "results.json").get("format") == "subspace3d-results":
        return True
    return any("key" in _record(file) for file in path.glob("methods/*.json"))


def _is_page(path: Path) -> bool:
    head = _head(path)
    if b'<meta name="generator" content="subspace3d">' in head:
        return True
    # of 0.1.0, which did not name itself
    return head.startswith(b"<!doctype html>") and b"<title>subspace3d: " in head


def _is_rows(path: Path) -> bool:
    lines = _head(path).splitlines()
    return bool(lines) and lines[0].startswith(b"{") and b'"device": "' in lines[0]


def _is_skipped(path: Path) -> bool:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return True  # named so by this project alone, and read again with a message
    return isinstance(value, dict) and all(isinstance(reasons, list) for reasons in value.values())


def _is_cache(path: Path) -> bool:
    return all(_TOKENS.fullmatch(name) and (path / name).is_dir() for name in entries(path))


def _is_sheet(path: Path) -> bool:
    return GENERATE_SETTINGS.is_own(path.with_name(f"config-{path.stem}.yaml"))


SUBSPACE = Kind("a mined subspace", False, _has_header("subspace3d-subspace"))
BASIS = Kind("a basis", False, _has_header("subspace3d-basis"))
TENSORS = Kind("a safetensors file", False, _is_checked_tensors)
SCENE = Kind("a scene", True, _is_scene, _scene_content)
DATASET = Kind("a data set", True, _is_dataset, _dataset_content)
ADAPTED = Kind("an adapter", True, _is_adapted, _adapted_content)
EXPORTED = Kind("an exported adapter", True, _is_exported, lambda path: set(_PEFT))
TUNED = Kind("a tuned result", True, _is_tuned, _tuned_content)
ANALYSIS = Kind("an analysis", True, _is_analysis)
FIT = Kind("a fit", True, _is_fit)
EVALUATION = Kind("an evaluation", True, _is_evaluation)
PAGE = Kind("a report", False, _is_page)
RUN = Kind("a fine-tuning run", True, _is_run, beside=(SUBSPACE, ANALYSIS, FIT, EVALUATION, PAGE))
FOLDER = Kind("a folder", True, lambda path: True, is_shared=True)
ADDED_TO = Kind("a data set", True, lambda path: True)
NEW = Kind("a data set (with its config-<name>.yaml)", True, lambda path: False)
SHEET = Kind("a contact sheet", False, _is_sheet)
ROWS = Kind("rows of a benchmark", False, _is_rows)
TOKENS = Kind("a cache of tokens", True, _is_cache)
SKIPPED = Kind("a list of what was skipped", False, _is_skipped)
GENERATE_SETTINGS = Kind("settings of generate", False, _settings_of("out", "attribute", "preset", "scenes"))
CONVERT_SETTINGS = Kind("settings of convert", False, _settings_of("out", "from", "root"))
ADAPT_SETTINGS = Kind("settings of adapt", False, _settings_of("scenes", "out", "backbone", "rank"))
FINETUNE_SETTINGS = Kind("settings of finetune", False, _settings_of("scenes", "out", "method", "backbone"))
DEMO_SETTINGS = Kind("settings of demo", False, _settings_of("smoke", "seed"))
DEMO = Kind("a run of demo", True, lambda path: DEMO_SETTINGS.is_own(path / "config.yaml"))
EXPERIMENTS = Kind("a run of experiments", True, lambda path: "starts" in _record(path / "experiments.json"))


def tuned_folders(runs: Iterable[Path]) -> tuple[Path, ...]:
    """The folder with tuned.json of each run."""
    return tuple(run if (run / "tuned.json").is_file() else run / "tuned" for run in map(Path, runs))
