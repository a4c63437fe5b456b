"""The memory estimate against two other ways to find the memory of a step."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training import train_and_measure
from training.tiny import CONFIG, tiny_model

from subspace3d.training import memory
from subspace3d.training.config import TrainConfig
from subspace3d.training.device import peak_memory
from subspace3d.training.memory import check_memory, estimate_memory


@pytest.mark.parametrize(
    ("method", "precision", "checkpointing", "images"),
    [
        ("full", "fp32", "off", 16),
        pytest.param("full", "bf16", "off", 48, marks=pytest.mark.slow(reason="half a minute")),
        pytest.param("subspace", "fp32", "off", 48, marks=pytest.mark.slow(reason="half a minute")),
        pytest.param("lora", "fp32", "on", 96, marks=pytest.mark.slow(reason="a minute")),
    ],
)
def test_estimate_is_within_a_fifth_of_what_a_run_takes(
    tmp_path: Path, method: str, precision: str, checkpointing: str, images: int
) -> None:
    arguments = [method, precision, checkpointing, str(images), str(tmp_path)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    script = str(Path(train_and_measure.__file__))
    run = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    figures = json.loads(run.stdout)
    assert figures["measured"] > 100e6
    assert figures["estimated"] == pytest.approx(figures["measured"], rel=0.2)


def _saved_bytes(model: torch.nn.Module, images: torch.Tensor) -> int:
    """Bytes the autograd graph of a forward pass keeps, each storage once, parameters left out."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        predictions = model(images)
    assert predictions["depth"].requires_grad
    return sum(kept.values())


def test_activations_grow_by_what_autograd_keeps() -> None:
    model = tiny_model(method="full")
    config = dataclasses.replace(CONFIG, checkpointing=False)
    few, many = (estimate_memory(model, config, 112, scenes, 4).step for scenes in (4, 12))
    kept = [_saved_bytes(model, torch.rand(scenes, 4, 3, 112, 112)) for scenes in (4, 12)]
    # besides what is kept there are the images, the losses and the gradients on their way
    assert 1.0 <= (many - few) / (kept[1] - kept[0]) < 1.5


def test_checkpointing_is_seen_and_the_model_is_left_as_it_was() -> None:
    model = tiny_model(method="full")
    plain = estimate_memory(model, CONFIG, 56, 4, 4)
    model.enable_checkpointing()  # type: ignore[operator]
    frugal = estimate_memory(model, CONFIG, 56, 4, 4)
    assert frugal.step < 0.75 * plain.step
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert plain.optimizer == 8 * trained and plain.images == 16
    assert plain.weights == sum(4 * t.numel() for t in (*model.parameters(), *model.buffers()))
    for parameter in model.parameters():
        assert type(parameter) is torch.nn.Parameter and parameter.grad is None


def test_too_large_a_step_is_refused_with_advice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    model = tiny_model(method="full")
    config = TrainConfig(frames=(2, 4), images_per_step=64, checkpointing=False, device="cpu")
    estimate = check_memory(model, config, 56)
    assert estimate is not None and estimate.images == 64
    assert "memory estimate:" in capsys.readouterr().out
    held = estimate.weights
    monkeypatch.setattr(memory, "available_memory", lambda device: (estimate.total - held) // 2)
    with pytest.raises(ValueError, match=r"--train\.max-images (\d+) would fit") as refusal:
        check_memory(model, config, 56)
    advised = int(str(refusal.value).partition("--train.max-images ")[2].split()[0])
    smaller = check_memory(model, dataclasses.replace(config, max_images=advised), 56)
    assert smaller is not None and smaller.images > 16
    monkeypatch.setattr(memory, "available_memory", lambda device: 1)
    with pytest.raises(ValueError, match=r"one scene of 4 frames needs .* try --train.checkpointing, --train.prec"):
        check_memory(model, config, 56)
    assert check_memory(model, dataclasses.replace(config, check_memory=False), 56) is None


def test_adapters_together_share_the_weights_alone(capsys: pytest.CaptureFixture) -> None:
    model = tiny_model()
    trained = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    config = dataclasses.replace(CONFIG, images_per_step=12)
    one, three = (check_memory(model, config, 56, together=count) for count in (1, 3))
    assert one is not None and three is not None
    assert three.images == 3 * one.images
    assert three.weights == one.weights + 2 * trained and three.optimizer == 3 * one.optimizer == 6 * trained
    assert 2 < three.step / one.step <= 3
    # the bound is one on the images of all
    bounded = check_memory(model, dataclasses.replace(config, max_images=12), 56, together=3)
    assert bounded is not None and bounded.images == 12


def test_largest_pass_is_found_for_budgets_and_processes() -> None:
    config = TrainConfig(frames=(3, 16), images_per_step=48)
    assert memory._largest_pass(config, processes=1) == (3, 16)
    assert memory._largest_pass(config, processes=3) == (2, 12)  # of 4 scenes in a step
    assert memory._largest_pass(dataclasses.replace(config, max_images=17), processes=1) == (1, 16)


def test_peak_memory_is_read_whatever_the_process_is_called() -> None:
    """Ray calls its processes ray::<task>."""
    name = Path("/proc/self/comm")
    before = name.read_text(encoding="ascii").strip()
    try:
        name.write_text("ray::job", encoding="ascii")
        assert peak_memory(torch.device("cpu")) > 2**20
    finally:
        name.write_text(before, encoding="ascii")
