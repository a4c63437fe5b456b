"""Runs verbs in forked processes that have the heavy imports behind them, and kills them at chosen moments.

Reads one JSON object per line from stdin: ``folder`` to work in, ``arguments`` of the command line, ``log`` file, and
optionally ``kill_after`` (seconds), ``kill_at`` (number of file operations), ``file_bytes`` (most in one file),
``spare_bytes`` (of memory), ``clock`` (seconds by which it jumps at every look) or ``twins`` (two processes at a time).
Answers with one: ``code`` (negative: the signal; with twins the larger), ``seconds``, ``operations``.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import resource
import signal
import sys
import time
from typing import Any

COMMANDS = (
    "generate", "convert", "adapt", "mine", "fit", "analyze", "finetune", "export", "evaluate", "report",
)  # fmt: skip
MODULES = (
    "torch", "peft", "PIL.Image", "scipy.io", "scipy.spatial", "matplotlib.figure", "yaml", "tyro", "tqdm",
    *(f"subspace3d.commands.{name}" for name in COMMANDS),
    "subspace3d.adapters.peft.tuner", "subspace3d.evaluation.evaluate", "subspace3d.mining.analyze",
    "subspace3d.mining.mine", "subspace3d.reporting.report", "subspace3d.training.adapters",
    "subspace3d.training.tuned",
)  # fmt: skip
# of Python's audit events those that change files; opening for reading is left out
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    for module in MODULES:
        importlib.import_module(module)
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(_serve(json.loads(line))), file=answers, flush=True)


def _serve(order: dict[str, Any]) -> dict[str, Any]:
    reader, writer = os.pipe()
    started = time.monotonic()
    twin = order.get("twins") and _fork({**order, "log": order["log"] + ".twin"}, reader, writer)
    child = _fork(order, reader, writer)
    os.close(writer)
    deadline = started + order.get("kill_after", 300)
    code = None
    while code is None:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
        elif time.monotonic() >= deadline:
            os.kill(child, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        else:
            time.sleep(0.002)
    if twin:
        code = max(code, os.waitstatus_to_exitcode(os.waitpid(twin, 0)[1]))
    with os.fdopen(reader, "rb") as pipe:
        operations = len(pipe.read())
    return {"code": code, "seconds": time.monotonic() - started, "operations": operations}


def _fork(order: dict[str, Any], reader: int, writer: int) -> int:
    child = os.fork()
    if child == 0:
        os.close(reader)
        _work(order, writer)
    return child


def _work(order: dict[str, Any], pipe: int) -> None:
    os.chdir(order["folder"])
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if "file_bytes" in order:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_bytes"],) * 2)
    if "spare_bytes" in order:
        with open("/proc/self/statm", encoding="ascii") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + order["spare_bytes"],) * 2)
    if "clock" in order:
        real, jumps = time.time, itertools.count()
        time.time = lambda: real() + order["clock"] * next(jumps)
    operations = 0

    def count(event: str, arguments: tuple) -> None:
        nonlocal operations
        is_write = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event not in _CHANGES and not is_write:
            return
        operations += 1
        os.write(pipe, b".")
        if operations == order.get("kill_at"):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    from subspace3d.cli import main as command_line

    code = 0
    try:
        import torch

        torch.set_num_threads(1)
        command_line(order["arguments"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1 if end.code else 0
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 70
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
