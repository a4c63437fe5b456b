"""A CPU subset under pytest-benchmark, for comparing two commits on one machine.

pytest benchmarks --benchmark-autosave, then pytest benchmarks --benchmark-compare
"""

import pytest
import torch

import subspace_ext as se
from subspace3d.bench.linear import training_step
from subspace3d.bench.mining import make_adapters
from subspace3d.bench.peers import PEERS, make_problem
from subspace3d.bench.shapes import SHAPES

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["frozen", "fold", "factored", "lora"])
def test_linear_proj(benchmark, name):
    shape = SHAPES["proj"]
    problem = make_problem(shape.in_features, shape.out_features, 1374, 64, 16, "fp32", CPU)
    benchmark(training_step(problem, PEERS[name](problem)))


@pytest.mark.parametrize("name", ["frozen", "fold", "factored", "lora"])
def test_python_of_a_tiny_linear(benchmark, name):
    problem = make_problem(16, 16, 4, 4, 4, "fp32", CPU)
    benchmark(training_step(problem, PEERS[name](problem)))


def test_mining_proj(benchmark):
    lora_b, lora_a = make_adapters(6, 10, 16, SHAPES["proj"], CPU)
    benchmark(se.mine_subspace, lora_b, lora_a, 16, max_iter=20, tol=0.0)
