"""Time the mining of the 192 aggregator matrices of VGGT-1B for one attribute, beside the dense definition.

python benchmarks/mining.py [--layers 48] [--dense 1] [--out benchmarks/results/cpu.jsonl]

The adapters are random factors around a shared part (share 1 : 0.7 of noise). The dense route forms every update
[out, in] and decomposes the weighted mean itself; it is measured on ``--dense`` matrices of each shape and one
iteration, and scaled to the layers and iterations of the other: that figure is marked as scaled.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

import subspace_ext as se

SHAPES = {"qkv": (3072, 1024), "proj": (1024, 1024), "fc1": (4096, 1024), "fc2": (1024, 4096)}  # out, in


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(0)
    rows, seconds, dense_seconds = [], 0.0, 0.0
    for name, (out, into) in SHAPES.items():
        lora_b, lora_a = adapters(arguments.layers, arguments.N, arguments.r, out, into)
        start = time.perf_counter()
        mined = se.mine_subspace(lora_b, lora_a, arguments.k, max_iter=arguments.iterations, tol=0.0)
        taken = time.perf_counter() - start
        seconds += taken
        row = {"shape": f"{name} {out}x{into}", "layers": arguments.layers, "seconds": round(taken, 3)}
        if arguments.dense:
            step, error = dense_step(lora_b[: arguments.dense], lora_a[: arguments.dense], mined, arguments.k)
            scaled = step * (arguments.iterations + 1) * arguments.layers
            dense_seconds += scaled
            row |= {"dense_step_seconds": round(step, 3), "dense_scaled_seconds": round(scaled, 1), "error": error}
        rows.append(row)
        print(row, flush=True)
    record = {
        "benchmark": "mining",
        "N": arguments.N, "r": arguments.r, "k": arguments.k, "iterations": arguments.iterations,
        "seconds": round(seconds, 2),
        "dense_scaled_seconds": round(dense_seconds, 1) or None,
        "times_faster": round(dense_seconds / seconds, 1) if dense_seconds else None,
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "rows": rows,
        "command": " ".join(sys.argv),
        "device": cpu_name(), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "python": platform.python_version(), "commit": commit(),
    }  # fmt: skip
    print(json.dumps({key: value for key, value in record.items() if key != "rows"}, indent=1))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        with open(arguments.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=48, help="matrices of each shape")
    parser.add_argument("--N", type=int, default=10, help="adapters")
    parser.add_argument("--r", type=int, default=16, help="their rank")
    parser.add_argument("--k", type=int, default=16, help="rank of the subspace")
    parser.add_argument("--iterations", type=int, default=20, help="IRLS iterations, none saved by convergence")
    parser.add_argument("--dense", type=int, default=1, help="matrices of each shape for the dense route; 0: skip it")
    parser.add_argument("--out", type=Path, help="append the record to this JSON-lines file")
    return parser.parse_args()


def adapters(layers: int, count: int, rank: int, out: int, into: int) -> tuple[torch.Tensor, torch.Tensor]:
    """lora_b [L, N, out, r] and lora_a [L, N, r, in], float32; the first adapter is three times too large."""
    lora_b = torch.randn(layers, 1, out, rank) + 0.7 * torch.randn(layers, count, out, rank)
    lora_a = torch.randn(layers, 1, rank, into) + 0.7 * torch.randn(layers, count, rank, into)
    lora_b[:, 0] *= 3
    return lora_b, lora_a


def dense_step(lora_b: torch.Tensor, lora_a: torch.Tensor, mined: se.MinedSubspace, k: int) -> tuple[float, float]:
    """Seconds of one dense iteration of one matrix, and the relative error of u v^T against it at the final weights."""
    error, start = 0.0, time.perf_counter()
    for layer in range(len(lora_b)):
        deltas = lora_b[layer].double() @ lora_a[layer].double()
        weights = mined.weights[layer]
        mean = torch.tensordot(weights / weights.sum(), deltas, 1)
        left, values, right = torch.linalg.svd(mean, full_matrices=False)
        fit = (left[:, :k] * values[:k]) @ right[:k]
        (deltas - fit).flatten(1).norm(dim=1)
        product = mined.u[layer].double() @ mined.v[layer].double().T
        error = max(error, float((product - fit).norm() / fit.norm()))
    return (time.perf_counter() - start) / len(lora_b), error


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def commit() -> str:
    answer = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    return answer.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
