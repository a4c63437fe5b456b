"""The scripts in benchmarks/: numerics, crossover, model and the generated table."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


def script(name):
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def case():
    return script("numerics").Case(size=256, tokens=1024, core=16)


@pytest.mark.parametrize("size", [1e-3, 3e-3, 1e-2, 1e-1])
def test_effective_weights_from_float32_show_all_of_an_update(case, size):
    seen = case.seen(case.subspace("effective", torch.float32), size)
    # The estimate itself scatters by noise / sqrt(values), 0.5 % at the smallest size.
    assert seen.gain == pytest.approx(1, abs=0.02)
    assert seen.error <= 1.05 * case.frozen_error()


def test_effective_weights_from_bfloat16_swallow_small_updates(case):
    """Why `auto` makes none of them: half of an update of one part in a thousand is lost, nearly all of 1e-4."""
    outputs = case.subspace("effective", torch.bfloat16)
    assert case.seen(outputs, 1e-4, torch.bfloat16).gain < 0.2
    assert 0.3 < case.seen(outputs, 1e-3, torch.bfloat16).gain < 0.7


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [([2.0, 1.0, 0.5], 200.0), ([0.9, 0.8, 0.7], 100.0), ([3.0, 2.0, 1.5], float("inf")), ([2.0, 1.5, 0.5], 282.84)],
)
def test_crossing_interpolates_in_log_tokens(ratios, expected):
    assert script("crossover").crossing([100, 200, 400], ratios) == pytest.approx(expected, rel=1e-4)


def test_the_table_is_that_of_the_committed_results():
    answer = subprocess.run(
        [sys.executable, FOLDER / "table.py", "--check"], capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr


def test_the_table_keeps_the_newest_row_and_refuses_mixed_devices(tmp_path):
    table = script("table")
    sizes = {"in": 4, "out": 5, "layers": 2, "N": 3, "r": 1, "k": 1, "iterations": 4, "threads": 1}
    origin = {"device": "Card A", "commit": "abc", "command": "c", "torch": "2", "clock": "wall"}
    row = {"benchmark": "mining", "peer": "subspace", "shape": "qkv", "seconds": 9.0, **sizes, **origin}
    path = tmp_path / "card-a.jsonl"
    path.write_text("".join(json.dumps({**row, "seconds": seconds}) + "\n" for seconds in (9.0, 7.0)))
    text = table.render(path)
    assert "Card A" in text and "7.00" in text and "9.00" not in text
    path.write_text(json.dumps(row) + "\n" + json.dumps({**row, "device": "Card B"}) + "\n")
    with pytest.raises(ValueError, match="rows must be of one device"):
        table.render(path)


def test_the_model_orders_the_peers_as_their_passes_do():
    roofline = script("roofline")
    shape = roofline.SHAPES[0]
    times = {name: sum(cost(8 * roofline.TOKENS_PER_VIEW, shape)) for name, cost in roofline.LAYERS.items()}
    assert times["frozen"] < times["fold K=64"] < times["LoRAFusion r=16"] < times["PEFT LoRA r=16"]
    # two products of 2 T in out operations each, nothing else, at the stated rate
    exact = 2 * 2 * 8 * 1374 * 1024 * 3072 / roofline.FLOPS
    assert times["frozen"] == pytest.approx(exact, rel=1e-6)
