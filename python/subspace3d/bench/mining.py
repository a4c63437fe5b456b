"""``subspace3d bench mining``: the 192 aggregator matrices of VGGT-1B, beside the dense definition and the reference.

The dense route forms every update [out, in] and decomposes their weighted mean, on the taller side. One iteration of it
is measured on a few matrices and scaled to all layers and iterations; the names of such figures say so. On the same
matrices, in float64 from input to output, the mined subspace is compared with that iteration. The reference is the same
algorithm in plain PyTorch, on the cores of one matrix.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import subspace_ext as se
from subspace3d import system
from subspace3d.bench import harness
from subspace3d.bench.config import BenchConfig
from subspace3d.bench.shapes import SHAPES, LinearShape
from subspace3d.progress import Progress
from subspace_ext.ops.irls_ref import irls_ref

NOISE = 0.7
"""Of every adapter, beside a shared part of one."""
OUTLIER = 3.0
"""By how much the first adapter is too large."""
AGREEMENT = 1e-9


def run(config: BenchConfig, device: torch.device, precision: str) -> list[dict[str, Any]]:
    if config.sweep:
        rows = _sweep(config, device)
        print(_sweep_table(rows))
        return rows
    cases = [(spectrum, SHAPES[name]) for spectrum in config.spectra for name in config.shapes]
    rows = []
    with Progress("bench mining", len(cases), "case") as progress:
        for spectrum, shape in cases:
            rows.append(_case(config, spectrum, shape, device))
            progress.advance(note=f"{spectrum} {shape.name}")
    for spectrum in config.spectra:
        print(_table([row for row in rows if row["spectrum"] == spectrum]))
    return rows


def make_adapters(
    layers: int, adapters: int, rank: int, shape: LinearShape, device: torch.device, spectrum: str = "planted"
) -> tuple[Tensor, Tensor]:
    """lora_b [L, N, out, r] and lora_a [L, N, r, in], float32.

    "planted": both factors are a shared part and noise, the first adapter too large. "drift": lora_a is random, lora_b
    half shared. "unrelated": both are random.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(layers, *size, generator=generator, device=device)

    shared_b, own_b = normal(1, shape.out_features, rank), normal(adapters, shape.out_features, rank)
    shared_a, own_a = normal(1, rank, shape.in_features), normal(adapters, rank, shape.in_features)
    if spectrum == "planted":
        lora_b, lora_a = shared_b + NOISE * own_b, shared_a + NOISE * own_a
        lora_b[:, 0] *= OUTLIER
        return lora_b, lora_a
    return (shared_b + own_b if spectrum == "drift" else own_b), own_a


def _mine_seconds(config: BenchConfig, lora_b: Tensor, lora_a: Tensor) -> tuple[float, se.MinedSubspace]:
    def mine() -> se.MinedSubspace:
        mined = se.mine_subspace(lora_b, lora_a, config.k, config.model, max_iter=config.iterations, tol=0.0)
        mined.converged.cpu()  # waits for a GPU
        return mined

    if lora_b.device.type == "cuda":
        mine()
    now = harness.CLOCKS[config.clock]
    start = now()
    mined = mine()
    return now() - start, mined


def _reference_seconds(config: BenchConfig, lora_b: Tensor, lora_a: Tensor) -> float:
    """Of the loop in plain PyTorch for the first layer, without the reduction to its core."""
    now = harness.CLOCKS[config.clock]
    stacked_b, stacked_a = lora_b[0].transpose(0, 1).flatten(1).double(), lora_a[0].flatten(0, 1).double().T
    rb, ra = (torch.linalg.qr(side, mode="r").R[None] for side in (stacked_b, stacked_a))
    start = now()
    irls_ref(rb, ra, lora_b.shape[1], config.k, 1.0, 1e-3, config.iterations, 0.0, config.model)
    return now() - start


def _case(config: BenchConfig, spectrum: str, shape: LinearShape, device: torch.device) -> dict[str, Any]:
    lora_b, lora_a = make_adapters(config.layers, config.adapters, config.rank, shape, device, spectrum)
    seconds, mined = _mine_seconds(config, lora_b, lora_a)
    row: dict[str, Any] = {
        "benchmark": "mining", "peer": "subspace", "model": config.model, "spectrum": spectrum, "shape": shape.name,
        "in": shape.in_features, "out": shape.out_features, "layers": config.layers, "N": config.adapters,
        "r": config.rank, "k": config.k, "iterations": config.iterations, "clock": config.clock, "seconds": seconds,
        "iterations_done": float(mined.n_iter.double().mean()),
        "reference_seconds_a_matrix": _reference_seconds(config, lora_b, lora_a),
    }  # fmt: skip
    if config.dense and config.model == "mean":
        count = min(config.dense, config.layers)
        exact_b, exact_a = lora_b[:count].double(), lora_a[:count].double()
        _, mined = _mine_seconds(config, exact_b, exact_a)
        step, error = dense_iteration(exact_b, exact_a, mined, config.k, config.clock)
        row |= {
            "dense_matrices": count,
            "dense_iteration_seconds": step,
            "dense_scaled_seconds": step * (config.iterations + 1) * config.layers,
            "error": error,
        }
    if device.type == "cpu":
        row["peak_memory_bytes"] = system.peak_resident_bytes()
    return row


