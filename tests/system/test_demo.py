"""The whole method end to end through the installed console script, at smoke scale."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from subspace3d.commands.demo import Stage, seconds_left
from subspace3d.files import read_json

SCRIPT = Path(sys.executable).with_name("subspace3d")


def finished_adapters(out: Path) -> list[Path]:
    """Those under their final names; what is being made lies in hidden folders."""
    found = (out / "adapters").glob("*/*/adapter_model.safetensors")
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(out).parts)]


@pytest.mark.timeout(600)  # a whole run, twice
def test_demo_killed_and_started_again_ends_in_a_report(tmp_path):
    out = tmp_path / "run"
    command = [str(SCRIPT), "demo", "--smoke", "--out", str(out)]
    first = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not finished_adapters(out):
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.2)
    first.send_signal(signal.SIGKILL)
    first.wait()
    adapters = {path: path.stat().st_mtime_ns for path in finished_adapters(out)}
    assert adapters

    second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stderr
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in adapters.items()), (
        "a finished adapter was redone"
    )

    results = read_json(out / "evaluation" / "results.json")
    assert set(results["methods"]) == {"base", "full", "lora", "psv", "subspace"}
    assert 0 < read_json(out / "fit" / "fit.json")["shares"]["basis"]["core"] < 1
    for row in results["methods"].values():
        assert {"accuracy", "completeness", "normal_consistency", "abs_rel", "rotation_error_deg"} <= set(row["mean"])
    page = (out / "report" / "index.html").read_text(encoding="utf-8")
    assert all(name in page for name in ("subspace", "psv", "lora", "full", "base", "Does the basis suit the task?"))
    assert "data:image/png;base64," in page
    assert str(out / "report" / "index.html") in second.stdout
    assert not list(out.rglob("*.tmp*")), "a partial file was left behind"

    other = subprocess.run([*command, "--seed", "5"], capture_output=True, text=True, check=False)
    assert other.returncode == 2
    assert "out" in other.stderr


def stage(cost: float, parts: int = 1) -> Stage:
    return Stage("", lambda: None, cost, parts)


def test_the_estimate_follows_the_machine_and_what_the_run_has_taken() -> None:
    stages = [stage(60, parts=100), stage(20), stage(100, parts=4)]
    assert seconds_left(stages, 0, 0.0, cores=2, speed=1) == 180
    assert seconds_left(stages, 0, 0.0, cores=8, speed=1) == 60 / 4 + 20 + 100 / 2  # four runs fill four cores
    assert seconds_left(stages, 0, 0.0, cores=1, speed=1) == 2 * 60 + 20 + 2 * 100
    assert seconds_left(stages, 0, 0.0, cores=2, speed=0.5) == 360
    assert seconds_left(stages, 1, 120.0, cores=2, speed=1) == 2 * 120  # twice as slow as expected so far
    assert seconds_left(stages, 1, 0.1, cores=2, speed=1) == 120  # the first was found done, which says nothing
    assert seconds_left(stages, 3, 300.0, cores=2, speed=1) == 0
