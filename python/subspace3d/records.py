"""What a result says of how it was made: is it done with the same settings, and where did it come from?"""

from __future__ import annotations

import hashlib
import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from subspace3d import __version__
from subspace3d.machine import usable_cores


def differing(before: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Of the settings ``wanted`` those that ``before`` has with another value, or lacks: name -> (before, wanted)."""
    return {name: (before.get(name), value) for name, value in wanted.items() if before.get(name) != value}


def check_same(where: Path, before: Mapping[str, Any], wanted: Mapping[str, Any], remedy: str = "") -> None:
    """Refuse to add to, or to take for done, what other settings have made.

    Args:
        where (Path): what was made, for the message.
        before (Mapping): the settings it was made with.
        wanted (Mapping): the settings now; others that it has do not count.
        remedy (str): what to do about it.

    Raises:
        ValueError: they differ; names every difference.
    """
    different = differing(before, wanted)
    if different:
        listed = ", ".join(f"{name} {old!r} there, {new!r} now" for name, (old, new) in different.items())
        raise ValueError(f"out: {where} was made with other settings ({listed}){'; ' if remedy else ''}{remedy}")


def digest(settings: Mapping[str, Any]) -> str:
    """sha256 of settings that JSON can hold, whatever their order: a short name for what was made with them."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def command_line() -> str:
    """How this process was started, without the folder of the program."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        return shlex.join(["python", "-m", program.parent.name, *sys.argv[1:]])
    return shlex.join([program.name, *sys.argv[1:]])


def processor() -> str:
    """Name of the CPU and the cores this process may use."""
    info = Path("/proc/cpuinfo")
    name = platform.processor() or platform.machine()
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = " ".join(line.partition(":")[2].split())
                break
    return f"{name}, {usable_cores()} cores"


def commit() -> str:
    """Of the checkout this module belongs to; of an installed wheel the package's version.

    Changes below benchmarks/ do not make it dirty: that is where the rows of benchmarks go.
    """
    git = ["git", "-C", str(Path(__file__).parent)]
    # a wheel may be installed inside somebody else's repository
    if not output_of([*git, "ls-files", Path(__file__).name]):
        return f"version {__version__}"
    changed = output_of([*git, "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)benchmarks"])
    return output_of([*git, "describe", "--always", "--exclude=*"]).strip() + ("-dirty" if changed else "")


def output_of(command: list[str]) -> str:
    """What a program prints; nothing where it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def provenance() -> dict[str, Any]:
    """Command, commit, versions, processor and time of now."""
    import torch

    return {
        "command": command_line(),
        "commit": commit(),
        "subspace3d": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": processor(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
