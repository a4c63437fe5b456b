from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import nn
from training.plane_scenes import plane_views, write_plane_scenes
from training.tiny import CONFIG, read_metrics, tiny_model, without_time

from experiments.pretraining.muon import Muon, muon_groups
from subspace3d.adapters.parameters import trainable_parameters
from subspace3d.backbones.losses import LossCounts
from subspace3d.datasets.multiview import MultiViewDataset
from subspace3d.formats.scene import write_scene
from subspace3d.training import checkpoints
from subspace3d.training.loop import train
from subspace3d.training.step import set_modes


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> MultiViewDataset:
    folder = tmp_path_factory.mktemp("scenes")
    return MultiViewDataset(write_plane_scenes(folder, scenes=2, views=3), image_size=28, augment=True)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> MultiViewDataset:
    """Three scenes, one with little valid depth and one whose first frames have none."""
    folder = tmp_path_factory.mktemp("uneven")
    for index, valid in enumerate((28, 9, 0)):
        images, depths, intrinsics, extrinsics = plane_views(index, views=3, size=28)
        depths[:2, valid:] = 0
        write_scene(folder / f"scene_{index}", images, depths, intrinsics, extrinsics, provenance={})
    return MultiViewDataset(folder, image_size=28)


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
    straight = tiny_model()
    train(straight, dataset, CONFIG, tmp_path / "straight")

    with pytest.raises(SystemExit) as stop:
        # the batch of step 2 is drawn while step 1 runs
        train(tiny_model(), StopAfter(dataset, 2, number), CONFIG, tmp_path / "stopped")
    assert stop.value.code == 128 + number and "continues from" in capsys.readouterr().err
    newest = checkpoints.latest(tmp_path / "stopped/checkpoints")
    assert newest is not None and 1 <= int(newest.name.removeprefix("step_")) < 6
    with open(tmp_path / "stopped/metrics.jsonl", "a") as file:
        file.write('{"step": 99}\n{"step": 4, "lo')

    resumed = tiny_model()
    result = train(resumed, dataset, CONFIG, tmp_path / "stopped")
    assert result.steps == 6
    assert without_time(read_metrics(tmp_path / "stopped")) == without_time(read_metrics(tmp_path / "straight"))
    for (name, expected), (_, found) in zip(straight.named_parameters(), resumed.named_parameters()):
        assert torch.equal(expected, found), name
    assert signal.getsignal(number) is handler


def test_finished_run_is_not_done_again(dataset: MultiViewDataset, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, steps=2)
    first = train(tiny_model(), dataset, config, tmp_path)
    again = train(tiny_model(), dataset, config, tmp_path)
    assert (again.steps, again.loss) == (2, first.loss)
    over = train(tiny_model(), dataset, dataclasses.replace(config, lr=1e-4), tmp_path, resume=False)
    assert over.steps == 2 and len(read_metrics(tmp_path)) == 2


def test_other_settings_are_refused(dataset: MultiViewDataset, tmp_path: Path) -> None:
    train(tiny_model(), dataset, dataclasses.replace(CONFIG, steps=1), tmp_path, settings={"rank": 2})
    with pytest.raises(ValueError, match=r"lr must be 0\.001 to continue"):
        train(tiny_model(), dataset, dataclasses.replace(CONFIG, steps=1, lr=1.0), tmp_path, settings={"rank": 2})
    with pytest.raises(ValueError, match="rank must be 2 to continue"):
        train(tiny_model(), dataset, dataclasses.replace(CONFIG, steps=1), tmp_path, settings={"rank": 3})


def test_a_setting_that_did_not_exist_had_its_default(dataset: MultiViewDataset, tmp_path: Path) -> None:
    train(tiny_model(), dataset, dataclasses.replace(CONFIG, steps=1), tmp_path)
    record = tmp_path / "checkpoints/step_1/state.json"
    state = json.loads(record.read_text())
    assert state["settings"].pop("nearby") == CONFIG.nearby
    record.write_text(json.dumps(state))
    train(tiny_model(), dataset, dataclasses.replace(CONFIG, steps=1), tmp_path)
    with pytest.raises(ValueError, match=r"nearby must be 0\.0 to continue"):
        train(tiny_model(), dataset, dataclasses.replace(CONFIG, steps=1, nearby=2.0), tmp_path)


def test_only_what_is_trainable_moves_and_loss_falls(dataset: MultiViewDataset, tmp_path: Path) -> None:
    model = tiny_model(method="full")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = dataclasses.replace(CONFIG, steps=12, augment=False, frames=(3, 3), images_per_step=6)
    train(model, dataset, config, tmp_path)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and not any(name.startswith("aggregator.patch_embed") for name in moved)
    losses = [line["loss"] for line in read_metrics(tmp_path)]
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])


