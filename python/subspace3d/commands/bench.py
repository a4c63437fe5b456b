"""Run one benchmark and keep its rows."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from subspace3d import outputs
from subspace3d.bench.config import BenchConfig
from subspace3d.log import logger

if TYPE_CHECKING:
    import torch


def run(config: BenchConfig) -> list[dict[str, Any]]:
    """Measure, print the table, append the rows to OUT/<device>.jsonl.

    Raises:
        ValueError: a device or precision that is not there.
    """
    import torch

    from subspace3d.bench import harness

    config = outputs.check(config)
    device = _device(config.device)
    precision = config.precision
    if precision == "auto":
        precision = "autocast" if device.type == "cuda" else "fp32"
    logger.info(f"{harness.device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    # one module a benchmark, so that mining needs no PEFT
    benchmark = importlib.import_module(f"subspace3d.bench.{config.benchmark}")
    origin = harness.provenance(device)
    rows = [{**row, **origin} for row in benchmark.run(config, device, precision)]
    if config.out is not None:
        path = harness.append_rows(config.out, rows)
        logger.info(f"{len(rows)} rows appended to {path}")
    return rows


def _device(name: str) -> torch.device:
    import torch

    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError("device must be cpu on this machine, got 'cuda': torch sees no GPU")
    return torch.device("cuda" if available and name != "cpu" else "cpu")
