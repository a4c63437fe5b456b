"""Interference of two attributes: cases worked by hand, and the definition written densely."""

from __future__ import annotations

import pytest
import torch

from subspace3d.formats.subspace import ModuleSubspace, SubspaceFile
from subspace3d.mining.interference import compare_attributes, interference, random_interference


def axes(size: int, *columns: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.eye(size)[:, list(columns)]


def test_one_shared_side_does_not_interfere_and_both_do() -> None:
    one = axes(4, 0, 1), axes(4, 0, 1)
    assert interference(one, (axes(4, 0, 1), axes(4, 2, 3))) == 0
    assert interference(one, one) == pytest.approx(1)
    # one of the two directions on both sides: half
    assert interference(one, (axes(4, 0, 2), axes(4, 0, 2))) == pytest.approx(0.5)
    # the size of a subspace does not count, the strength of a direction within it does
    strong = torch.cat([axes(4, 0, scale=3.0), axes(4, 2)], 1), axes(4, 0, 2)
    assert interference(one, strong) == pytest.approx((0.5 + 0.75) / 2)
    big = axes(4, 0, 1, scale=100.0), axes(4, 0, 1)
    assert interference(one, big) == pytest.approx(1)
    assert interference(one, (torch.zeros(4, 2), torch.zeros(4, 2))) is None


def test_it_is_the_definition() -> None:
    generator = torch.Generator().manual_seed(1)
    sides = [torch.linalg.qr(torch.randn(9, 3, generator=generator).double())[0] for _ in range(4)]
    q, r = torch.cat(sides[:2], 1), torch.cat(sides[2:], 1)
    dense = (q.T @ q - torch.eye(6)) @ (torch.eye(6) / 3).double() @ (r.T @ r - torch.eye(6))
    found = interference((sides[0], sides[2]), (sides[1], sides[3]))
    assert found == pytest.approx(float(dense.abs().sum()) / 2)


def test_pairs_have_the_random_level_beside_them() -> None:
    def file(*columns: int) -> SubspaceFile:
        return SubspaceFile(
            {"m": ModuleSubspace(axes(30, *columns), axes(20, *columns), torch.ones(2), torch.ones(1))}, {}
        )

    files = {"a": file(0, 1), "b": file(0, 1), "c": file(5, 6)}
    same, apart, _ = compare_attributes(files, ["a", "b", "c"], ["m"])
    assert same["attributes"] == ["a", "b"] and same["mean"] == same["modules"]["m"] == pytest.approx(1)
    assert apart["mean"] == 0 and apart["mean_random"] == round(random_interference(30, 20, 2, 2), 6)
    # two directions of unit length overlap by about 1 / sqrt(size) on either side
    assert 0 < apart["mean_random"] < 0.25


def test_modules_with_nothing_count_in_neither_mean() -> None:
    nothing = ModuleSubspace(torch.zeros(4, 1), torch.zeros(4, 1), torch.zeros(1), torch.ones(1))
    large = ModuleSubspace(axes(30, 0), axes(20, 0), torch.ones(1), torch.ones(1))
    files = {
        name: SubspaceFile({"large": large, "small": small}, {}) for name, small in (("a", nothing), ("b", nothing))
    }
    (pair,) = compare_attributes(files, ["a", "b"], ["large", "small"])
    assert pair["modules"] == {"large": pytest.approx(1), "small": None}
    assert pair["mean_random"] == round(random_interference(30, 20, 1, 1), 6)
    (none,) = compare_attributes(files, ["a", "b"], ["small"])
    assert none["mean"] is None and none["mean_random"] is None
