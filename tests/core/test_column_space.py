"""column_space and settle: Q orthonormal, Q R = A, at every condition, by the cheapest route that gives it."""

import pytest
import torch

from subspace_ext import column_space as module
from subspace_ext import mine_subspace

EPSILON = torch.finfo(torch.float64).eps


def conditioned(rows, columns, condition):
    """[rows, columns] with singular values from 1 to 1/condition."""
    left = torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, columns, dtype=torch.float64)).Q
    values = torch.logspace(0, -torch.log10(torch.tensor(float(condition))).item(), columns, dtype=torch.float64)
    return left * values @ right.t()


def solved(stack):
    space, growth = module.column_space(stack)
    return module.settle(space, growth), growth


def assert_factors(space, stack, slack=1.0):
    """Both errors at rounding level: epsilon times the size of the sums behind them."""
    layers, rows, columns = stack.shape
    size = min(rows, columns)
    q = space.embed(torch.eye(size, dtype=torch.float64).expand(layers, -1, -1))
    identity = torch.eye(size, dtype=torch.float64)
    bound = slack * rows * columns * EPSILON
    assert (q.mT @ q - identity).abs().max() < bound
    error = torch.linalg.matrix_norm(q @ space.triangle - stack)
    assert (error <= bound * torch.linalg.matrix_norm(stack)).all()


@pytest.mark.parametrize(
    ("condition", "passes"), [(2, 1), (1e4, 2), (1e5, 2), (1e7, "householder"), (1e15, "householder")]
)
def test_every_condition_takes_its_route_and_gives_the_same_quality(condition, passes):
    stack = torch.stack([conditioned(90, 12, condition) for _ in range(3)])
    space, growth = solved(stack)
    route = (
        1 if growth.max() <= module.ONE_PASS_GROWTH else 2 if growth.max() <= module.TWO_PASS_GROWTH else "householder"
    )
    assert route == passes
    # One pass may miss orthogonality by epsilon growth^2, which its limit keeps below 3e-12.
    assert_factors(space, stack, slack=10 if passes == 1 else 1)


def test_each_layer_takes_its_own_route():
    stack = torch.stack([conditioned(80, 10, condition) for condition in (3, 1e4, 1e9)])
    stack = torch.cat([stack, torch.zeros(1, 80, 10, dtype=torch.float64), stack[:1].clone()])
    stack[4, :, 3] = stack[4, :, 7]  # exactly deficient
    space, growth = solved(stack)
    assert growth[0] <= module.ONE_PASS_GROWTH < growth[1] <= module.TWO_PASS_GROWTH
    assert not (growth[2:] <= module.TWO_PASS_GROWTH).any()
    assert_factors(space, stack, slack=10)


@pytest.mark.parametrize("factor", [1e-170, 1e-150, 1e150, 1e170])
def test_squares_that_leave_the_range_are_noticed(factor):
    stack = conditioned(40, 6, 5)[None] * factor
    assert_factors(solved(stack)[0], stack, slack=10)


def test_column_scales_do_not_count_as_condition():
    stack = conditioned(60, 8, 3)[None] * torch.logspace(-9, 9, 8, dtype=torch.float64)
    space, growth = solved(stack)
    assert growth.max() <= module.ONE_PASS_GROWTH
    q = space.embed(torch.eye(8, dtype=torch.float64)[None])[0]
    assert (q.t() @ q - torch.eye(8, dtype=torch.float64)).abs().max() < 1e-12
    error = (q @ space.triangle[0] - stack[0]).norm(dim=0) / stack[0].norm(dim=0)
    assert error.max() < 1e-12


def test_wide_matrices_are_their_own_triangle():
    stack = torch.randn(2, 5, 9, dtype=torch.float64)
    space, growth = solved(stack)
    assert torch.equal(space.triangle, stack) and not growth.any()
    assert torch.isinf(module.column_space(stack / 0)[1]).all()


def test_transposed_storage():
    stack = torch.randn(2, 7, 40, dtype=torch.float64).mT
    assert_factors(solved(stack)[0], stack, slack=10)


def test_a_layer_does_not_depend_on_its_neighbours():
    """A deficient neighbour sends the batch through `settle`; the layers that need nothing keep their bits."""
    b, a = torch.randn(3, 4, 40, 3), torch.randn(3, 4, 3, 50)
    alone = mine_subspace(b, a, 3)
    b_with, a_with = torch.cat([b, b[:1]]), torch.cat([a, a[:1]])
    b_with[3, 1] = b_with[3, 0]
    together = mine_subspace(b_with, a_with, 3)
    assert torch.equal(together.u[:3], alone.u)
    assert torch.equal(together.v[:3], alone.v)


@pytest.mark.gpu
def test_cuda_gives_the_same_space():
    stack = torch.stack([conditioned(90, 12, condition) for condition in (2, 1e4, 1e9)])
    space, growth = module.column_space(stack.cuda())
    space = module.settle(space, growth.cpu())
    q = space.embed(torch.eye(12, dtype=torch.float64, device="cuda").expand(3, -1, -1)).cpu()
    expected = torch.linalg.qr(stack).Q
    assert (q @ q.mT - expected @ expected.mT)[:2].abs().max() < 1e-9
    assert (q @ space.triangle.cpu() - stack).abs().max() < 1e-12
