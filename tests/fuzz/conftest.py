"""Counts the cases of a fuzzing run and prints them at its end."""

from __future__ import annotations

from collections import Counter

import pytest

CASES: pytest.StashKey[Counter] = pytest.StashKey()


@pytest.fixture
def fuzz_cases(request: pytest.FixtureRequest) -> int:
    """Cases per reader."""
    return request.config.getoption("--fuzz-cases")


@pytest.fixture
def count_case(request: pytest.FixtureRequest):
    counter = request.config.stash.setdefault(CASES, Counter())
    return lambda outcome: counter.update([outcome])


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    counter = config.stash.get(CASES, Counter())
    if counter:
        outcomes = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counter.items()))
        terminalreporter.write_line(f"fuzzing: {sum(counter.values())} cases: {outcomes}")
