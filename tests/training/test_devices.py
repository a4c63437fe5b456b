"""Training where the device matters: reduced precision, and the random state that a checkpoint keeps of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from training.distributed_run import StopAfter
from training.plane_scenes import write_plane_scenes
from training.tiny import CONFIG, read_metrics, tiny_model, without_time

from subspace3d.datasets.multiview import MultiViewDataset
from subspace3d.training.config import TrainConfig
from subspace3d.training.loop import train


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("devices") / "scenes"
    write_plane_scenes(folder, scenes=3, views=3)
    return folder


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def config(request: pytest.FixtureRequest) -> TrainConfig:
    return dataclasses.replace(CONFIG, device=request.param)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_bfloat16_trains_as_float32_does(scenes: Path, tmp_path: Path, config: TrainConfig, method: str) -> None:
    lines = {}
    for precision in ("fp32", "bf16"):
        one = dataclasses.replace(config, steps=3, precision=precision)
        train(tiny_model(method=method), MultiViewDataset(scenes, image_size=28), one, tmp_path / precision, quiet=True)
        lines[precision] = read_metrics(tmp_path / precision)
    for step, (exact, rounded) in enumerate(zip(lines["fp32"], lines["bf16"])):
        # eight bits of mantissa through a dozen layers
        assert rounded["loss"] == pytest.approx(exact["loss"], rel=0.05, abs=0.02), step
        assert rounded["loss"] != exact["loss"]


def test_a_stopped_run_ends_as_a_straight_one(scenes: Path, tmp_path: Path, config: TrainConfig) -> None:
    def run(out: Path, stop: int = 0) -> None:
        data = MultiViewDataset(scenes, image_size=28)
        train(tiny_model(method="full"), data, config, out, hook=StopAfter(stop), quiet=True)

    run(tmp_path / "straight")
    with pytest.raises(SystemExit):
        run(tmp_path / "stopped", stop=4)
    run(tmp_path / "stopped")
    straight, stopped = (without_time(read_metrics(tmp_path / name)) for name in ("straight", "stopped"))
    assert [line["step"] for line in stopped] == [line["step"] for line in straight]
    for line, expected in zip(stopped, straight):
        # kernels of a GPU may add in another order each time
        tolerance = 0.0 if config.device == "cpu" else 1e-4
        assert line["loss"] == pytest.approx(expected["loss"], rel=tolerance, abs=tolerance)
