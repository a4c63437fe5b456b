"""No reader is forgotten: files are opened in one place, and every function that reads there is fuzzed."""

from __future__ import annotations

import ast
import contextlib
import io
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from fuzz.readers import READERS

import subspace3d

ROOT = Path(subspace3d.__file__).parent
# what opens a file that somebody else may have made
PRIMITIVES = {
    "open_regular", "read_bytes", "read_text", "parse_json", "read_json", "read_record", "read_table", "load_tensors",
    "load_some", "load_header", "load_metadata",
}  # fmt: skip
# functions that open files without them, and why they may
OPEN_THEMSELVES = {
    "files.py": "writes",
    "jobs/side_by_side.py": "writes",
    "outputs/kinds.py": "looks at regular files only, at their heads or at records up to a bound, and trusts nothing",
    "system.py": "asks the system",
    "records.py": "asks the system",
    "training/device.py": "asks the system",
    "reporting/html.py": "parts of the package",
}
# functions that read and are not fuzzed by themselves, and why
NOT_ALONE = {
    **dict.fromkeys(
        (
            "commands/demo.py:_check_folder", "settings.py:differing", "outputs/kinds.py:_settings_of",
            "outputs/kinds.py:_settings_of.<locals>.is_own", "outputs/kinds.py:settings_like",
            "outputs/kinds.py:settings_like.<locals>.is_own",
        ),
        "compares the settings that read_table, which is fuzzed, has read",
    ),
    "commands/analyze.py:_is_done": "compares two entries of a record with what is wanted",
    "training/adapters.py:is_done": "compares entries of adapt.json, which is fuzzed, with what is wanted",
    "training/token_cache.py:TokenCache._tokens": "a damaged file is made again, see test_token_cache.py",
    "commands/fit.py:_sum_taken": "reads what the jobs of the same run have written, with checksums",
    "reporting/analysis_sections.py:_figure": "puts the bytes of a figure into the page, whatever they are",
    "bench/harness.py:read_rows": "reads what the benchmarks of this machine have written",
    "training/trackers.py:WeightsAndBiases.__init__": "hands an identifier to wandb",
}  # fmt: skip


def _functions(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    def visit(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.AST]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                yield from visit(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.FunctionDef):
                yield f"{prefix}{child.name}", child
                yield from visit(child, f"{prefix}{child.name}.<locals>.")
            else:
                yield from visit(child, prefix)

    yield from visit(tree, "")


def _calls(function: ast.AST) -> Iterator[tuple[str, bool]]:
    """Names of the functions it calls, and whether each is a method of something."""
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node.func.id, False
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            module = isinstance(node.func.value, ast.Name) and node.func.value.id in ("files", "reading", "tables")
            yield node.func.attr, not module


def _sources() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(ROOT.rglob("*.py")):
        yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def test_files_are_opened_in_one_place() -> None:
    found = []
    for name, tree in _sources():
        for function, node in _functions(tree):
            for call, is_method in _calls(node):
                if (call in ("read_text", "read_bytes", "fromfile") and is_method) or (
                    call == "open" and not is_method
                ):
                    found.append((name, function))
    assert sorted({function for function in found if function[0] not in OPEN_THEMSELVES}) == []
    assert {name for name, _ in found} == OPEN_THEMSELVES.keys()


def test_every_function_that_reads_is_fuzzed(tmp_path: Path) -> None:
    reading = {
        f"{name}:{function}"
        for name, tree in _sources()
        for function, node in _functions(tree)
        if any(call in PRIMITIVES and not is_method for call, is_method in _calls(node))
        and name not in ("files.py", "reading.py")
    }
    entered: set[str] = set()

    def note(frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(ROOT)):
            entered.add(f"{Path(code.co_filename).relative_to(ROOT).as_posix()}:{code.co_qualname}")

    for index, reader in enumerate(READERS.values()):
        folder = tmp_path / str(index)
        folder.mkdir()
        reader.make(folder)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            sys.setprofile(note)
            try:
                reader.read(folder)
            finally:
                sys.setprofile(None)
    assert sorted(reading - entered - NOT_ALONE.keys()) == []
    assert sorted(NOT_ALONE.keys() - (reading - entered)) == []