def test_frozen_modules_are_in_evaluation_mode() -> None:
    model = tiny_model()
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
    model = tiny_model()
    result = train(model, Poisoned(dataset, range(1, 3)), dataclasses.replace(CONFIG, steps=4), tmp_path)
    assert result.skipped == 2
    assert [line["loss"] is None for line in read_metrics(tmp_path)] == [False, True, True, False]
    assert [line["skipped"] for line in read_metrics(tmp_path)] == [0, 1, 2, 2]
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_ten_non_finite_steps_stop_the_run(dataset: MultiViewDataset, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, steps=40, save_every=2)
    with pytest.raises(FloatingPointError, match="10 steps in a row, up to step 13"):
        train(tiny_model(), Poisoned(dataset, range(3, 40)), config, tmp_path)
    newest = checkpoints.latest(tmp_path / "checkpoints")
    assert newest is not None
    model = tiny_model()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    checkpoints.load(newest, parameters, torch.optim.AdamW(parameters.values()))
    assert all(parameter.isfinite().all() for parameter in parameters.values())


def test_a_short_run_of_which_no_step_is_finite_is_no_result(dataset: MultiViewDataset, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="3 steps in a row, up to step 3"):
        train(tiny_model(), Poisoned(dataset, range(3)), dataclasses.replace(CONFIG, steps=3), tmp_path)


def test_nothing_to_train(dataset: MultiViewDataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="trainable"):
        train(tiny_model(method="none"), dataset, CONFIG, tmp_path)


def test_bf16(dataset: MultiViewDataset, tmp_path: Path) -> None:
    train(tiny_model(), dataset, dataclasses.replace(CONFIG, steps=2, precision="bf16"), tmp_path)
    assert all(line["loss"] is not None for line in read_metrics(tmp_path))


class Recorder:
    """Keeps the gradients of the first step, adds to the loss, and draws from the global random generator."""

    def __init__(self, model: torch.nn.Module, weight: float = 0.0) -> None:
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.weight = weight
        self.gradients: dict[str, torch.Tensor] = {}
        self.steps: list[int] = []
        self.drawn: list[float] = []
        self.total = torch.zeros(())

    def extra_loss(self) -> torch.Tensor:
        return self.weight * torch.stack([p.sum() for p in self.parameters.values()]).sum()

    def after_step(self, step: int) -> None:
        self.steps.append(step)
        self.drawn.append(float(torch.rand(())))
        self.total += step
        if not self.gradients:
            self.gradients = {name: p.grad.clone() for name, p in self.parameters.items() if p.grad is not None}

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"total": self.total}


@pytest.mark.parametrize("max_images", [3, 6])
def test_accumulated_gradients_are_those_of_the_whole_step(
    uneven: MultiViewDataset, tmp_path: Path, max_images: int
) -> None:
    config = dataclasses.replace(CONFIG, steps=1, frames=(3, 3), images_per_step=9, clip_norm=1e9)
    gradients = []
    for budget in (0, max_images):  # three scenes at once; in parts of 1, 1, 1 or of 2, 1
        model = tiny_model(method="full")
        recorder = Recorder(model)
        train(model, uneven, dataclasses.replace(config, max_images=budget), tmp_path / str(budget), hook=recorder)
        gradients.append(recorder.gradients)
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 50
    for name, expected in gradients[0].items():
        # float32 sums over the same terms in another order, relative to the largest entry
        tolerance = 2e-5 * max(1e-3, float(expected.abs().max()))
        torch.testing.assert_close(gradients[1][name], expected, rtol=0, atol=tolerance, msg=name)
    first, second = (read_metrics(tmp_path / str(budget))[0] for budget in (0, max_images))
    assert second["loss"] == pytest.approx(first["loss"], rel=1e-5)


def test_hook_and_random_state_are_resumed(dataset: MultiViewDataset, tmp_path: Path) -> None:
    straight = Recorder(model := tiny_model(), weight=0.01)
    train(model, dataset, CONFIG, tmp_path / "straight", hook=straight)
    assert read_metrics(tmp_path / "straight")[0]["regularizer"] != 0

    early = Recorder(model := tiny_model(), weight=0.01)
    with pytest.raises(SystemExit):
        train(model, StopAfter(dataset, 2, signal.SIGTERM), CONFIG, tmp_path / "cut", hook=early)
    late = Recorder(model := tiny_model(), weight=0.01)
    torch.manual_seed(99)  # to be replaced by the state in the checkpoint
    train(model, dataset, CONFIG, tmp_path / "cut", hook=late)
    assert early.steps + late.steps == straight.steps == [1, 2, 3, 4, 5, 6]
    assert early.drawn + late.drawn == straight.drawn
    assert float(late.total) == float(straight.total) == 21
    assert without_time(read_metrics(tmp_path / "cut")) == without_time(read_metrics(tmp_path / "straight"))


