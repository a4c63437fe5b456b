"""The base package on systems that lack what POSIX has: what it imports, and the way to a result on a CPU."""

import ast
import errno
import fcntl
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from training.plane_scenes import write_plane_scenes

import subspace3d
import subspace_ext
from subspace3d import files, locks, system

ROOT = Path(__file__).parents[2]
ABSENT_MODULES = ("fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty")
# of `os` and `signal`, what Windows lacks and what a program like this might use
ABSENT_NAMES = re.compile(
    r"O_(NOFOLLOW|NONBLOCK|CLOEXEC|DIRECTORY|SYNC)|fork|forkpty|get(e|)[ug]id|killpg|setsid|getpgid|setpgrp|mkfifo|mknod"
    r"|statvfs|sched_\w+|chown|lchown|chroot|sysconf|uname|nice|WNOHANG|wait[34p]?|posix_\w+|pipe2|SIGKILL|SIGHUP|SIGUSR[12]"
    r"|SIGALRM|SIGCHLD|SIGSTOP|SIGCONT|SIGPIPE|alarm|setitimer|pause"
)
# Linux tells more than other systems; each of these asks first whether the file is there
LINUX_FILES = {"training/device.py", "system.py", "records.py"}


def sources() -> list[Path]:
    return sorted(
        path for package in (subspace3d, subspace_ext) for path in Path(package.__file__).parent.rglob("*.py")
    )


def test_only_one_module_knows_what_systems_differ_in() -> None:
    found = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{path}:{getattr(node, 'lineno', 0)}"
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [f"{where}: {name}" for name in names if name in (*ABSENT_MODULES, "msvcrt", "winreg")]
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id in ("os", "signal")
            ):
                found += [f"{where}: {node.value.id}.{node.attr}"] if ABSENT_NAMES.fullmatch(node.attr) else []
    assert all(line.startswith(system.__file__) for line in found), found
    assert len(found) >= 3  # the scan sees what it looks for


def test_paths_of_one_system_are_asked_for_before_they_are_read() -> None:
    found = set()
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            if re.match(r"/(proc|dev|tmp|etc|usr|home|sys|var)(/|$)", text):
                found.add(path.relative_to(Path(subspace3d.__file__).parent).as_posix())
    assert found == LINUX_FILES


def test_native_code_needs_no_compiler_of_one_maker() -> None:
    only_gcc = re.compile(r"__attribute__|__builtin_|vector_size|unistd\.h|sys/\w+\.h|pthread|\balloca\b|__int128")
    found = {
        path.name
        for path in [*(ROOT / "csrc").glob("*.*"), *(ROOT / "csrc/cpu").glob("*.*")]
        for line in path.read_text(encoding="utf-8").splitlines()
        if only_gcc.search(line) and "target_clones" not in line
    }
    # the macros there have a second form, which tests/core/test_images.py compiles and compares
    assert found == {"lane.h"}


# Runs commands with `os`, `signal` and the missing modules as Windows has them, for the modules of this project alone.
WINDOWS = """
import builtins, os, re, signal, sys, types
absent_modules, absent_names = {modules!r}, re.compile({names!r})
real_import, real_open = builtins.__import__, os.open
fakes = {{}}

def without(module):
    fake = fakes.setdefault(module.__name__, types.ModuleType(module.__name__))
    fake.__dict__.update({{key: value for key, value in vars(module).items() if not absent_names.fullmatch(key)}})
    return fake

def open_file(path, flags, mode=0o777):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return real_open(path, flags, mode)

def load(name, globals=None, locals=None, fromlist=(), level=0):
    asking = (globals or {{}}).get("__name__", "").partition(".")[0]
    if asking in ("subspace3d", "subspace_ext") and level == 0:
        if name in absent_modules:
            raise ImportError(f"No module named {{name!r}}")
        if name in ("os", "signal"):
            fake = without(real_import(name))
            if name == "os":
                fake.name, fake.open = "nt", open_file
            return fake
    return real_import(name, globals, locals, fromlist, level)

builtins.__import__ = load
from subspace3d import cli, system
assert system.fcntl is None and system.resource is None and system.HOLDS_OPEN_FILES
assert system.WITHOUT_FOLLOWING == 0 and system.open_folder(".") is None
for line in {commands!r}:
    cli.main(line)
"""


def as_windows(*commands: list[str], cwd: Path) -> subprocess.CompletedProcess:
    code = WINDOWS.format(modules=ABSENT_MODULES, names=ABSENT_NAMES.pattern, commands=list(commands))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=cwd)


def test_commands_reach_their_results_without_posix(tmp_path: Path) -> None:
    write_plane_scenes(tmp_path / "scenes/a", scenes=2, views=2, size=28)
    train = [
        *("--weights", "random", "--train.steps", "2", "--train.frames", "2", "2", "--train.image-size", "28"),
        *("--train.device", "cpu", "--train.threads", "1", "--train.images-per-step", "2", "--train.save-every", "1"),
        *("--train.no-checkpointing", "--train.no-check-memory"),
    ]
    done = as_windows(
        ["adapt", "--scenes", "scenes/a", "--out", "adapter", "--rank", "2", *train],
        ["mine", "--adapters", "adapter", "--out", "basis.safetensors", "--k", "2"],
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "basis.safetensors").is_file()
    assert not [path for path in tmp_path.rglob("*") if files.is_leftover(path.name) or path.name.endswith(".lock")]


def test_locks_of_windows_keep_a_second_process_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def locking(handle: int, mode: int, count: int) -> None:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, count, 0, 1)
        except OSError:
            raise PermissionError(errno.EACCES, "Permission denied") from None

    holder = "import fcntl, sys, time; file = open(sys.argv[1], 'a+b'); file.seek(0x7FFF0000)\n"
    holder += "fcntl.lockf(file, fcntl.LOCK_EX, 1, 0, 1); print('held', flush=True); time.sleep(60)"
    monkeypatch.setattr(system, "fcntl", None)
    monkeypatch.setattr(system, "msvcrt", SimpleNamespace(LK_NBLCK=2, locking=locking))
    monkeypatch.setattr(system, "HOLDS_OPEN_FILES", True)
    monkeypatch.setattr(system, "open_folder", lambda path: None)
    with locks.exclusive(tmp_path / "out"):
        assert (tmp_path / "out/.lock").is_file()
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    other = subprocess.Popen([sys.executable, "-c", holder, str(tmp_path / "out/.lock")], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with pytest.raises(locks.FolderInUse), locks.exclusive(tmp_path / "out"):
            pass
    finally:
        other.kill()
        other.communicate()
    with files.atomic_path(tmp_path / "out/result.txt") as path:
        path.write_text("whole", encoding="utf-8")
    assert (tmp_path / "out/result.txt").read_text(encoding="utf-8") == "whole"
