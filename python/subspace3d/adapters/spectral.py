"""Leading singular directions of a frozen weight: the start of PiSSA and the bases of PSV."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from subspace3d.formats.basis import Basis
from subspace3d.progress import Progress


def leading_directions(weight: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U, S, V of the rank-k part ``U diag(S) V^T`` of a weight.

    From the eigenvectors of ``W W^T`` (or ``W^T W``, whichever is smaller) in float64, several times faster than a
    singular value decomposition; directions below 1e-8 of the largest singular value are arbitrary.

    Args:
        weight (Tensor): ``[out, in]`` or a convolution's ``[out, Cin, kh, kw]``, which is unrolled to ``[out, in]``.
        k (int): number of directions.

    Returns:
        ``U [out, k]``, ``S [k]`` descending, ``V [in, k]``, float32, orthonormal columns. The sign of a direction makes
        the entry of U of largest magnitude positive.

    Raises:
        ValueError: k is not in 1..min(out, in).
    """
    matrix = weight.detach().flatten(1).double()
    if not 1 <= k <= min(matrix.shape):
        raise ValueError(f"k must be in 1..{min(matrix.shape)} for a weight {list(matrix.shape)}, got {k}")
    wide = matrix.shape[0] <= matrix.shape[1]
    flat = matrix if wide else matrix.T
    # ascending eigenvalues
    small = torch.linalg.eigh(flat @ flat.T).eigenvectors.flip(1)[:, :k]
    # orthonormal also where a singular value is zero
    large, triangle = torch.linalg.qr(flat.T @ small)
    values = triangle.diagonal()
    large = large * torch.where(values < 0, -1.0, 1.0)
    u, v = (small, large) if wide else (large, small)
    signs = torch.where(u.gather(0, u.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)
    return (u * signs).float().contiguous(), values.abs().float(), (v * signs).float().contiguous()


def singular_basis(model: nn.Module, names: Iterable[str], K: int) -> Basis:
    """The basis of PSV: U and V are the K leading left and right singular vectors of each module's own weight.

    Raises:
        ValueError: K is below one, or above the smaller side of a module.
    """
    modules = {name: model.get_parameter(f"{name}.weight") for name in names}
    if K < 1:
        raise ValueError(f"K must be at least 1 for the method psv, got {K}")
    basis = {}
    with Progress("singular vectors of the weights", len(modules), "module") as progress:
        for name, weight in modules.items():
            smaller = min(weight.shape[0], weight[0].numel())
            if smaller < K:
                raise ValueError(f"K must be at most {smaller}, the smaller side of {name}, got {K}")
            u, _, v = leading_directions(weight, K)
            basis[name] = (u, v)
            progress.advance()
    return basis
