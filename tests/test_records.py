"""Is it done with the same settings, and where did it come from?"""

import re
import sys
from pathlib import Path

import pytest

from subspace3d import records


def test_every_difference_is_named():
    before = {"rank": 2, "lr": 1e-3, "seed": 0}
    assert records.differing(before, {"rank": 2, "lr": 1e-3}) == {}
    assert records.differing(before, {"rank": 4, "K": 8}) == {"rank": (2, 4), "K": (None, 8)}
    records.check_same(Path("run"), before, {"seed": 0}, "choose another")
    with pytest.raises(ValueError, match=r"out: run was made with other settings \(rank 2 there, 4 now\); choose"):
        records.check_same(Path("run"), before, {"rank": 4}, "choose another")


def test_provenance_says_command_versions_and_commit(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/subspace3d", "mine", "a folder"])
    record = records.provenance()
    assert record["command"] == "subspace3d mine 'a folder'"
    assert re.fullmatch(r"[0-9a-f]{7,40}(-dirty)?|version .+", record["commit"])
    assert record["processor"].endswith("cores") or " cores" in record["processor"]
    monkeypatch.setattr(sys, "argv", ["/checkout/experiments/__main__.py", "--seeds", "1"])
    assert records.command_line() == "python -m experiments --seeds 1"
