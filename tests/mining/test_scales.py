"""What is said about subspaces does not depend on the size of the adapters, from 2^-60 to 2^60 times a usual one."""

import pytest
import torch

import subspace_ext as se
from subspace3d.formats.subspace import ModuleSubspace, SubspaceFile
from subspace3d.mining.compare import _spectrum
from subspace3d.mining.interference import interference
from subspace3d.mining.join import join


def subspaces(scale: float) -> dict[str, ModuleSubspace]:
    """Singular values are the squares of the lengths of u and v."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.randn(12, 3, generator=generator) for _ in range(2))
    values = torch.tensor([8.0, 3.0, 1.0])
    return {"m": ModuleSubspace(scale * u, scale * v, scale**2 * values, torch.ones(2, dtype=torch.float64))}


@pytest.mark.parametrize("exponent", [-60, 60])
def test_numbers_of_huge_and_tiny_subspaces_are_those_of_usual_ones(exponent: int) -> None:
    usual, scaled = subspaces(1.0), subspaces(2.0**exponent)
    assert _spectrum(SubspaceFile(scaled, {})) == _spectrum(SubspaceFile(usual, {}))
    pairs = [((found["m"].u, found["m"].v), (found["m"].u.flip(0), found["m"].v)) for found in (scaled, usual)]
    assert interference(*pairs[0]) == pytest.approx(interference(*pairs[1]), rel=1e-12)
    joined = [join(found, found) for found in (scaled, usual)]
    torch.testing.assert_close(joined[0]["m"].u, joined[1]["m"].u)
    assert joined[0]["m"].u.norm() > 0.5
    (u, v), (wanted_u, wanted_v) = (se.combine_subspaces([(each["m"].u, each["m"].v)]) for each in (scaled, usual))
    for found, wanted in ((u, wanted_u), (v, wanted_v)):
        torch.testing.assert_close(found @ found.T, wanted @ wanted.T, rtol=1e-5, atol=1e-6)
