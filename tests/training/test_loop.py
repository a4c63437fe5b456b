from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import nn
from training.plane_scenes import write_plane_scenes

from subspace3d.adapters.methods import apply_method
from subspace3d.backbones.config import VGGTConfig
from subspace3d.backbones.vggt import VGGT
from subspace3d.configs import TrainConfig
from subspace3d.datasets.multiview import MultiViewDataset
from subspace3d.training import checkpoints
from subspace3d.training.loop import set_modes, train

TINY = VGGTConfig(
    name="tiny",
    image_size=28,
    embed_dim=32,
    num_heads=2,
    encoder_depth=1,
    depth=2,
    layer_scale=1.0,
    camera_depth=1,
    depth_features=16,
    depth_channels=(16, 16, 16, 16),
    depth_taps=(0, 0, 1, 1),
)
CONFIG = TrainConfig(
    steps=6,
    lr=1e-3,
    frames=(2, 3),
    images_per_step=3,
    save_every=3,
    augment=True,
    device="cpu",
    threads=1,
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> MultiViewDataset:
    folder = tmp_path_factory.mktemp("scenes")
    return MultiViewDataset(write_plane_scenes(folder, scenes=2, views=3), image_size=28, augment=True)


def _model(seed: int = 0, method: str = "lora") -> nn.Module:
    torch.manual_seed(seed)
    return apply_method(VGGT(TINY), method, rank=2)  # type: ignore[arg-type]


def _metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def _without_time(lines: list[dict]) -> list[dict]:
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


class StopAfter(MultiViewDataset):
    """Sends a signal to this process while the batch of one step is drawn."""

    def __init__(self, dataset: MultiViewDataset, step: int, number: signal.Signals) -> None:
        self.__dict__.update(dataset.__dict__)
        self.step, self.number = step, number

    def batch(self, seed: int, step: int, *arguments, **keywords) -> dict:
        if step == self.step:
            os.kill(os.getpid(), self.number)
        return super().batch(seed, step, *arguments, **keywords)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_run_continues_with_the_same_bits(
    dataset: MultiViewDataset, tmp_path: Path, number: signal.Signals, capsys: pytest.CaptureFixture
) -> None:
    handler = signal.getsignal(number)
    straight = _model()
    train(straight, dataset, CONFIG, tmp_path / "straight")

    with pytest.raises(SystemExit) as stop:
        # the batch of step 2 is drawn while step 1 runs
        train(_model(), StopAfter(dataset, 2, number), CONFIG, tmp_path / "stopped")
    assert stop.value.code == 128 + number and "continues from" in capsys.readouterr().err
    newest = checkpoints.latest(tmp_path / "stopped/checkpoints")
    assert newest is not None and 1 <= int(newest.name.removeprefix("step_")) < 6
    with open(tmp_path / "stopped/metrics.jsonl", "a") as file:
        file.write('{"step": 99}\n{"step": 4, "lo')

    resumed = _model()
    result = train(resumed, dataset, CONFIG, tmp_path / "stopped")
    assert result.steps == 6
    assert _without_time(_metrics(tmp_path / "stopped")) == _without_time(_metrics(tmp_path / "straight"))
    for (name, expected), (_, found) in zip(straight.named_parameters(), resumed.named_parameters()):
        assert torch.equal(expected, found), name
    assert signal.getsignal(number) is handler


def test_finished_run_is_not_done_again(dataset: MultiViewDataset, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, steps=2)
    first = train(_model(), dataset, config, tmp_path)
    again = train(_model(), dataset, config, tmp_path)
    assert (again.steps, again.loss) == (2, first.loss)
    over = train(_model(), dataset, dataclasses.replace(config, lr=1e-4), tmp_path, resume=False)
    assert over.steps == 2 and len(_metrics(tmp_path)) == 2


def test_other_settings_are_refused(dataset: MultiViewDataset, tmp_path: Path) -> None:
    train(_model(), dataset, dataclasses.replace(CONFIG, steps=1), tmp_path, settings={"rank": 2})
    with pytest.raises(ValueError, match=r"lr must be 0\.001 to continue"):
        train(_model(), dataset, dataclasses.replace(CONFIG, steps=1, lr=1.0), tmp_path, settings={"rank": 2})
    with pytest.raises(ValueError, match="rank must be 2 to continue"):
        train(_model(), dataset, dataclasses.replace(CONFIG, steps=1), tmp_path, settings={"rank": 3})


def test_only_what_is_trainable_moves_and_loss_falls(dataset: MultiViewDataset, tmp_path: Path) -> None:
    model = _model(method="full")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = dataclasses.replace(CONFIG, steps=12, augment=False, frames=(3, 3), images_per_step=6)
    train(model, dataset, config, tmp_path)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and not any(name.startswith("aggregator.patch_embed") for name in moved)
    losses = [line["loss"] for line in _metrics(tmp_path)]
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])


def test_frozen_modules_are_in_evaluation_mode() -> None:
    model = _model()
    set_modes(model)
    modules = dict(model.named_modules())
    prefix = "base_model.model."
    assert not modules[f"{prefix}aggregator.patch_embed.blocks.0"].training
    assert not modules[f"{prefix}camera_head.token_norm"].training
    assert not modules[f"{prefix}aggregator.frame_blocks.0.attn.qkv.base_layer"].training
    assert modules[f"{prefix}aggregator.frame_blocks.0.attn.qkv.lora_A.default"].training
    assert modules[f"{prefix}aggregator.frame_blocks.0.attn.qkv"].training


class Poisoned(MultiViewDataset):
    """Batches of some steps hold a NaN depth."""

    def __init__(self, dataset: MultiViewDataset, steps: range) -> None:
        self.__dict__.update(dataset.__dict__)
        self.steps = steps

    def batch(self, seed: int, step: int, *arguments, **keywords) -> dict:
        batch = super().batch(seed, step, *arguments, **keywords)
        if step in self.steps:
            batch["depths"][0, 0, 0, 0] = float("nan")
        return batch


def test_non_finite_step_is_skipped_and_counted(dataset: MultiViewDataset, tmp_path: Path) -> None:
    model = _model()
    result = train(model, Poisoned(dataset, range(1, 3)), dataclasses.replace(CONFIG, steps=4), tmp_path)
    assert result.skipped == 2
    assert [line["loss"] is None for line in _metrics(tmp_path)] == [False, True, True, False]
    assert [line["skipped"] for line in _metrics(tmp_path)] == [0, 1, 2, 2]
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_ten_non_finite_steps_stop_the_run(dataset: MultiViewDataset, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, steps=40, save_every=2)
    with pytest.raises(FloatingPointError, match="10 steps in a row, up to step 13"):
        train(_model(), Poisoned(dataset, range(3, 40)), config, tmp_path)
    newest = checkpoints.latest(tmp_path / "checkpoints")
    assert newest is not None
    model = _model()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    checkpoints.load(newest, parameters, torch.optim.AdamW(parameters.values()))
    assert all(parameter.isfinite().all() for parameter in parameters.values())


def test_nothing_to_train(dataset: MultiViewDataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="trainable"):
        train(_model(method="none"), dataset, CONFIG, tmp_path)


def test_bf16(dataset: MultiViewDataset, tmp_path: Path) -> None:
    train(_model(), dataset, dataclasses.replace(CONFIG, steps=2, precision="bf16"), tmp_path)
    assert all(line["loss"] is not None for line in _metrics(tmp_path))
