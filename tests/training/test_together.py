"""Adapters trained together end as those trained alone, up to rounding; one that fails leaves the others alone."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters.models import TINY, tiny_vggt
from tolerances import assert_as_exact_as_torch
from torch import nn
from training.plane_scenes import write_plane_scenes
from training.tiny import CONFIG, read_metrics

from subspace3d.adapters.methods import add_lora
from subspace3d.adapters.multi_lora import share_weights
from subspace3d.adapters.parameters import trainable_parameters
from subspace3d.adapters.placement import select_modules
from subspace3d.backbones.protocol import Backbone, Prediction, attach
from subspace3d.backbones.vggt_preset import VGGTBackbone
from subspace3d.datasets.multiview import MultiViewDataset
from subspace3d.files import load_tensors
from subspace3d.locks import FolderInUse, exclusive
from subspace3d.training import together
from subspace3d.training.config import TrainConfig
from subspace3d.training.interfaces import BatchSource
from subspace3d.training.loop import train
from subspace3d.training.run import random_state
from subspace3d.training.together import Member, train_together
from subspace3d.training.tuned import save_adapter

NAMES = "abc"
TRAIN = dataclasses.replace(CONFIG, images_per_step=6)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, MultiViewDataset]:
    folder = tmp_path_factory.mktemp("scenes")
    for index, name in enumerate(NAMES):
        write_plane_scenes(folder / name, scenes=3, views=3, seed=index)
    return {name: MultiViewDataset(folder / name, image_size=28, augment=True) for name in NAMES}


@dataclasses.dataclass
class Changed:
    """A data set with something done to its batches: ``change(batch, step)`` returns them."""

    dataset: BatchSource
    change: Any

    def batch(self, seed: int, step: int, *arguments: Any) -> dict:
        return self.change(self.dataset.batch(seed, step, *arguments), step)


def _double(batch: dict, step: int) -> dict:
    return {
        key: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for key, value in batch.items()
    }


def _member(network: nn.Module, name: str, dataset: BatchSource, out: Path) -> Member:
    torch.manual_seed(ord(name))
    tuned = add_lora(share_weights(network, select_modules(network, "all")), 2, "all")
    tuned.to(next(network.parameters()).dtype)
    snapshot = functools.partial(save_adapter, tuned)
    return Member(name, tuned, dataset, out / name, {"rank": 2}, snapshot, random_state(torch.device("cpu")))


def _network(dtype: torch.dtype = torch.float32) -> nn.Module:
    return tiny_vggt().to(dtype)


def _together(sources: dict[str, Any], out: Path, config: TrainConfig = TRAIN, network: nn.Module | None = None):
    """Results, failures, and all trained values by name."""
    network = network or _network()
    members = [_member(network, name, dataset, out) for name, dataset in sources.items()]
    results, failures = train_together(network, members, config, "test", quiet=True)
    return results, failures, {member.name: _values(member) for member in members}


def _alone(
    name: str, dataset: BatchSource, out: Path, config: TrainConfig = TRAIN, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    member = _member(_network(dtype), name, dataset, out)
    torch.set_rng_state(member.random["cpu"])
    train(member.model, dataset, config, member.out, settings=member.settings, snapshot=member.snapshot, quiet=True)
    return _values(member)


def _values(member: Member) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainable_parameters(member.model).values()])


@dataclasses.dataclass
class Own:
    """What the runs of their own give: values in float32 and in float64, by name, and the folder of the former."""

    values: dict[str, torch.Tensor]
    exact: dict[str, torch.Tensor]
    folder: Path


@pytest.fixture(scope="module")
def own(datasets: dict[str, MultiViewDataset], tmp_path_factory: pytest.TempPathFactory) -> Own:
    folder = tmp_path_factory.mktemp("own")
    values = {name: _alone(name, dataset, folder) for name, dataset in datasets.items()}
    exact = {
        name: _alone(name, Changed(dataset, _double), folder / "exact", dtype=torch.float64)
        for name, dataset in datasets.items()
    }
    return Own(values, exact, folder)


@pytest.mark.parametrize("changes", [{}, {"max_images": 9}])
def test_each_ends_as_its_own_run(datasets: dict[str, Any], own: Own, tmp_path: Path, changes: dict) -> None:
    config = dataclasses.replace(TRAIN, **changes)
    results, failures, values = _together(datasets, tmp_path / "together", config)
    assert failures == {} and {name: result.steps for name, result in results.items()} == dict.fromkeys(NAMES, 6)
    # a run of its own whose passes have as many images as its share here: rounding depends on how a sum is cut
    share = dataclasses.replace(TRAIN, max_images=config.max_images // len(NAMES))
    alone = {
        name: _alone(name, datasets[name], tmp_path / "alone", share) if share.max_images else own.values[name]
        for name in NAMES
    }
    for name in NAMES:
        assert_as_exact_as_torch(values[name], alone[name], own.exact[name], name)
        assert (values[name] != own.values[name]).any(), "the batches were not joined"
        folders = [tmp_path / "together" / name, own.folder / name]
        lines, expected = map(read_metrics, folders)
        for line, other in zip(lines, expected, strict=True):
            assert line.keys() == other.keys()
            for figure in line.keys() - {"seconds"}:
                # relative to terms of size 1, with the rounding of the steps before
                assert line[figure] == pytest.approx(other[figure], rel=1e-5, abs=2e-6), figure
        saved = [folder / "checkpoints/step_6" for folder in folders]
        contents = [{path.relative_to(step).as_posix() for path in step.rglob("*")} for step in saved]
        assert contents[0] == contents[1]
        random = [load_tensors(step / "extra.safetensors")[0] for step in saved]
        assert random[0].keys() == random[1].keys() == {"rng.0.cpu"}
        assert torch.equal(random[0]["rng.0.cpu"], random[1]["rng.0.cpu"])


def test_in_bfloat16_each_is_as_exact_as_its_own_run(datasets: dict[str, Any], own: Own, tmp_path: Path) -> None:
    config = dataclasses.replace(TRAIN, precision="bf16")
    _, failures, values = _together({name: datasets[name] for name in "ab"}, tmp_path / "together", config)
    assert failures == {}
    alone = _alone("a", datasets["a"], tmp_path / "alone", config)
    assert_as_exact_as_torch(values["a"], alone, own.exact["a"], "a")


def test_in_float64_together_and_alone_are_one(datasets: dict[str, Any], own: Own, tmp_path: Path) -> None:
    doubled = {name: Changed(dataset, _double) for name, dataset in datasets.items()}
    _, failures, values = _together(doubled, tmp_path / "together", network=_network(torch.float64))
    assert failures == {}
    for name in NAMES:
        # AdamW divides by |g| + 1e-8: an entry's step moves by at most lr / 1e-8 times the error of its gradient, which
        # after clipping is at most 1, summed over some 1e3 terms; measured 6e-16
        epsilon = torch.finfo(torch.float64).eps
        allowed = TRAIN.steps * TRAIN.lr / 1e-8 * 1e3 * epsilon
        torch.testing.assert_close(values[name], own.exact[name], rtol=0, atol=allowed)


def test_a_stopped_run_continues_with_the_same_bits(
    datasets: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def stop(batch: dict, step: int) -> dict:
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch

    _, _, straight = _together(datasets, tmp_path / "straight")
    with pytest.raises(SystemExit) as end:
        _together({**datasets, "b": Changed(datasets["b"], stop)}, tmp_path / "stopped")
    assert end.value.code == 128 + signal.SIGTERM
    assert "the same command continues" in capsys.readouterr().err
    saved = {path.name for name in NAMES for path in (tmp_path / "stopped" / name / "checkpoints").iterdir()}
    assert len(saved) == 2 and saved < {"step_3", "step_4", "step_5"}
    results, failures, values = _together(datasets, tmp_path / "stopped")
    assert failures == {} and all(result.steps == 6 for result in results.values())
    for name in NAMES:
        assert torch.equal(values[name], straight[name])
        assert [line["step"] for line in read_metrics(tmp_path / "stopped" / name)] == list(range(1, 7))


class Cut(Exception):
    pass


def _cut(batch: dict, step: int) -> dict:
    if step == 4:
        raise Cut
    return batch


def test_runs_cut_off_at_different_steps_go_on_together(datasets: dict[str, Any], own: Own, tmp_path: Path) -> None:
    # a has its checkpoint of step 3, b those of a whole run, c none
    with pytest.raises(Cut):
        _alone("a", Changed(datasets["a"], _cut), tmp_path)
    shutil.copytree(own.folder / "b", tmp_path / "b")
    _, failures, values = _together(datasets, tmp_path)
    assert failures == {} and torch.equal(values["b"], own.values["b"])
    for name in NAMES:
        assert_as_exact_as_torch(values[name], own.values[name], own.exact[name], name)


def test_one_that_was_cut_off_goes_on_alone(datasets: dict[str, Any], own: Own, tmp_path: Path) -> None:
    _, failures, _ = _together({name: Changed(datasets[name], _cut) for name in "ab"}, tmp_path)
    assert [type(error) for error in failures.values()] == [Cut, Cut]
    assert_as_exact_as_torch(_alone("a", datasets["a"], tmp_path), own.values["a"], own.exact["a"])
    assert [line["step"] for line in read_metrics(tmp_path / "a")] == list(range(1, 7))


def _poison(batch: dict, step: int) -> dict:
    return {**batch, "images": batch["images"] * float("nan")}


def test_a_loss_that_is_not_finite_changes_no_other_adapter(datasets: dict[str, Any], tmp_path: Path) -> None:
    _, _, healthy = _together(datasets, tmp_path / "healthy")
    poisoned = {**datasets, "b": Changed(datasets["b"], lambda batch, step: _poison(batch, step) if step else batch)}
    results, failures, values = _together(poisoned, tmp_path / "poisoned")
    assert failures == {} and results["b"].skipped == 5 and results["b"].loss is not None
    assert torch.equal(values["a"], healthy["a"]) and torch.equal(values["c"], healthy["c"])
    assert torch.isfinite(values["b"]).all()


def test_the_others_go_on_without_one_that_fails(datasets: dict[str, Any], tmp_path: Path) -> None:
    config = dataclasses.replace(TRAIN, steps=12)

    def damaged(batch: dict, step: int) -> dict:
        if step == 2:
            raise ValueError("0001.png is not a whole image")
        return batch

    sources = {"a": Changed(datasets["a"], damaged), "b": Changed(datasets["b"], _poison), "c": datasets["c"]}
    results, failures, values = _together(sources, tmp_path / "together", config)
    assert {name: str(error).partition(";")[0] for name, error in failures.items()} == {
        "a": "0001.png is not a whole image",
        "b": "loss or gradient was not finite in 10 steps in a row, up to step 10",
    }
    assert list(results) == ["c"] and results["c"].steps == 12
    exact = _alone("c", Changed(datasets["c"], _double), tmp_path / "exact", config, torch.float64)
    assert_as_exact_as_torch(values["c"], _alone("c", datasets["c"], tmp_path / "alone", config), exact)
    with exclusive(tmp_path / "together/c"):
        pass  # let go of


def test_a_folder_in_use_is_left_to_its_holder(datasets: dict[str, Any], tmp_path: Path, monkeypatch) -> None:
    from subspace3d.training import together

    def refuse(folder: Path):
        if folder.name == "b":
            raise FolderInUse("another process is at work on b")
        return exclusive(folder)

    monkeypatch.setattr(together, "exclusive", refuse)
    results, failures, _ = _together(datasets, tmp_path, dataclasses.replace(TRAIN, steps=1))
    assert list(results) == ["a", "c"] and isinstance(failures["b"], FolderInUse)
    assert not (tmp_path / "b").exists()


class Reordering(VGGTBackbone):
    """As a network that goes through a batch view by view, or as here backwards."""

    def __call__(self, model: nn.Module, images: torch.Tensor) -> Prediction:
        found = super().__call__(model, images.flip(0))
        return Prediction(
            depth=found.depth.flip(0),
            confidence=found.confidence.flip(0),
            stages=tuple(each.flip(0) for each in found.stages),
        )


class Drawing(VGGTBackbone):
    def __call__(self, model: nn.Module, images: torch.Tensor) -> Prediction:
        return super().__call__(model, images + 0 * torch.rand(()))


@pytest.mark.parametrize(
    ("backbone", "message"),
    [(Reordering, "it does not keep the scenes of a batch one after the"), (Drawing, "its forward pass draws random")],
)
def test_networks_that_cannot_be_shared_are_refused(
    datasets: dict[str, Any], tmp_path: Path, backbone, message: str
) -> None:
    network = attach(_network(), backbone(TINY))
    with pytest.raises(ValueError, match=f"together must be 1 on tiny: {message}"):
        _together(datasets, tmp_path, network=network)


def test_batches_of_another_shape_and_small_budgets_are_refused(datasets: dict[str, Any], tmp_path: Path) -> None:
    def fewer(batch: dict, step: int) -> dict:
        return {key: value[:1] for key, value in batch.items()}

    with pytest.raises(ValueError, match=r"data sets whose batches differ in shape, got a \[\(2, .*, b \[\(1, "):
        _together({"a": datasets["a"], "b": Changed(datasets["b"], fewer)}, tmp_path / "shapes")
    with pytest.raises(ValueError, match="max_images must be 0 or at least 9, one scene of 3 frames for each of 3"):
        _together(datasets, tmp_path / "budget", dataclasses.replace(TRAIN, max_images=8))


def test_every_field_of_a_prediction_is_shared_out() -> None:
    sizes = {"depth": (), "points": (3,), "confidence": (), "extrinsics": (3, 4), "intrinsics": (3, 3)}
    fields = {name: torch.rand(4, 2, *size) for name, size in sizes.items()}
    whole = Prediction(**fields, stages=(torch.rand(4, 2, 9), torch.rand(4, 2, 9)))
    assert {field.name for field in dataclasses.fields(Prediction)} == {*fields, "stages", "outputs"}
    for index, share in enumerate(together._shares(whole, 2, Backbone())):
        mine = slice(2 * index, 2 * index + 2)
        assert all(torch.equal(getattr(share, name), values[mine]) for name, values in fields.items())
        assert all(torch.equal(part, stage[mine]) for part, stage in zip(share.stages, whole.stages, strict=True))
