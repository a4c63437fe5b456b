"""A kill before every single file operation: the old or the new is whole, and found."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from faults import server as faults_server
from faults.stages import COMMANDS, Reference, Server, check_whole

from subspace3d import cli, files
from subspace3d.training import checkpoints

# of Python's audit events those that change files
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod"}


def _is_change(event: str, arguments: tuple) -> bool:
    if event == "open":
        return isinstance(arguments[2], int) and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
    return event in _CHANGES


def run_until(work: Callable[[], object], last: int) -> bool:
    """Call ``work`` in a process that dies before its file operation number ``last``; says whether it did."""
    child = os.fork()
    if child == 0:
        done = 0

        def count(event: str, arguments: tuple) -> None:
            nonlocal done
            if _is_change(event, arguments):
                done += 1
                if done == last:
                    os.kill(os.getpid(), signal.SIGKILL)

        code = 1
        try:
            files._swept.clear()
            sys.addaudithook(count)
            work()
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


def kill_everywhere(prepare: Callable[[], None], work: Callable[[], object], check: Callable[[], object]) -> int:
    """Kill ``work`` at every operation, each time after ``prepare``, and ``check`` what is there; returns how many."""
    operations = 0
    while True:
        prepare()
        if not run_until(work, operations + 1):
            return operations
        operations += 1
        check()


def temporaries(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if ".s3d-" in path.name]


def emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def test_a_file_is_replaced_or_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def check() -> None:
        assert (folder / "a.json").read_text() in ("old", "new")
        files.sweep(folder)
        assert not temporaries(folder)

    def prepare() -> None:
        (emptied(folder) / "a.json").write_text("old")

    assert kill_everywhere(prepare, lambda: files.write_text(folder / "a.json", "new"), check) >= 4
    assert (folder / "a.json").read_text() == "new"


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_replaced_or_as_it_was(tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system cannot exchange two names, the next write or look finds and puts back what was set aside."""
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    folder = tmp_path / "run"
    state = {"found": 0}

    def write(text: str) -> None:
        with files.atomic_folder(folder / "result") as temporary:
            for name in ("a", "b"):
                (temporary / name).write_text(text)

    def whole() -> bool:
        texts = [(folder / "result" / name).read_text() for name in ("a", "b") if (folder / "result" / name).exists()]
        return texts in (["old", "old"], ["new", "new"])

    def check() -> None:
        state["found"] += whole()
        state["killed"] = state.get("killed", 0) + 1
        files.sweep(folder)
        assert whole()
        assert not temporaries(folder)

    def prepare() -> None:
        emptied(folder)
        write("old")

    assert kill_everywhere(prepare, lambda: write("new"), check) >= 8
    assert (folder / "result/a").read_text() == "new"
    # with the exchange it is under its name all the time
    assert state["found"] == state["killed"] if exchange else state["found"] == state["killed"] - 1


def test_a_folder_set_aside_by_a_living_process_is_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with files.atomic_folder(tmp_path / "result") as temporary:
        (temporary / "a").write_text("old")
    monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    real, seen = os.replace, []

    def replace(source: Path, target: Path) -> None:
        real(source, target)
        if not (tmp_path / "result").exists():
            files.sweep(tmp_path)  # as another process would, at the worst moment
            seen.append(not (tmp_path / "result").exists())

    monkeypatch.setattr(os, "replace", replace)
    with files.atomic_folder(tmp_path / "result") as temporary:
        (temporary / "a").write_text("new")
    assert seen == [True]
    assert (tmp_path / "result/a").read_text() == "new" and not temporaries(tmp_path)


def test_a_replacement_that_fails_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with files.atomic_folder(tmp_path / "result") as temporary:
        (temporary / "a").write_text("old")
    monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    real, calls = os.replace, []

    def replace(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise OSError("no space")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="no space"), files.atomic_folder(tmp_path / "result") as temporary:
        (temporary / "a").write_text("new")
    assert (tmp_path / "result/a").read_text() == "old" and not temporaries(tmp_path)


