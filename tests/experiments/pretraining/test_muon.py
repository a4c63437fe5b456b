"""Muon against its formula, and its AdamW part against torch's."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import pytest
import torch
from adapters.models import TINY

from experiments.pretraining.muon import Muon, muon_groups, orthogonalize
from subspace3d.backbones.vggt import VGGT
from subspace3d.training.device import Processes


@pytest.mark.parametrize("shape", [(5, 5), (4, 9), (9, 4), (1, 7), (3, 6, 6)])
def test_orthogonalize_keeps_the_singular_vectors_and_evens_out_the_values(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    middle = u.mT @ orthogonalize(matrix) @ vt.mT
    values = middle.diagonal(dim1=-2, dim2=-1)
    # an odd polynomial of the singular values: rounding alone is beside the diagonal
    torch.testing.assert_close(middle, torch.diag_embed(values), atol=1e-12, rtol=0)
    assert (values > 0).all() and (values < 1.3).all()
    # five steps lift what is at least 0.05 of the norm to about one
    singular = torch.linalg.svdvals(matrix)
    assert (values[singular > 0.05 * matrix.norm(dim=(-2, -1))[..., None]] > 0.6).all()


def test_orthogonalize_of_zero_is_zero() -> None:
    assert torch.equal(orthogonalize(torch.zeros(3, 4)), torch.zeros(3, 4))


def test_two_steps_on_a_matrix_are_the_formula() -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(6, 4, dtype=torch.float64))
    gradients = torch.randn(2, 6, 4, dtype=torch.float64)
    optimizer = Muon([{"params": [weight], "matrices": True, "weight_decay": 0.1, "parts": 2}], lr=0.01)
    expected, momentum = weight.detach().clone(), torch.zeros(6, 4, dtype=torch.float64)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
        momentum = 0.95 * momentum + 0.05 * gradient
        blended = 0.05 * gradient + 0.95 * momentum
        update = torch.cat([orthogonalize(part) for part in blended.chunk(2)])
        expected = (1 - 0.001) * expected - 0.01 * 0.2 * 4**0.5 * update
    torch.testing.assert_close(weight.detach(), expected, atol=1e-14, rtol=1e-14)


class Thread(Processes):
    """A process of three, which are threads here."""

    barrier = threading.Barrier(3)
    sent: ClassVar[dict[int, torch.Tensor]] = {}

    def gather(self, tensor: torch.Tensor, device: torch.device) -> list[torch.Tensor]:
        self.sent[self.rank] = tensor.to(device)
        self.barrier.wait(20)
        gathered = [self.sent[rank].clone() for rank in range(self.count)]
        self.barrier.wait(20)
        return gathered


@pytest.mark.parametrize("count", [2, 7])  # of matrices: one process has none, or some have more
def test_processes_that_share_the_work_take_the_step_of_one(count: int) -> None:
    def trained(processes: Processes) -> list[torch.nn.Parameter]:
        generator = torch.Generator().manual_seed(0)
        shapes = [(3 * (index + 1), 4) for index in range(count)]
        weights = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        other = torch.nn.Parameter(torch.randn(5, generator=generator))
        groups = [{"params": weights, "matrices": True, "parts": 3, "weight_decay": 0.1}, {"params": [other]}]
        optimizer = Muon(groups, 0.01, processes)
        for _ in range(2):
            for weight in (*weights, other):
                weight.grad = torch.randn(weight.shape, generator=generator)
            optimizer.step()
        return [*weights, other]

    alone = trained(Processes())
    with ThreadPoolExecutor(3) as pool:
        for together in pool.map(trained, [Thread(rank, 3) for rank in range(3)]):
            assert all(torch.equal(*pair) for pair in zip(alone, together))


def test_other_groups_follow_adamw() -> None:
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(5, dtype=torch.float64))
    theirs = torch.nn.Parameter(ours.detach().clone())
    reference = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    optimizer = Muon([{"params": [ours], "weight_decay": 0.1}], lr=0.01)
    for _ in range(5):
        gradient = torch.randn(5, dtype=torch.float64)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    assert optimizer.state[ours].keys() == reference.state[theirs].keys()


def test_every_parameter_is_in_one_group_and_projections_are_cut_in_three() -> None:
    parameters = dict(VGGT(TINY).named_parameters())
    groups = muon_groups(parameters, 0.05)
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert len(grouped) == len(parameters) == len({id(parameter) for parameter in grouped})
    names = {id(parameter): name for name, parameter in parameters.items()}
    of = [{names[id(parameter)] for parameter in group["params"]} for group in groups]
    assert all(name.endswith("attn.qkv.weight") for name in of[1]) and groups[1]["parts"] == 3
    assert all(".mlp." in name or name.endswith("attn.proj.weight") for name in of[0]) and of[0]
    assert not any(group.get("matrices") for group in groups[2:])
    assert "weight_decay" not in groups[3] and all(not name.endswith("conv1.weight") for name in of[3])
