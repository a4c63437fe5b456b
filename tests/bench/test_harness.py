"""Timing, memory counts and the files of rows."""

import time

import pytest
import torch

from subspace3d.bench import harness

CPU = torch.device("cpu")


def test_ratios_are_formed_within_a_round():
    waits = {"base": 0.004, "double": 0.008}
    steps = {name: lambda seconds=seconds: time.sleep(seconds) for name, seconds in waits.items()}
    timings = harness.measure(steps, "base", CPU, rounds=5, least_seconds=0.0)
    assert timings["base"].ratio == (1.0, 1.0, 1.0)
    # a sleep is never shorter than asked, and a loaded machine makes it longer
    assert timings["double"].seconds >= 0.008 and timings["base"].seconds >= 0.004
    low, high = timings["double"].ratio[1:]
    assert low <= timings["double"].ratio[0] <= high
    assert set(timings["double"].fields("graph_")) == {
        "graph_seconds", "graph_ratio", "graph_ratio_10", "graph_ratio_90", "graph_rounds",
    }  # fmt: skip


def test_short_steps_are_repeated_and_every_round_starts_with_another():
    order = []
    steps = {name: lambda name=name: order.append(name) for name in "abc"}
    harness.measure(steps, "a", CPU, rounds=3, least_seconds=0.0)
    assert order[6:] == list("abcbcacab")


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1.0), (0.5, 2.5), (0.1, 1.3), (1.0, 4.0)])
def test_quantiles_interpolate(share, expected):
    assert harness.quantile([4.0, 1.0, 3.0, 2.0], share) == pytest.approx(expected)


def test_saved_bytes_count_every_storage_once_and_no_parameter():
    linear = torch.nn.Linear(6, 4)
    x = torch.randn(7, 6, requires_grad=True)
    owned = list(linear.parameters())
    # x is kept for the weight's gradient; relu keeps its result; both products of one tensor share a storage
    saved = harness.saved_for_backward(lambda: linear(x).relu().exp(), owned, tokens=7)
    assert saved.activations == 4 * (7 * 6 + 7 * 4 + 7 * 4)
    assert saved.weights == 0
    cast = harness.saved_for_backward(lambda: x.detach().double() @ linear.weight.t().double(), owned, tokens=7)
    assert cast.activations == 8 * 7 * 6
    assert cast.weights == 0 or cast.weights == 8 * 24


def test_rows_of_another_device_are_refused(tmp_path):
    rows = [{"device": "Card A", "seconds": 1.0}]
    path = harness.append_rows(tmp_path, rows)
    assert path == tmp_path / "card-a.jsonl"
    harness.append_rows(tmp_path, rows)
    assert harness.read_rows(path) == rows * 2
    with pytest.raises(ValueError, match="rows must be of one device, got Card A, Card B"):
        harness.append_rows(tmp_path, [*rows, {"device": "Card B"}])
    # names that differ only in what a file name cannot hold meet in one file
    with pytest.raises(ValueError, match="Card A, Card-A"):
        harness.append_rows(tmp_path, [{"device": "Card-A"}])
    assert harness.append_rows(tmp_path, []) is None


def test_provenance_says_where_a_number_comes_from():
    record = harness.provenance(CPU)
    assert record["device"] == harness.device_name(CPU)
    assert record["threads"] == torch.get_num_threads()
    assert record["commit"] and record["command"] and record["torch"] == torch.__version__
