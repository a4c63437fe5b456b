"""Time all metrics of one large scene: by default 8 views of 518 x 518, 2.1 million points on either side.

python benchmarks/cloud_metrics.py [--views 8] [--size 518] [--noise 0.02] [--threads 2] [--out FILE]

The scene is a rippled wall in closed form, seen from an arc; the prediction is its depth with smooth and with pixel
noise, in another unit, from cameras that are a little off. Wall seconds say how long a user waits, CPU seconds are what
they cost, imports left out; measure on a machine that does nothing else. The aim is 5 seconds on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np


def main() -> None:
    arguments = parse_arguments()
    # read by OpenMP when Open3D and torch are imported below
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    import scipy.spatial  # noqa: F401  # 1 s once a process, so not of a scene

    from subspace3d.evaluation import scene_metrics

    true, pred = scene(arguments.views, arguments.size, arguments.noise)
    parts: dict[str, list[float]] = {}
    for name in ("_measure_depth", "_measure_points", "umeyama", "icp", "surface_distances", "_measure_cameras"):
        setattr(scene_metrics, name, timed(parts, getattr(scene_metrics, name)))
    started = time.perf_counter(), time.process_time()
    result = scene_metrics.measure(pred, true, icp_threshold=0.1)
    seconds, cpu = time.perf_counter() - started[0], time.process_time() - started[1]
    record = {
        "benchmark": "cloud_metrics", "views": arguments.views, "size": arguments.size, "noise": arguments.noise,
        "points": result.details["points"], "seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2),
        "parts": {name.lstrip("_"): [round(value, 2) for value in values] for name, values in parts.items()},
        "threads": arguments.threads, "machine": machine(), "open3d": version("open3d"), "scipy": version("scipy"),
        "accuracy": result.metrics["accuracy"], "completeness": result.metrics["completeness"],
    }  # fmt: skip
    print(json.dumps(record, indent=1))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        with open(arguments.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--views", type=int, default=8)
    parser.add_argument("--size", type=int, default=518, help="height and width in pixels")
    parser.add_argument("--noise", type=float, default=0.02, help="relative error of the predicted depth")
    parser.add_argument("--threads", type=int, default=2, help="cores the process may use")
    parser.add_argument("--out", type=Path, help="append the record to this JSON-lines file")
    return parser.parse_args()


def timed(parts: dict[str, list[float]], function: Callable) -> Callable:
    """``function`` that adds the wall seconds of each of its calls to ``parts``."""

    @wraps(function)
    def wrapper(*values: Any, **named: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*values, **named)
        finally:
            parts.setdefault(function.__name__, []).append(time.perf_counter() - started)

    return wrapper


def scene(views: int, size: int, noise: float) -> tuple[Any, Any]:
    """True and predicted views of the surface z = 3 + ripples, by a few steps of ray and surface intersection."""
    from subspace3d.evaluation.scene_metrics import Views

    rng = np.random.default_rng(0)
    intrinsic = np.array([[1.1 * size, 0, size / 2], [0, 1.1 * size, size / 2], [0, 0, 1.0]])
    axis = np.arange(size) + 0.5
    rays = np.stack([*np.meshgrid(axis, axis), np.ones((size, size))], axis=-1) @ np.linalg.inv(intrinsic).T
    depths, extrinsics = [], []
    for angle in np.linspace(-0.4, 0.4, views):
        turn = np.array([[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]])
        centre = np.array([-3 * np.sin(angle), 0.2 * angle, 3 - 3 * np.cos(angle)])
        directions = rays @ turn.T
        depth = np.full((size, size), 3.0)
        for _ in range(20):
            x, y = (centre[i] + depth * directions[..., i] for i in (0, 1))
            height = 3 + 0.2 * np.sin(2 * x + 1) * np.cos(3 * y) + 0.1 * x * y
            depth = (height - centre[2]) / directions[..., 2]
        depths.append(depth)
        extrinsics.append(np.concatenate([turn.T, (-turn.T @ centre)[:, None]], axis=1))
    true = Views(np.stack(depths), np.repeat(intrinsic[None], views, 0), np.stack(extrinsics))
    smooth = np.sin(4 * rays[..., 0] + np.arange(views)[:, None, None])
    error = 1 + noise * (0.5 * smooth + 0.5 * rng.standard_normal(true.depths.shape))
    moved = true.extrinsics.copy()
    moved[:, :, 3] = (moved[:, :, 3] + noise * rng.standard_normal((views, 3))) / 3
    return true, Views(true.depths * error / 3, true.intrinsics, moved)


def machine() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