def test_full_disk_leaves_the_previous_checkpoint(
    dataset: MultiViewDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(CONFIG, save_every=2)
    straight = tiny_model()
    train(straight, dataset, config, tmp_path / "straight")

    writes = 0
    save_tensors = checkpoints.save_tensors

    def fail_late(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        nonlocal writes
        writes += 1
        save_tensors(path, tensors)
        if writes == 5:  # the optimiser of the second checkpoint
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_tensors", fail_late)
    with pytest.raises(OSError, match="No space left"):
        train(tiny_model(), dataset, config, tmp_path / "full")
    assert [entry.name for entry in (tmp_path / "full/checkpoints").iterdir()] == ["step_2"]
    monkeypatch.undo()
    resumed = tiny_model()
    train(resumed, dataset, config, tmp_path / "full")
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters()))


def test_one_run_at_a_time_in_a_folder(dataset: MultiViewDataset, tmp_path: Path) -> None:
    with open(tmp_path / ".lock", "w", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as another process would: the file is opened once more
        with pytest.raises(ValueError, match="another process is at work on"):
            train(tiny_model(), dataset, CONFIG, tmp_path)


def test_tensorboard_continues_without_duplicates(dataset: MultiViewDataset, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = dataclasses.replace(CONFIG, trackers=("tensorboard",))
    with pytest.raises(SystemExit):
        train(tiny_model(), StopAfter(dataset, 2, signal.SIGTERM), config, tmp_path)
    train(tiny_model(), dataset, config, tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = events.Scalars("train/loss")
    assert [event.step for event in losses] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in losses] == pytest.approx([line["loss"] for line in read_metrics(tmp_path)])


@pytest.mark.slow(reason="starts the service of wandb, five seconds")
def test_wandb_writes_one_run_for_both_starts(
    dataset: MultiViewDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = dataclasses.replace(CONFIG, trackers=("wandb",))
    with pytest.raises(SystemExit):
        train(tiny_model(), StopAfter(dataset, 2, signal.SIGTERM), config, tmp_path)
    train(tiny_model(), dataset, config, tmp_path)
    identity = (tmp_path / "wandb_run.txt").read_text()
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*/run-{identity}.wandb"))) == 2


def test_an_objective_of_the_callers_own_takes_the_place_of_the_loss(dataset: MultiViewDataset, tmp_path: Path) -> None:
    weights = []

    def fields_of_view(predictions: dict, batch: dict, camera_weight: float, counts: LossCounts) -> dict:
        weights.append(camera_weight)
        angles = predictions["pose_enc"][..., 7:]
        return {"loss": (angles - 0.5).abs().sum(), "mean": angles.detach().mean()}

    model = tiny_model(method="full")
    before = model.state_dict()["depth_head.norm.weight"].clone()
    train(model, dataset, CONFIG, tmp_path, objective=fields_of_view)
    lines = read_metrics(tmp_path)
    assert lines[-1]["loss"] < lines[0]["loss"] and "mean" in lines[0]
    assert weights == [CONFIG.camera_weight] * CONFIG.steps
    assert torch.equal(model.state_dict()["depth_head.norm.weight"], before)


def test_a_run_at_a_constant_rate_continues_to_any_length_with_the_same_bits(
    dataset: MultiViewDataset, tmp_path: Path
) -> None:
    def run(steps: int, out: Path) -> nn.Module:
        model = tiny_model(method="full")
        optimizer = Muon(muon_groups(trainable_parameters(model), 0.05), CONFIG.lr)
        config = dataclasses.replace(CONFIG, steps=steps)
        train(model, dataset, config, out, optimizer=optimizer, rate=lambda step: 1e-3 / (1 + step))
        return model

    straight = run(4, tmp_path / "straight")
    run(2, tmp_path / "longer")
    longer = run(4, tmp_path / "longer")
    lines = read_metrics(tmp_path / "longer")
    assert [line["lr"] for line in lines] == [1e-3, 1e-3 / 2, 1e-3 / 3, 1e-3 / 4]
    assert without_time(lines) == without_time(read_metrics(tmp_path / "straight"))
    for (name, expected), (_, found) in zip(straight.named_parameters(), longer.named_parameters()):
        assert torch.equal(expected, found), name
