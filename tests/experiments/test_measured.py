"""What was measured goes into one file and out of it again; nothing that it holds is run a second time."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from experiment_results import write_record, write_results

from experiments import measured, page, prepare, run
from experiments.jobs import RECORD, Context, Job
from experiments.jobs import _settings as settings_of
from experiments.layout import Layout
from experiments.plan import SPLITS, VALIDATION, final_rate_runs, rate_runs, table_runs
from experiments.rates import chosen_rates, finalists, read_choices
from experiments.scale import SMOKE
from experiments.settings import EXPERIMENTS, ExperimentsConfig
from subspace3d.files import read_json, write_json

HEAD = {"scale": "smoke", "weights": "0" * 64, "version": "1"}
START = {"command": "python -m experiments", "commit": "abc", "time": "now", "device": "CPU", "torch": "2"}


def context_of(out: Path) -> Context:
    return Context(ExperimentsConfig(out=out, scale="smoke"), Layout(out), SMOKE, out / "tokens", 1)


@pytest.fixture
def finished(tmp_path) -> Context:
    """A run folder with everything that pages are written from, as its jobs leave it."""
    context = context_of(tmp_path / "run")
    out = context.layout.out
    write_results(context.layout, SMOKE, lambda run, split: 0.08123456789 + 1e-3 * run.seed)
    choices = read_choices(context.layout, SMOKE, EXPERIMENTS)
    runs = [*rate_runs(SMOKE, EXPERIMENTS), *final_rate_runs(rate_runs(SMOKE, EXPERIMENTS), 3, finalists(choices))]
    runs += table_runs(SMOKE, EXPERIMENTS, 3, chosen_rates(choices))
    for each in runs:
        job = Job(each.task, (VALIDATION, *SPLITS), each)
        record = {"splits": list(job.splits), "diverged": None, "settings": settings_of(context, job)}
        write_record(context.layout.run(each) / RECORD, record)
    base = {"splits": [VALIDATION, *SPLITS], "diverged": None, "settings": None}
    write_record(out / "runs" / "bodies" / "base" / RECORD, base)
    write_record(out / "experiments.json", {**HEAD, "starts": [START]})
    for name in ("object", "object-gradient"):
        write_record(
            context.layout.analysis(name), {"format": "subspace3d-analysis", "cross_validation": None, "k": {}}
        )
    kinds = {"irls": 1 / 3, "mean": 0.5}
    mining = {kind: {"camera": {"kept": kept, "weights": {"noise": 1.0}}} for kind, kept in kinds.items()}
    write_record(out / "mining.json", mining)
    write_record(out / "directions" / "runs" / "bodies" / "psv.json", {"curve": {"10": {"test": {"loss": [1 / 3]}}}})
    return context


def test_the_page_is_the_same(finished, tmp_path):
    measured.keep(finished.layout.out, tmp_path)
    other = Layout(tmp_path / "other")
    count = measured.take_over(tmp_path / measured.FILE, other.out, HEAD)
    assert count == len((tmp_path / measured.FILE).read_text(encoding="utf-8").splitlines()) - 1 > 60
    pages = [page.write(layout, SMOKE, {}, None).read_text(encoding="utf-8") for layout in (finished.layout, other)]
    assert pages[0] == pages[1] and "abc" in pages[0]
    assert read_json(other.out / "directions/runs/bodies/psv.json") == {"curve": {"10": {"test": {"loss": [0.333333]}}}}
    # and it says the same once more
    measured.keep(other.out, tmp_path / "again")
    assert (tmp_path / "again" / measured.FILE).read_bytes() == (tmp_path / measured.FILE).read_bytes()


def test_what_is_there_stays(finished, tmp_path):
    measured.keep(finished.layout.out, tmp_path)
    own = tmp_path / "own"
    write_json(own / "mining.json", {"irls": {}})
    write_json(own / "experiments.json", {**HEAD, "starts": []})
    measured.take_over(tmp_path / measured.FILE, own, HEAD)
    assert read_json(own / "mining.json") == {"irls": {}}
    assert read_json(own / "experiments.json")["starts"] == []
    assert measured.take_over(tmp_path / measured.FILE, own, HEAD) == 0


def test_nothing_is_needed_for_what_was_measured(finished, tmp_path):
    measured.keep(finished.layout.out, tmp_path)
    other = context_of(tmp_path / "other")
    tasks, sets = run._left(other, EXPERIMENTS)
    assert tasks == SMOKE.tasks and len(sets) > 5
    measured.take_over(tmp_path / measured.FILE, other.layout.out, HEAD)
    assert run._left(other, EXPERIMENTS) == ({}, [])
    assert prepare.mine_subspaces(other, []) is None and read_json(other.layout.out / "mining.json")["irls"]
    # one more seed needs all of them, one row that is missing those of that row
    more = dataclasses.replace(other, config=dataclasses.replace(other.config, seeds=4))
    assert len(run._left(more, EXPERIMENTS)[1]) > 5
    for path in other.layout.out.glob(f"runs/bodies/subspace-2-planted*/{RECORD}"):
        path.unlink()
    tasks, needed = run._left(other, EXPERIMENTS)
    assert tasks == SMOKE.tasks
    assert {mined.planted for mined in needed} == {True, False} and {mined.k for mined in needed} == {2}
    assert len(needed) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [json.dumps({**HEAD, "starts": [], "weights": "1" * 64}), *lines[1:]], "weights '1111"),
        (lambda lines: lines[1:], "must be written by --publish"),
        (lambda lines: [*lines, '{"path": "../mining.json", "record": 1}'], "records of .*mining.json"),
        (lambda lines: [*lines, '{"path": "runs/../a/job.json", "record": 1}'], r"got {'path': 'runs/\.\./a"),
        (lambda lines: [*lines, '{"path": "notes.json", "record": 1}'], "got {'path': 'notes.json'"),
        (lambda lines: [*lines, '{"path": '], "line [0-9]+ is not valid JSON"),
        (lambda lines: [*lines, "[1]"], r"got \[1\]"),
    ],
)
def test_another_file_is_refused(finished, tmp_path, change, message):
    measured.keep(finished.layout.out, tmp_path)
    path = tmp_path / measured.FILE
    path.write_text("\n".join(change(path.read_text(encoding="utf-8").splitlines())), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        measured.take_over(path, tmp_path / "other", HEAD)
    assert not (tmp_path / "other").exists() and not (tmp_path / "mining.json").exists()