def test_what_is_discarded_is_there_or_gone(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def prepare() -> None:
        (emptied(folder) / "result").mkdir()
        for name in ("a", "b"):
            (folder / "result" / name).write_text("old")

    def check() -> None:
        assert not (folder / "result").exists() or len(list((folder / "result").iterdir())) == 2
        files.sweep(folder)
        assert not temporaries(folder)

    assert kill_everywhere(prepare, lambda: files.discard(folder / "result"), check) >= 5
    assert not list(folder.iterdir())


def test_foreign_files_of_such_names_are_left_alone(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".a.s3d-abcdefgh.tmp")
    (tmp_path / "precious").mkdir()
    (tmp_path / ".b.s3d-abcdefgh.tmp").symlink_to(tmp_path / "precious")
    (tmp_path / ".c.tmp").mkdir()
    files.sweep(tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_checkpoint_is_saved_and_an_old_one_dropped_whole(tmp_path: Path) -> None:
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    folder, ready = tmp_path / "checkpoints", tmp_path / "ready"
    for step in (1, 2):
        checkpoints.save(ready, step, {"p": parameter}, optimizer, {})

    def snapshot(path: Path) -> None:
        path.mkdir()
        (path / "adapter_config.json").write_text("{}")

    def check() -> None:
        found = checkpoints.newest_first(folder)
        assert len(found) >= checkpoints.KEPT
        for path in found:
            fresh = torch.nn.Parameter(torch.zeros(3))
            checkpoints.load(path, {"p": fresh}, torch.optim.AdamW([fresh]))
            assert torch.equal(fresh, parameter)
            assert checkpoints.read_state(path)["step"] == int(path.name.removeprefix("step_"))
        # as a run begins
        checkpoints.remove_unfinished(folder)
        assert not temporaries(folder)
        assert all(path.name.startswith("step_") for path in folder.iterdir())

    def prepare() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(ready, folder)

    def save() -> None:
        checkpoints.save(folder, 3, {"p": parameter}, optimizer, {}, snapshot=snapshot)

    assert kill_everywhere(prepare, save, check) >= 20
    assert [path.name for path in checkpoints.newest_first(folder)] == ["step_3", "step_2"]


def kill_a_stage_everywhere(
    server: Server, reference: Reference, verb: str, folder: Path, first: int = 1, stride: int = 1
) -> int:
    """Kill ``verb`` at every ``stride``-th of its file operations; after each kill it ends as an undisturbed run."""
    operations = reference.outcome(verb).operations
    for number in range(first, operations + 1, stride):
        run = reference.start(verb, folder / f"kill_{number}")
        killed = server.run(verb, run, kill_at=number)
        where = f"{verb}, killed at operation {number} of {operations}: {killed.text}"
        assert killed.code == -signal.SIGKILL, where
        try:
            check_whole(run)
        except Exception as error:
            raise AssertionError(f"partial file after {where}") from error
        again = server.run(verb, run)
        assert again.code == 0, f"{where}\n{again.text}"
        reference.check(verb, run)
        shutil.rmtree(run)
    return operations


def test_mining_is_killed_at_every_operation(server: Server, reference: Reference, tmp_path: Path) -> None:
    assert kill_a_stage_everywhere(server, reference, "mine", tmp_path) >= 5


def test_every_command_that_writes_is_a_stage() -> None:
    """So that a new one cannot be forgotten: demo is these stages in a row, bench appends lines."""
    writing = {name for name in cli.COMMANDS if hasattr(cli.load(name)[0], "writes")}
    assert {verb.split()[0] for verb in COMMANDS} == writing - {"demo", "bench"}
    assert {command.split()[0] for command in COMMANDS.values()} <= set(faults_server.COMMANDS)


PARTS = 4  # a stage has up to 400 operations, too many for one test's limit of time


@pytest.mark.slow  # hundreds of runs
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("verb", COMMANDS)
def test_every_stage_is_killed_at_every_operation(
    server: Server, reference: Reference, verb: str, part: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    operations = kill_a_stage_everywhere(server, reference, verb, tmp_path, part + 1, PARTS)
    with capsys.disabled():
        print(f"\n{verb}: killed at {len(range(part, operations, PARTS))} of its {operations} file operations")
