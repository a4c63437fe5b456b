"""``subspace3d bench linear``: forward and backward of one linear layer with every adapter, at VGGT's shapes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from subspace3d.bench import harness
from subspace3d.bench.config import BenchConfig
from subspace3d.bench.peers import LIMITS, PEERS, Peer, Problem, admitted, label, make_problem
from subspace3d.bench.shapes import SHAPES, TOKENS_PER_VIEW, LinearShape
from subspace3d.progress import Progress

CHECKED_TOKENS = 512
"""On a CPU, where float64 is slow, the peers are checked on this many tokens."""
PYTHON_PEERS = ("frozen", "fold", "factored", "lora", "lora-xs", "tinylora")
"""Peers whose cost of Python and dispatch is measured: those that run in any size on any device."""
GPU_PEERS = ("lora-compiled", "fold-separate")
"""Left out on a CPU unless asked for: compiling takes minutes there, and a CPU folds without the bases anyway."""
PYTHON_SIZE = 16
"""Width of the layers with which that is done."""


def run(config: BenchConfig, device: torch.device, precision: str) -> list[dict[str, Any]]:
    names = list(config.peers) or [name for name in PEERS if name not in GPU_PEERS or device.type == "cuda"]
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise ValueError(f"peers must be among {', '.join(PEERS)}, got {', '.join(unknown)}")
    if "frozen" not in names:
        names.insert(0, "frozen")
    cases = [(views, shape, core) for views in config.views for shape in config.shapes for core in config.cores]
    rows: list[dict[str, Any]] = []
    with Progress("bench linear", len(cases), "case") as progress:
        for views, shape, core in cases:
            rows += _case(config, SHAPES[shape], views, core, names, device, precision)
            progress.advance(note=f"{shape}, {views} views, K = {core}")
    timed = dict.fromkeys(row["peer"] for row in rows if "seconds" in row)
    python = python_cost([name for name in PYTHON_PEERS if name in timed], precision, device)
    for row in rows:
        row["python_us"], row["python_kept_us"] = python.get(row["peer"], (None, None))
    print(_tables(rows, python))
    return rows


def _case(
    config: BenchConfig,
    shape: LinearShape,
    views: int,
    core: int,
    names: list[str],
    device: torch.device,
    precision: str,
) -> list[dict[str, Any]]:
    tokens = views * TOKENS_PER_VIEW
    problem = make_problem(shape.in_features, shape.out_features, tokens, core, config.rank, precision, device)
    common = {
        "benchmark": "linear", "shape": shape.name, "in": shape.in_features, "out": shape.out_features,
        "views": views, "tokens": tokens, "K": core, "r": config.rank, "precision": precision, "clock": config.clock,
    }  # fmt: skip
    rows: dict[str, dict[str, Any]] = {}
    peers: dict[str, Peer] = {}
    checked = tokens if device.type == "cuda" else min(tokens, CHECKED_TOKENS)
    for name, peer, found in admitted(problem, names, checked):
        rows[name] = {**common, "peer": name, "errors": found}
        if isinstance(peer, str):
            rows[name]["excluded"] = peer
        else:
            peers[name] = peer
    steps = {name: training_step(problem, peer) for name, peer in peers.items()}
    for name, peer in peers.items():
        saved = harness.saved_for_backward(_forward(problem, peer), peer.owned, tokens)
        rows[name] |= {
            "trained": sum(value.numel() for value in peer.trained.values()),
            "saved_bytes": saved.activations,
            "saved_bytes_per_token": saved.activations / tokens,
            "saved_weight_bytes": saved.weights,
            "peak_bytes": harness.peak_bytes(steps[name], device),
        }
    least = 0.02 if device.type == "cuda" else 0.005
    rounds = config.rounds_on(device.type)
    for name, timing in harness.measure(steps, "frozen", device, rounds, least, config.clock).items():
        rows[name] |= timing.fields()
    if device.type == "cuda":
        _add_graph_times(rows, steps, device, rounds, least)
    return list(rows.values())


def _forward(problem: Problem, peer: Peer):
    x = problem.x.detach().requires_grad_()

    def forward():
        peer.begin_step()
        with problem.autocast():
            return peer.forward(x)

    return forward


def training_step(problem: Problem, peer: Peer, optimizer_step: bool = True) -> harness.Step:
    """Forward and backward of the layer, with what an optimiser step before them makes necessary."""
    forward = _forward(problem, peer)
    dy = problem.dy.to(forward().dtype)
    x = problem.x.detach().requires_grad_()
    leaves = [x, *peer.trained.values()]

    def step() -> None:
        if optimizer_step:
            peer.begin_step()
        with problem.autocast():
            y = peer.forward(x)
        y.backward(dy)
        for leaf in leaves:
            leaf.grad = None

    return step


def _add_graph_times(
    rows: dict[str, dict[str, Any]], steps: Mapping[str, harness.Step], device: torch.device, rounds: int, least: float
) -> None:
    graphs = {}
    for name, step in steps.items():
        try:
            graphs[name] = harness.as_graph(step)
        except RuntimeError as error:
            rows[name]["graph_excluded"] = (str(error).splitlines() or [""])[0][:160]
    if "frozen" in graphs:
        for name, timing in harness.measure(graphs, "frozen", device, rounds, least).items():
            rows[name] |= timing.fields("graph_")


def python_cost(names: list[str], precision: str, device: torch.device) -> dict[str, tuple[float, float]]:
    """Microseconds of one step of a layer so small that only Python and dispatch count; best of fifteen.

    Returns:
        for each peer the step after an optimiser step, and one without (gradient accumulation, recomputation).
    """
    problem = make_problem(PYTHON_SIZE, PYTHON_SIZE, 4, 4, 4, precision, device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        peers = {name: PEERS[name](problem) for name in names}
        return {
            name: (
                _least_microseconds(training_step(problem, peer)),
                _least_microseconds(training_step(problem, peer, optimizer_step=False)),
            )
            for name, peer in peers.items()
        }
    finally:
        torch.set_num_threads(threads)


def _least_microseconds(step: harness.Step, repeats: int = 100) -> float:
    """Processor time: one thread works, and whatever else runs on the machine must not count."""
    for _ in range(repeats // 3):
        step()
    best = float("inf")
    for _ in range(15):
        start = time.process_time()
        for _ in range(repeats):
            step()
        best = min(best, (time.process_time() - start) / repeats)
    return 1e6 * best


# ---- tables ----------------------------------------------------------------------------------------------------------
def _tables(rows: list[dict[str, Any]], python: Mapping[str, tuple[float, float]]) -> str:
    parts = []
    for views, core in dict.fromkeys((row["views"], row["K"]) for row in rows):
        chosen = [row for row in rows if (row["views"], row["K"]) == (views, core)]
        parts.append(_one_table(chosen, python))
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if "excluded" in row:
            reasons.setdefault(f"{label(row['peer'], row['K'], row['r'])}: {row['excluded']}", []).append(row["shape"])
    if reasons:
        lines = [f"  {reason} ({', '.join(dict.fromkeys(shapes))})" for reason, shapes in reasons.items()]
        parts.append("not timed:\n" + "\n".join(lines))
    return "\n\n".join(parts)


def _one_table(rows: list[dict[str, Any]], python: Mapping[str, tuple[float, float]]) -> str:
    first = rows[0]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    frozen_total = sum(row["seconds"] for row in rows if row["peer"] == "frozen")
    lines = []
    for name in dict.fromkeys(row["peer"] for row in rows):
        of_peer = {row["shape"]: row for row in rows if row["peer"] == name and "seconds" in row}
        if len(of_peer) < len(shapes):
            continue
        total = sum(row["seconds"] for row in of_peer.values())
        lines.append(
            [
                label(name, first["K"], first["r"]),
                *(f"{of_peer[shape]['ratio']:.2f}" for shape in shapes),
                f"{total / frozen_total:.3f}",
                f"{1e3 * total:.1f}",
                f"{sum(row['saved_bytes_per_token'] for row in of_peer.values()):.0f}",
                f"{sum(row['trained'] for row in of_peer.values()):,}",
                *(f"{cost:.0f}" for cost in python.get(name, ())),
            ]
        )
    title = (
        f"{first['views']} views ({first['tokens']:,} tokens), {first['precision']}, forward + backward, fold included;"
        f" ratio to the frozen linear of the same round, median of {rows[0]['rounds']} rounds, {first['clock']} time"
    )
    header = ["", *shapes, "all", "ms", "saved B/token", "trained", "Python us", "fold kept"]
    worst = max(value for row in rows for value in row["errors"].values()) if rows else 0.0
    note = (
        f"largest relative error against float64 among those timed: {worst:.1e} (limit {LIMITS[first['precision']]:g})"
    )
    return f"{title}\n{harness.table(header, lines)}\n{note}"
