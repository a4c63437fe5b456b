"""The script that times large clouds runs and measures a scene that can be measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "cloud_metrics.py"


def test_the_script_times_every_part_and_keeps_the_record(tmp_path):
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, str(SCRIPT), "--views", "2", "--size", "42", "--threads", "1", "--out", str(out)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    record = json.loads(out.read_text())
    assert record == json.loads(answer.stdout)
    assert record["points"] == 2 * 42 * 42
    assert set(record["parts"]) == {
        "measure_depth", "measure_points", "umeyama", "icp", "surface_distances", "measure_cameras",
    }  # fmt: skip
    # raw and aligned
    assert len(record["parts"]["surface_distances"]) == 2
    # depth noise of 0.02 at distances of 3 and more moves points by about 0.05
    assert 0 < record["accuracy"] < 0.1
    assert 0 < record["completeness"] < 0.1
