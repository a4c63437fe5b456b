"""Column spaces of batches of tall matrices: by Cholesky of the Gram matrix where that is exact enough, else by QR."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Q = A R^-1 with R from the Gram matrix of A misses orthogonality by about epsilon * growth^2, growth the Frobenius
# norm of R^-1 for columns of A scaled to one (no less than their condition). Up to the first limit that is below
# 3e-12 and one pass does. Up to the second it is below 3e-4, and doing the same with Q leaves rounding alone.
# A Cholesky factor of a Gram matrix cannot show a condition beyond 1/sqrt(epsilon) = 7e7, so nothing passes by chance.
ONE_PASS_GROWTH = 1e2
TWO_PASS_GROWTH = 1e6


class ColumnSpace(NamedTuple):
    """A = Q triangle for each matrix of a batch, where Q = vectors mix has orthonormal columns and is never formed."""

    vectors: Tensor | None  # [L, m, n]; None where Q is the identity and triangle is A itself
    mix: Tensor | None  # [L, n, n]
    triangle: Tensor  # [L, min(m, n), n]

    def embed(self, x: Tensor) -> Tensor:
        """Q x [L, m, k] for x [L, min(m, n), k]."""
        if self.vectors is None or self.mix is None:
            return x
        return self.vectors @ (self.mix @ x)


def extended_gram(gram: Tensor | None, rows: Tensor) -> Tensor:
    """Inner products of all rows of rows [L, N, r, m], as [L, N r, N r] float64.

    Args:
        gram: those of the first rows, which are not made again.
    """
    stacked = rows.double().flatten(1, 2)
    if gram is None:
        return stacked @ stacked.mT
    old = gram.shape[1]
    cross = stacked[:, :old] @ stacked[:, old:].mT
    new = stacked[:, old:] @ stacked[:, old:].mT
    return torch.cat([torch.cat([gram, cross], 2), torch.cat([cross.mT, new], 2)], 1)


def column_space(stack: Tensor, gram: Tensor | None = None) -> tuple[ColumnSpace, Tensor]:
    """Column space of every A in stack [L, m, n], and how far to trust it.

    Batched products, one Cholesky factorisation and one triangular solve; nothing waits for the device.

    Args:
        stack: [L, m, n] float64, each matrix contiguous or the transpose of a contiguous one.
        gram: A^T A [L, n, n] where it is known.

    Returns:
        The space, exact where the second value, growth [L], is at most `ONE_PASS_GROWTH`; `settle` mends the others.
        NaN or Inf in a matrix makes its growth NaN or Inf.
    """
    layers, rows, columns = stack.shape
    if rows <= columns:
        finite = torch.isfinite(stack.sum(dim=(1, 2)))
        return ColumnSpace(None, None, stack), torch.where(finite, 0.0, torch.inf)
    gram = stack.mT @ stack if gram is None else gram
    squares = gram.diagonal(dim1=1, dim2=2)
    triangle, failed = torch.linalg.cholesky_ex(gram, upper=True)
    identity = torch.eye(columns, dtype=stack.dtype, device=stack.device)
    inverse = torch.linalg.solve_triangular(triangle, identity.expand(layers, -1, -1), upper=True)
    growth = torch.linalg.matrix_norm(squares.sqrt().unsqueeze(2) * inverse)
    # Squares below this have lost digits to underflow.
    smallest = torch.finfo(stack.dtype).tiny / torch.finfo(stack.dtype).eps
    usable = (failed == 0) & (squares.amin(dim=1) > smallest)
    return ColumnSpace(stack, inverse, triangle), torch.where(usable, growth, torch.inf)


def settle(space: ColumnSpace, growth: Tensor) -> ColumnSpace:
    """The space with every matrix exact to rounding: a second pass or Householder QR for those that need it.

    Args:
        space: from `column_space`.
        growth: [L] on the CPU, from the same call; every matrix is finite.
    """
    exact = growth <= ONE_PASS_GROWTH
    if space.vectors is None or space.mix is None or bool(exact.all()):
        return space
    vectors, mix, triangle = space.vectors.clone(), space.mix.clone(), space.triangle.clone()
    second = growth <= TWO_PASS_GROWTH
    layers = (second & ~exact).nonzero().flatten().to(vectors.device)
    if layers.numel():
        nearly = torch.linalg.solve_triangular(triangle[layers], vectors[layers], upper=True, left=False)
        again, _ = column_space(nearly)
        assert again.mix is not None
        vectors[layers], mix[layers], triangle[layers] = nearly, again.mix, again.triangle @ triangle[layers]
    layers = (~second).nonzero().flatten().to(vectors.device)
    if layers.numel():
        vectors[layers], triangle[layers] = torch.linalg.qr(vectors[layers])
        mix[layers] = torch.eye(mix.shape[1], dtype=mix.dtype, device=mix.device)
    return ColumnSpace(vectors, mix, triangle)
