"""Mining by its definition: out x in matrices, one dense float64 SVD in every iteration, nothing shared with the op."""

import torch
from torch import Tensor


def dense_mining(lora_b: Tensor, lora_a: Tensor, k: int, p: float, eps: float, max_iter: int, tol: float) -> dict:
    """lora_b [N, out, r], lora_a [N, r, in], float64; the fields are those of MinedSubspace."""
    delta = lora_b.double() @ lora_a.double()
    norms = delta.flatten(1).norm(dim=1)
    smoothing = eps * torch.quantile(norms[norms > 0], 0.5)
    weights = torch.ones(len(delta), dtype=torch.float64)
    trace: list[float] = []
    finished = p == 2
    while True:
        mean = torch.tensordot(weights, delta, 1) / weights.sum()
        left, values, right = torch.linalg.svd(mean, full_matrices=False)
        fit = (left[:, :k] * values[:k]) @ right[:k]
        residuals = (delta - fit).flatten(1).norm(dim=1)
        trace.append(((smoothing**2 + residuals**2) ** (p / 2)).sum().item())
        if finished or len(trace) > max_iter:
            break
        updated = (smoothing**2 + residuals**2) ** (-(2 - p) / 2)
        old, new = weights / weights.sum(), updated / updated.sum()
        finished = bool(((new - old).abs() / old).max() <= tol)
        weights = updated
    return {
        "fit": fit,
        "left": left[:, :k],
        "singular_values": values,
        "weights": weights,
        "residuals": residuals,
        "objective": torch.tensor(trace, dtype=torch.float64),
        "n_iter": len(trace) - 1,
        "norms": norms,
    }


def dense_shared(lora_b: Tensor, lora_a: Tensor, k: int, p: float, eps: float, max_iter: int, tol: float) -> dict:
    """The shared subspace by its definition, on out x in matrices and by dense SVDs; u and v orthonormal."""
    delta = lora_b.double() @ lora_a.double()
    norms = delta.flatten(1).norm(dim=1)
    median = torch.quantile(norms[norms > 0], 0.5)
    smoothing = eps * median
    ratios = median / norms
    delta = ratios[:, None, None] * delta
    weights = torch.ones(len(delta), dtype=torch.float64)

    def leading(stack: Tensor) -> Tensor:
        left, values, _ = torch.linalg.svd(torch.cat(list(stack), dim=1), full_matrices=False)
        kept = values[:k] > max(stack.shape[0] * stack.shape[2], stack.shape[1]) * 2**-52 * values[0]
        return left[:, :k] * kept

    v = leading(weights.sqrt()[:, None, None] * delta.mT)
    u = torch.zeros(0)
    trace: list[float] = []
    smoothed = torch.zeros(0, dtype=torch.float64)
    while True:
        roots = weights.sqrt()[:, None, None]
        if trace:
            v = leading(roots * (delta.mT @ u))
        u = leading(roots * (delta @ v))
        cores = u.T @ delta @ v
        residuals = (delta - u @ cores @ v.T).flatten(1).norm(dim=1)
        before, smoothed = smoothed, smoothing**2 + residuals**2
        trace.append((smoothed ** (p / 2)).sum().item())
        finished = len(trace) > 1 and bool(((smoothed - before).abs() / before).max() <= tol)
        if finished or len(trace) > max_iter:
            break
        weights = smoothed ** (-(2 - p) / 2)
    return {
        "u": u,
        "v": v,
        "weights": weights,
        "residuals": residuals / ratios,
        "objective": torch.tensor(trace, dtype=torch.float64),
        "n_iter": len(trace) - 1,
        "norms": norms,
    }
