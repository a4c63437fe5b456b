"""Independent jobs in a bounded number of processes: one that fails does not keep the others from finishing."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from subspace3d import system
from subspace3d.jobs.work import Work, describe, describe_failures, sigterm_exits
from subspace3d.log import leave_out_the_irrelevant

if TYPE_CHECKING:
    from subspace3d.jobs.cluster import Cluster


def run_jobs(
    names: Sequence[str],
    setup: Callable[[Any, int], Work],
    argument: Any,
    workers: int,
    done: Callable[[str], object] = lambda name: None,
    recycle: int = 0,
    cluster: Cluster | None = None,
    take: Callable[[str, Any], object] = lambda name, result: None,
) -> dict[str, str]:
    """Call ``setup(argument, worker)`` once per process and the function it returns once for every name.

    A process that fails at a job, or dies of it, is replaced by a new one. When this process is stopped (SIGINT,
    SIGTERM) the others are asked to stop and waited for; when it is killed, they end at once.

    Jobs must be idempotent: a cluster starts a job again when the machine it ran on dies.

    Args:
        names (Sequence[str]): one per job.
        setup (Callable): a module-level function; its worker number counts from 0 to ``workers`` - 1.
        argument (Any): handed to ``setup``.
        workers (int): most processes at a time.
        done (Callable): called with the name of every job that ended, well or not.
        recycle (int): a process is replaced after so many jobs, which bounds its memory; 0: never.
        cluster (Cluster | None): do the jobs there instead, see `subspace3d.jobs.cluster`; ``workers`` is not used.
        take (Callable): called, before ``done``, with the name of every job that went well and what it returned.

    Returns:
        dict: what went wrong, by name of the job, or of its parts where it raised `PartsFailed`.

    Raises:
        ValueError: ``setup`` itself failed; with its message.
    """
    if cluster is not None:
        return cluster.run_jobs(names, setup, argument, done, recycle, take)
    context = multiprocessing.get_context("spawn")
    waiting, failures = deque(names), dict[str, str]()
    busy: dict[Connection, tuple[Any, int, str]] = {}
    taken: dict[Connection, int] = {}

    def start(worker: int) -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, setup, argument, worker), name=f"worker {worker}")
        process.start()
        theirs.close()
        assign(ours, process, worker)

    def assign(connection: Connection, process: Any, worker: int) -> None:
        busy[connection] = (process, worker, waiting.popleft())
        taken[connection] = taken.get(connection, 0) + 1
        # to one that has died since: `recv` below finds out
        with contextlib.suppress(ConnectionError):
            connection.send(busy[connection][2])

    with _terminate_at_end(busy):
        for worker in range(min(workers, len(names))):
            start(worker)
        while busy:
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                process, worker, name = busy.pop(ready)
                try:
                    kind, message = ready.recv()
                except (EOFError, ConnectionError):  # reset: it died before it took the name
                    process.join()
                    hint = ", out of memory?" if process.exitcode == system.KILLED else ""
                    kind, message = "failed", {name: f"its process died (exit code {process.exitcode}{hint})"}
                if kind == "no start":
                    raise ValueError(message)
                if kind == "failed":
                    failures |= message
                else:
                    take(name, message)
                done(name)
                if waiting and kind == "done" and taken[ready] != recycle:
                    assign(ready, process, worker)
                    continue
                del taken[ready]
                ready.close()
                process.join()
                if waiting:
                    start(worker)
    return failures


def run_here(
    names: Sequence[str],
    setup: Callable[[Any, int], Work],
    argument: Any,
    done: Callable[[str], object] = lambda name: None,
) -> dict[str, str]:
    """`run_jobs` in this process, one job after the other; ``setup`` is called anew after a job that failed."""
    failures: dict[str, str] = {}
    work = setup(argument, 0)
    for number, name in enumerate(names, 1):
        try:
            work(name)
        except Exception as error:
            failures |= describe_failures(name, error)
            if number < len(names):
                work = setup(argument, 0)
        done(name)
    return failures


def _serve(connection: Connection, setup: Callable[[Any, int], Work], argument: Any, worker: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    leave_out_the_irrelevant()
    # closed by the parent: no more jobs; interrupted: the parent reports it
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        name = connection.recv()
        try:
            work = setup(argument, worker)
        except Exception as error:
            connection.send(("no start", describe(error)))
            return
        while True:
            try:
                result = work(name)
            except Exception as error:
                connection.send(("failed", describe_failures(name, error)))
                return
            connection.send(("done", result))
            name = connection.recv()


def _end_with_parent() -> None:
    """End this process at once when the one that started it is gone; for a thread of its own."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextlib.contextmanager
def _terminate_at_end(busy: dict[Connection, tuple[Any, int, str]]) -> Iterator[None]:
    with sigterm_exits():
        try:
            yield
        finally:
            for process, _, _ in busy.values():
                process.terminate()
            for process, _, _ in busy.values():
                process.join()
