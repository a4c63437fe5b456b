"""A pytest plugin, for `make sanitize`: the native module is the one that SUBSPACE_SANITIZED names."""

import importlib.util
import os
import sys

import torch  # noqa: F401 (before the module, as the package imports it)

spec = importlib.util.spec_from_file_location("subspace_ext._C", os.environ["SUBSPACE_SANITIZED"])
assert spec is not None and spec.loader is not None
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.modules["subspace_ext._C"] = module


def pytest_configure() -> None:
    from subspace_ext import _native

    assert _native._C is module, "the sanitized module must be the one in use"


def pytest_report_header() -> str:
    return f"native module: {module.__file__}"
