"""Fixtures, markers and limits shared by all tests."""

import os

# Before torch and NumPy read it, and for the processes that tests start: two workers of pytest-xdist share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import emulated
import numpy as np
import pytest
import torch

from subspace3d import log
from subspace_ext import _native

_SLOW_LIMIT_S = 1500  # below faulthandler_timeout in pyproject.toml, which ends the process and not the test

# Whole runs in processes of their own. With a file for each worker they begin first, so that no worker ends long after
# the others.
_LONGEST = (
    "training/test_processes.py",
    "faults/test_faults.py",
    "system/test_demo.py",
    "training/test_export.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run tests marked slow")
    parser.addoption("--fuzz-cases", type=int, default=100, help="damaged files per reader (default: the same 100)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.partition("::")[0].endswith(_LONGEST))
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(_SLOW_LIMIT_S))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="gpu: no CUDA device on this machine"))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Matrices and models as small as the tests' gain nothing from threads, which on busy cores wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _show_log() -> None:
    """What the package says goes to stdout and stderr, as in its commands."""
    log.show()


@pytest.fixture(autouse=True)
def _seed_torch() -> None:
    torch.manual_seed(0)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def emulated_module():
    module = emulated.load()
    if module is None:
        pytest.skip("no C++ compiler for the emulated kernels")
    return module


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernel_device(request, monkeypatch) -> torch.device:
    """A device whose tensors go to the CUDA kernels: a GPU, and everywhere the CPU with the emulated kernels.

    Memory that torch.empty hands out, results and scratch of the kernels among it, holds NaN before.
    """
    if request.param == "emulated":
        monkeypatch.setattr(_native, "_C", request.getfixturevalue("emulated_module"))
        monkeypatch.setattr(_native, "KERNEL_DEVICE", "cpu")
        _native.kernel_image.cache_clear()
    real = torch.empty

    def poisoned(*args, **kwargs):
        tensor = real(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
    return torch.device("cpu" if request.param == "emulated" else "cuda")
