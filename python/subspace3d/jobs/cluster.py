"""The jobs of `subspace3d.jobs.pool` as tasks of a Ray cluster, whose machines share the folders of the run."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from subspace3d import __version__
from subspace3d.jobs.options import ClusterOptions
from subspace3d.jobs.work import Work, describe, describe_failures, failed_parts, sigterm_exits
from subspace3d.locks import FolderInUse

RETRIES = 3
"""How often a job is started again because the process or the machine it ran on died."""
_LET_GO_S = 60  # a process whose machine's Ray died may go on for seconds, holding its folder
_CANCEL_S = 60  # for a checkpoint, when the run is stopped

Result = TypeVar("Result")


@contextlib.contextmanager
def joined_cluster(config: ClusterOptions, on_cpu: bool = False) -> Iterator[Cluster | None]:
    """Join the cluster at ``config.ray`` and leave it at the end; none without an address.

    Args:
        config (ClusterOptions): address and needs; no ``ray_gpus``: one GPU where the cluster has any.
        on_cpu (bool): the jobs use none unless ``ray_gpus`` says so.

    Raises:
        ValueError: no cluster there, or no machine of it has what one job needs.
        ModuleNotFoundError: ray is not installed.
    """
    if not config.ray:
        yield None
        return
    import ray

    try:
        ray.init(address=config.ray, log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ValueError(f"ray: no cluster answers at {config.ray!r}: {describe(error)}") from error
    try:
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = config.ray_gpus
        if gpus is None:
            gpus = 1.0 if not on_cpu and any(machine.get("GPU", 0) >= 1 for machine in machines) else 0.0
        if not any(m.get("CPU", 0) >= config.ray_cpus and m.get("GPU", 0) >= gpus for m in machines):
            have = ", ".join(f"{m.get('CPU', 0):g} and {m.get('GPU', 0):g}" for m in machines)
            raise ValueError(
                "ray_cpus and ray_gpus must be what one machine of the cluster has, got "
                f"{config.ray_cpus} and {gpus:g}; the machines have {have}"
            )
        yield Cluster(config.ray_cpus, gpus)
    finally:
        ray.shutdown()


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A cluster this process has joined, and the cores and GPUs that one job takes of it."""

    cpus: int
    gpus: float

    @property
    def device(self) -> str:
        """Where a job computes: on the CPU if it asked for no GPU, for it may still see those of its machine."""
        return "auto" if self.gpus else "cpu"

    def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """``function(*arguments)`` on a machine that could do a job.

        Raises:
            ValueError: the function raised an exception, or the machine died; with the message.
        """
        import ray

        try:
            kind, value = ray.get(self._remote(_call).remote(__version__, function, arguments))
        except ray.exceptions.RayError as error:
            raise ValueError(f"ray: {_first_line(error)}") from error
        if kind == "failed":
            raise ValueError(value)
        return value

    def run_jobs(
        self,
        names: Sequence[str],
        setup: Callable[[Any, int], Work],
        argument: Any,
        done: Callable[[str], object],
        recycle: int = 0,
        take: Callable[[str, Any], object] = lambda name, result: None,
    ) -> dict[str, str]:
        """`pool.run_jobs` on the cluster.

        ``setup(argument, 0)`` is called once per process, Ray keeps processes for further jobs. A job is started again,
        three times at most, when the process or the machine it ran on dies; one that raises an exception is not. When
        this process is stopped, jobs under way are asked to stop and given a minute.
        """
        import ray

        shared = ray.put(argument)
        task = self._remote(_job, max_retries=RETRIES, max_calls=recycle)
        # processes outlive a run, so what setup made is kept under a key that no other run has
        run = f"{time.time_ns()}-{ray.get_runtime_context().get_job_id()}"
        pending = {task.remote(run, __version__, setup, shared, name): name for name in names}
        failures: dict[str, str] = {}
        with sigterm_exits():
            try:
                while pending:
                    (ready,), _ = ray.wait(list(pending), num_returns=1)
                    name = pending.pop(ready)
                    try:
                        kind, message = ray.get(ready)
                    except ray.exceptions.RayError as error:
                        kind, message = "failed", {name: _first_line(error)}
                    if kind == "no start":
                        raise ValueError(message)
                    if kind == "failed":
                        failures |= message
                    else:
                        take(name, message)
                    done(name)
            finally:
                for reference in pending:
                    ray.cancel(reference)
                if pending:
                    ray.wait(list(pending), num_returns=len(pending), timeout=_CANCEL_S)
        return failures

    def _remote(self, function: Callable, **options: Any) -> Any:
        import ray

        return ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, **options)(function)


def absolute(config: Any, *names: str) -> Any:
    """``config`` with the paths of these fields made absolute: processes on a cluster start elsewhere."""

    def resolved(value: Any) -> Any:
        return tuple(map(resolved, value)) if isinstance(value, tuple) else value and Path(value).resolve()

    return dataclasses.replace(config, **{name: resolved(getattr(config, name)) for name in names})


# ---- on the machines of the cluster ----------------------------------------------------------------------------------

_works: dict[str, Work] = {}
"""What setup returned in this process, by run."""


def _call(version: str, function: Callable[..., Any], arguments: tuple) -> tuple[str, Any]:
    try:
        _check_version(version)
        return "done", function(*arguments)
    except Exception as error:
        return "failed", describe(error)


def _job(run: str, version: str, setup: Callable[[Any, int], Work], argument: Any, name: str) -> tuple[str, Any]:
    """What a job returned, or raised: as a message, because exceptions of other packages need not survive the way."""
    deadline = time.monotonic() + _LET_GO_S
    while True:
        if run not in _works:
            _works.clear()
            try:
                _check_version(version)
                _works[run] = setup(argument, 0)
            except Exception as error:
                return "no start", describe(error)
        try:
            return "done", _works[run](name)
        except Exception as error:
            _works.clear()  # a job that failed may have left anything behind
            in_use = any(isinstance(part, FolderInUse) for part in failed_parts(name, error).values())
            if not in_use or time.monotonic() > deadline:
                return "failed", describe_failures(name, error)
        time.sleep(1)


def _check_version(version: str) -> None:
    if version != __version__:
        raise ValueError(f"ray: every machine must have subspace3d {version}, one has {__version__}")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
