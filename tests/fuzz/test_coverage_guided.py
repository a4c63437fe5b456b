"""Readers under atheris, each for a while, where it is installed."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz.readers import READERS

SECONDS = 20


@pytest.mark.slow  # 20 seconds per reader
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is optional: pip install atheris")
@pytest.mark.parametrize("name", READERS)
def test_no_input_that_is_found_breaks_the_rule(name: str, count_case) -> None:
    script = Path(__file__).with_name("coverage_guided.py")
    command = [sys.executable, str(script), name, str(SECONDS)]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stdout[-2000:] + outcome.stderr[-4000:]
    done = re.search(r"Done (\d+) runs", outcome.stdout + outcome.stderr)
    assert done is not None
    for _ in range(int(done.group(1))):
        count_case("coverage-guided")
