"""The experiments end to end at smoke scale, as a user starts them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import experiments.directions.run
import experiments.run
from experiments import measured
from experiments.directions.settings import DirectionsConfig
from experiments.jobs import RECORD
from experiments.measured import require_checkout
from experiments.settings import ExperimentsConfig
from subspace3d.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "experiments", "--scale", "smoke", "--workers", "1", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT, cwd=ROOT)


def records(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in out.glob(f"runs/*/*/{RECORD}")}


@pytest.mark.slow  # a minute and a half: a whole run, twice
def test_a_part_killed_and_started_again_ends_in_a_page(tmp_path):
    out = tmp_path / "run"
    arguments = ["--out", str(out), "--only", "psv", "--seeds", "1"]
    first = subprocess.Popen(
        [sys.executable, "-m", "experiments", "--scale", "smoke", "--workers", "1", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, env=ENVIRONMENT, cwd=ROOT,
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and len(records(out)) < 3:
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    before = records(out)
    assert len(before) >= 3

    second = call(*arguments)
    assert second.returncode == 0, second.stderr
    finished = {path: time_ns for path, time_ns in records(out).items() if path in before}
    # the base model and the runs of the grid; those at the chosen rates were measured on the tests as well
    again = {path for path in before if finished[path] != before[path]}
    assert all(read_json(path)["splits"][0] == "validation" and len(read_json(path)["splits"]) == 4 for path in again)
    page = (out / "results.md").read_text(encoding="utf-8")
    assert "Smoke scale: the numbers mean nothing" in page
    assert "**Not run:**" in page and "LoRA r = 2" in page and "more than one seed" in page
    # both starts had one command and one commit
    assert page.count("python -m experiments --scale smoke") == 1 and " 2 starts" in page
    runs = {path.parent.name for path in records(out)}
    assert runs >= {"base"} | {f"{row}_lr{rate}_s0" for row in ("psv-4", "subspace-2") for rate in ("0.0001", "0.001")}
    assert len(runs) == 1 + 4 + 2
    assert not list(out.rglob("*.tmp*")) and not list(out.glob("runs/*/*/checkpoints"))

    record = read_json(out / "experiments.json")
    write_json(out / "experiments.json", record | {"weights": "0" * 64})
    other = call(*arguments, "--collect")
    assert other.returncode == 2
    assert "weights" in other.stderr and "000000" in other.stderr


@pytest.mark.slow  # two minutes: every experiment, every kind of adapter and mining
def test_everything_at_smoke_scale(tmp_path):
    out = tmp_path / "run"
    done = call("--out", str(out), "--seeds", "2")
    assert done.returncode == 0, done.stderr
    page = (out / "results.md").read_text(encoding="utf-8")
    assert "Not run" not in page and "**not run**" not in page and "Failed" not in page
    mining = read_json(out / "mining.json")
    for row in (*mining["irls"].values(), *mining["mean"].values()):
        assert 0 <= row["kept"] <= 1
        assert set(row["weights"]) == {*(name for name in row["weights"] if name[-3:-2] == "_"), "noise", "wrong"}

    # elsewhere, from what was measured: nothing is rendered, tuned or mined; one more seed runs
    measured.keep(out, tmp_path)
    other, known = tmp_path / "other", ("--measured", str(tmp_path / measured.FILE))
    again = call("--out", str(other), "--seeds", "2", *known)
    assert again.returncode == 0, again.stderr
    assert not any((other / name).exists() for name in ("scenes", "adapters", "subspaces"))
    tables = [
        text.partition("## Which of the paper's claims")[2] for text in (page, (other / "results.md").read_text())
    ]
    assert tables[0] == tables[1] != ""
    more = call("--out", str(other), "--seeds", "3", "--only", "psv", "--rows", "psv-4", *known)
    assert more.returncode == 0, more.stderr
    assert not (other / "adapters").exists()
    assert len(list(other.glob("runs/bodies/psv-4_*/tuned"))) == 1


def test_smoke_results_are_not_published(tmp_path):
    with pytest.raises(ValueError, match="scale"):
        ExperimentsConfig(scale="smoke", publish=tmp_path)


@pytest.mark.parametrize("command", ["experiments", "experiments.directions"])
def test_results_are_published_in_a_checkout_of_this_project_only(tmp_path, command):
    pages = ("docs/results.md", "docs/directions.md", "README.md", "pyproject.toml")
    for name in pages:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("name = 'another'")
    settings = {"out": tmp_path / "run", "publish": tmp_path, "collect": True}
    with pytest.raises(FileNotFoundError, match=r"publish: no checkout of subspace3d in"):
        if command == "experiments":
            experiments.run.run(ExperimentsConfig(**settings))
        else:
            experiments.directions.run.run(DirectionsConfig(**settings))
    assert all((tmp_path / name).read_text() == "name = 'another'" for name in pages)
    require_checkout(Path(__file__).parents[2])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--tasks", "glass"), "tasks must be among bodies"),
        (
            ("--only", "psv", "--rows", "psv-4", "psv-5"),
            "rows must be among psv-2, psv-4, subspace-1, subspace-2, got psv-5",
        ),
    ],
)
def test_what_the_scale_does_not_have_is_refused(tmp_path, arguments, reason):
    other = call("--out", str(tmp_path / "run"), *arguments)
    assert other.returncode == 2
    assert reason in other.stderr
    assert not (tmp_path / "run").exists()


def test_nothing_is_collected_where_nothing_is(tmp_path):
    missing = call("--out", str(tmp_path / "typo"), "--collect")
    assert missing.returncode == 2
    assert "typo" in missing.stderr
    assert not (tmp_path / "typo").exists()
