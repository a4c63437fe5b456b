"""combine_subspaces and disentanglement."""

import pytest
import torch

from subspace_ext import combine_subspaces, disentanglement


def orthonormal(size, columns):
    return torch.linalg.qr(torch.randn(size, columns, dtype=torch.float64)).Q


def test_combined_bases_are_orthonormal_and_span_the_inputs():
    pairs = [(torch.randn(30, k), torch.randn(20, k)) for k in (4, 3, 2)]
    U, V = combine_subspaces(pairs)
    assert U.shape == (30, 9) and V.shape == (20, 9) and U.dtype == torch.float32
    for basis, side in ((U, 0), (V, 1)):
        torch.testing.assert_close(basis.t() @ basis, torch.eye(9), rtol=0, atol=1e-5)
        stacked = torch.cat([pair[side] for pair in pairs], dim=1)
        torch.testing.assert_close(basis @ (basis.t() @ stacked), stacked, rtol=1e-4, atol=1e-4)


def test_rank_keeps_the_leading_directions():
    left, right = orthonormal(30, 5), orthonormal(20, 5)
    sizes = torch.tensor([5.0, 4, 3, 2, 1], dtype=torch.float64)
    U, V = combine_subspaces([(left * sizes, right * sizes)], rank=2)
    torch.testing.assert_close(U @ U.t(), left[:, :2] @ left[:, :2].t())
    torch.testing.assert_close(V @ V.t(), right[:, :2] @ right[:, :2].t())


def test_dependent_directions_are_dropped_on_both_sides():
    u, v = torch.randn(30, 4), torch.randn(20, 4)
    U, V = combine_subspaces([(u, v), (u @ torch.randn(4, 4), torch.randn(20, 4))])
    assert U.shape == (30, 4) and V.shape == (20, 4)
    torch.testing.assert_close(U.t() @ U, torch.eye(4), rtol=0, atol=1e-5)
    wide = combine_subspaces([(torch.randn(5, 4), torch.randn(20, 4)), (torch.randn(5, 4), torch.randn(20, 4))])
    assert wide[0].shape == (5, 5) and wide[1].shape == (20, 5)


def test_result_is_deterministic_in_sign():
    u, v = torch.randn(30, 4), torch.randn(20, 4)
    first, second = combine_subspaces([(u, v)]), combine_subspaces([(-u, -v)])
    torch.testing.assert_close(first[0], second[0])
    torch.testing.assert_close(first[1], second[1])


@pytest.mark.parametrize(
    ("pairs", "options", "message"),
    [
        ([], {}, "at least one pair"),
        ([(torch.ones(3, 1), torch.ones(4, 1))], {"rank": 0}, "rank must be a positive integer or None, got 0"),
        ([(torch.ones(3, 1), torch.ones(4, 1))], {"rank": 1.5}, "rank must be a positive integer or None, got 1.5"),
        ([(torch.ones(3, 1), torch.ones(4, 2))], {}, "equally many columns"),
        ([(torch.ones(3, 1), torch.ones(4, 1)), (torch.ones(5, 1), torch.ones(4, 1))], {}, r"\(3, 4\).*\(5, 4\)"),
        ([(torch.full((3, 1), float("nan")), torch.ones(4, 1))], {}, r"subspaces\[0\] u must be finite"),
        ([(torch.zeros(3, 1), torch.ones(4, 1))], {}, "at least one direction"),
    ],
)
def test_bad_pairs_are_named(pairs, options, message):
    with pytest.raises(ValueError, match=message):
        combine_subspaces(pairs, **options)


def test_known_angles():
    axes = torch.eye(6, dtype=torch.float64)
    angles = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    turned = axes[:, :3] * angles.cos() + axes[:, 3:] * angles.sin()
    torch.testing.assert_close(disentanglement(axes[:, :3], turned), 1 - angles.cos())
    assert torch.equal(disentanglement(axes[:, :2], axes[:, 3:5]), torch.ones(2, dtype=torch.float64))


def test_eigenvalues_of_the_generalised_problem():
    """Half of the eigenvalues of [[A, -C], [-C', B]] z = l [[A, 0], [0, B]] z are these, the others mirror at 1."""
    u1, u2 = torch.randn(20, 4, dtype=torch.float64), torch.randn(20, 4, dtype=torch.float64)
    cross = u1.t() @ u2
    blocks = torch.block_diag(u1.t() @ u1, u2.t() @ u2)
    system = blocks.clone()
    system[:4, 4:], system[4:, :4] = -cross, -cross.t()
    half = torch.linalg.inv(torch.linalg.cholesky(blocks))
    expected = torch.linalg.eigvalsh(half @ system @ half.t())
    torch.testing.assert_close(disentanglement(u1, u2), expected[:4], rtol=1e-9, atol=1e-12)


def test_scaling_and_mixing_change_nothing():
    u1, u2 = torch.randn(30, 5, dtype=torch.float64), torch.randn(30, 3, dtype=torch.float64)
    mixed = u1 @ torch.randn(5, 5, dtype=torch.float64) * 1e6
    values = disentanglement(u1, u2)
    assert values.shape == (3,) and (values.diff() >= 0).all()
    torch.testing.assert_close(disentanglement(mixed, u2), values, rtol=1e-8, atol=1e-10)


def test_bad_factors_are_named():
    with pytest.raises(ValueError, match="equally many rows, got 3 and 4"):
        disentanglement(torch.ones(3, 1), torch.ones(4, 1))
    with pytest.raises(ValueError, match="u2 must span at least one direction"):
        disentanglement(torch.ones(3, 1), torch.zeros(3, 1))
    with pytest.raises(ValueError, match="u1 must be finite"):
        disentanglement(torch.full((3, 1), float("inf")), torch.ones(3, 1))