def dense_iteration(lora_b: Tensor, lora_a: Tensor, mined: se.MinedSubspace, k: int, clock: str) -> tuple[float, float]:
    """One iteration of the dense definition from the mined weights, in float64.

    Returns:
        seconds a matrix (the updates themselves are formed once and not counted), and the largest relative error of
        u v^T, of the residuals and of the k leading singular values against it.
    """
    now = harness.CLOCKS[clock]
    error = seconds = 0.0
    for layer in range(len(lora_b)):
        deltas = lora_b[layer] @ lora_a[layer]
        if deltas.shape[1] < deltas.shape[2]:
            deltas = deltas.mT.contiguous()  # the SVD of a tall matrix is up to twice as fast
        start = now()
        weights = mined.weights[layer]
        mean = torch.tensordot(weights / weights.sum(), deltas, 1)
        left, values, right = torch.linalg.svd(mean, full_matrices=False)
        fit = (left[:, :k] * values[:k]) @ right[:k]
        residuals = (deltas - fit).flatten(1).norm(dim=1)
        seconds += now() - start
        product = mined.u[layer] @ mined.v[layer].T
        if product.shape != fit.shape:
            product = product.T
        pairs = (
            (product, fit),
            (mined.residuals[layer], residuals),
            (mined.singular_values[layer, :k], values[:k]),
        )
        error = max(error, *(float((got - want).norm() / want.norm()) for got, want in pairs))
    return seconds / len(lora_b), error


def _table(rows: list[dict[str, Any]]) -> str:
    def cells(name: str, matrices: int, seconds: float, reference: float, dense: float | None) -> list[str]:
        found = [name, str(matrices), f"{seconds:.2f}", f"{1e3 * seconds / matrices:.0f}", f"{1e3 * reference:.0f}"]
        return found + ([] if dense is None else [f"{dense:,.0f}", f"{dense / seconds:,.0f}"])

    lines = []
    for row in rows:
        dense = row.get("dense_scaled_seconds")
        name = f"{row['shape']} {row['out']}x{row['in']}"
        lines.append(cells(name, row["layers"], row["seconds"], row["reference_seconds_a_matrix"], dense))
        lines[-1] += [f"{row['error']:.1e}"] if "error" in row else []
    compared = [row for row in rows if "error" in row]
    matrices, seconds = (sum(row[key] for row in rows) for key in ("layers", "seconds"))
    reference = sum(row["reference_seconds_a_matrix"] for row in rows) / len(rows)
    scaled = sum(row["dense_scaled_seconds"] for row in rows) if len(compared) == len(rows) else None
    lines.append(cells("all", matrices, seconds, reference, scaled))
    lines[-1] += [f"{max(row['error'] for row in rows):.1e}"] if len(compared) == len(rows) else []
    first = rows[0]
    sizes = f"N = {first['N']}, r = {first['r']}, k = {first['k']}, {first['iterations']} iterations"
    title = f"mining one attribute, {first['spectrum']}, model {first['model']}: {sizes}, {first['clock']} time"
    header = ["", "matrices", "s", "ms/matrix", "reference", "dense s (scaled)", "times faster", "error"]
    notes = ["reference: ms a matrix of the loop in plain PyTorch"]
    if compared:
        count = compared[0]["dense_matrices"]
        notes.append(f"dense: {count} matrices of each shape, float64; error: the largest relative one against it")
    if any(row["error"] > AGREEMENT for row in compared):
        notes.append(f"NOT EQUAL to the dense definition within {AGREEMENT:g}")
    if "peak_memory_bytes" in first:
        notes.append(f"peak memory of the process: {max(row['peak_memory_bytes'] for row in rows) / 2**30:.2f} GiB")
    return "\n".join([title, harness.table(header[: max(map(len, lines))], lines), *notes])


# ---- growth ----------------------------------------------------------------------------------------------------------
def _sweep(config: BenchConfig, device: torch.device) -> list[dict[str, Any]]:
    """Layers at fixed N and r, then N and r at fixed layers, on the first shape; the best of three runs each."""
    shape = SHAPES[config.shapes[0]]
    few = max(2, config.layers // 8)
    cases = [("layers", layers, config.adapters, config.rank) for layers in (few, 2 * few, 4 * few, 8 * few)]
    cases += [("N r", few, max(1, config.adapters * factor // 4), config.rank) for factor in (2, 4, 8)]
    cases += [("N r", few, config.adapters, config.rank * 2)]
    rows = []
    with Progress("bench mining --sweep", len(cases), "case") as progress:
        for varies, layers, adapters, rank in cases:
            lora_b, lora_a = make_adapters(layers, adapters, rank, shape, device, config.spectra[0])
            seconds = min(_mine_seconds(config, lora_b, lora_a)[0] for _ in range(3))
            rows.append(
                {
                    "benchmark": "mining-sweep",
                    "peer": "subspace",
                    "model": config.model,
                    "spectrum": config.spectra[0],
                    "shape": shape.name,
                    "varies": varies,
                    "layers": layers,
                    "N": adapters,
                    "r": rank,
                    "k": config.k,
                    "iterations": config.iterations,
                    "clock": config.clock,
                    "seconds": seconds,
                }
            )
            progress.advance()
    return rows


def growth(rows: list[dict[str, Any]], varies: str) -> float:
    """Slope of log seconds over log size, least squares."""
    chosen = [row for row in rows if row["varies"] == varies]
    points = [
        (math.log(row["layers"] if varies == "layers" else row["N"] * row["r"]), math.log(row["seconds"]))
        for row in chosen
    ]
    mean_x, mean_y = (sum(point[axis] for point in points) / len(points) for axis in (0, 1))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def _sweep_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        [row["varies"], str(row["layers"]), str(row["N"]), str(row["r"]), str(row["N"] * row["r"]),
         f"{row['seconds']:.3f}", f"{1e3 * row['seconds'] / row['layers']:.1f}"]
        for row in rows
    ]  # fmt: skip
    table = harness.table(["varies", "layers", "N", "r", "N r", "s", "ms/layer"], lines)
    exponents = ", ".join(f"({varies})^{growth(rows, varies):.2f}" for varies in ("layers", "N r"))
    return f"{table}\ntime grows like {exponents}"
