"""The command fit on the smallest model: values, exit codes, what is written, what is not done twice."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters.models import TINY, tiny_vggt, write_subspace
from training.plane_scenes import plane_views, write_plane_scenes
from training.tiny import CONFIG

from subspace3d.adapters.basis import basis_for_model
from subspace3d.backbones.config import CONFIGS
from subspace3d.backbones.pose import decode_pose
from subspace3d.backbones.record import load_backbone, record_backbone
from subspace3d.commands import adapt, fit, mine, report
from subspace3d.commands.adapt import AdaptConfig
from subspace3d.commands.fit import FitConfig
from subspace3d.commands.mine import MineConfig
from subspace3d.commands.report import ReportConfig
from subspace3d.datasets.multiview import MultiViewDataset
from subspace3d.files import read_json, write_json
from subspace3d.formats.scene import Frame, load_images, write_frames
from subspace3d.jobs import cluster
from subspace3d.training.consistency import consistency_loss
from subspace3d.training.gradients import summed_gradients

TRAIN = dataclasses.replace(CONFIG, augment=False, check_memory=False)


@pytest.fixture(autouse=True)
def tiny_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONFIGS, "vggt-nano", dataclasses.replace(TINY, name="vggt-nano"))


def config(tmp_path: Path, *subspaces: Path, **changes: object) -> FitConfig:
    settings = {"weights": Path("random"), "batches": 4, "train": TRAIN, **changes}
    return FitConfig(tmp_path / "scenes", subspaces, tmp_path / "fit", **settings)  # type: ignore[arg-type]


def test_random_subspaces_do_not_fit_and_the_values_are_those_of_the_gradient(tmp_path: Path) -> None:
    write_plane_scenes(tmp_path / "scenes", scenes=3, views=3)
    files = [write_subspace(tmp_path / f"{name}.safetensors", tiny_vggt(), 2, seed) for seed, name in enumerate("ab")]
    with pytest.raises(SystemExit) as end:
        fit.run(config(tmp_path, *files))
    assert end.value.code == fit.DOES_NOT_FIT
    record = read_json(tmp_path / "fit" / "fit.json")
    assert (record["format"], record["version"], record["K"]) == ("subspace3d-fit", 1, 4)
    assert record["verdict"] in ("weak", "chance") and (tmp_path / "fit" / "fit.png").stat().st_size > 10_000

    model = load_backbone(record_backbone("vggt-nano", Path("random"), TRAIN.seed))
    basis = basis_for_model(files, model)
    dataset = MultiViewDataset(tmp_path / "scenes", 28)
    weights = {name: model.get_parameter(f"{name}.weight") for name in basis}
    inside, whole = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for name, sums in summed_gradients(model, weights, dataset, TRAIN, ((0, 2), (1, 3))):
        u, v = basis[name]
        energy = (u.double().T @ sums.double() @ v.double()).square().sum((1, 2))
        inside, whole = inside + energy, whole + sums.double().square().sum((1, 2))
        share = record["modules"][name]["shares"]["basis"]["core"]
        assert share == pytest.approx(float(energy.sum() / sums.double().square().sum()), rel=1e-3, abs=1e-6)
    assert record["shares"]["basis"]["core"] == pytest.approx(float(inside.sum() / whole.sum()), rel=1e-3)
    page = report.run(ReportConfig(tmp_path)).read_text(encoding="utf-8")
    assert record["sentence"] in page and f"directions, K = {record['K']}" in page
    assert record["by_part"]["basis"] == pytest.approx((inside / whole).tolist(), rel=1e-3)
    # of random subspaces about what chance says
    assert 0.2 < record["shares"]["basis"]["core"] / record["shares"]["random"]["core"] < 5


def test_a_basis_of_the_scenes_own_gradient_fits_and_is_not_measured_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_plane_scenes(tmp_path / "scenes", scenes=3, views=3)
    settings = {"rank": 4, "gradient_only": True, "targets": "aggregator", "weights": Path("random"), "train": TRAIN}
    adapt.run(AdaptConfig(tmp_path / "scenes", tmp_path / "own", **settings))  # type: ignore[arg-type]
    subspace = mine.run(MineConfig(tmp_path / "own", tmp_path / "own.safetensors", k=4))
    record = fit.run(config(tmp_path, subspace))
    shares = {name: sides["core"] for name, sides in record["shares"].items()}
    assert record["verdict"] == "fits" and shares["basis"] > 3 * shares["psv"] > 0
    assert record["sentence"] in capsys.readouterr().out
    # one file of one attribute: nothing to choose among
    assert record["suggested"]["attributes"] is None and record["passes"] == 1

    damaged = read_json(tmp_path / "fit" / "fit.json")
    monkeypatch.setattr(fit, "_measure", lambda *_: pytest.fail("measured again"))
    assert fit.run(config(tmp_path, subspace)) == record
    assert record["sentence"] in capsys.readouterr().out
    write_json(tmp_path / "fit" / "fit.json", {**damaged, "verdict": "perfect"})
    with pytest.raises(ValueError, match=r"fit\.json: verdict must be 'fits' or 'weak' or 'chance', got 'perfect'"):
        fit.run(config(tmp_path, subspace))


class _OneByOne:
    """A cluster that does its jobs here, until one of them is lost."""

    cpus, device = 1, "cpu"

    def __init__(self, lost: str = "") -> None:
        self.lost, self.done = lost, list[str]()

    def run_jobs(self, names: list[str], setup: Any, argument: Any, done: Any, *_: Any) -> dict[str, str]:
        work = setup(argument, 0)
        for name in names:
            if name == self.lost:
                return {name: "its machine died"}
            before = (argument.folder / name).is_dir()
            work(name)
            self.done += [] if before else [name]
        return {}


def test_gradients_of_a_cluster_are_those_of_one_machine_and_are_taken_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_plane_scenes(tmp_path / "scenes", scenes=3, views=3)
    subspace = write_subspace(tmp_path / "a.safetensors", tiny_vggt(), 2, 0)
    alone = fit.run(config(tmp_path, subspace))
    there = dataclasses.replace(config(tmp_path, subspace), out=tmp_path / "there", ray="auto")
    joined = _OneByOne(lost="2")
    monkeypatch.setattr(cluster, "joined_cluster", lambda *_, **__: contextlib.nullcontext(joined))
    # one batch of four is lost, and with it the run; the next takes those that are missing
    with pytest.raises(SystemExit) as end:
        fit.run(there)
    assert end.value.code == 1 and joined.done == ["0", "1"]
    joined.lost = ""
    assert fit.run(there) == alone and joined.done == ["0", "1", "2", "3"]
    assert {path.name for path in there.out.iterdir()} == {path.name for path in (tmp_path / "fit").iterdir()}


def write_images(folder: Path, views: int) -> None:
    images, _, _, _ = plane_views(3, views, 28)
    write_frames(folder, (Frame(image) for image in images), {})


def test_images_without_cameras_are_measured_by_the_agreement_of_their_views(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "scenes/a", 2)
    subspace = write_subspace(tmp_path / "a.safetensors", tiny_vggt(), 2, 0)
    with pytest.raises(SystemExit):
        fit.run(config(tmp_path, subspace))
    record = read_json(tmp_path / "fit" / "fit.json")
    assert record["teacher"] == "views"
    assert "of the gradient of the views' agreement on" in record["sentence"]
    assert "There are no cameras" in record["sentence"] and record["sentence"] in capsys.readouterr().out
    page = report.run(ReportConfig(tmp_path)).read_text(encoding="utf-8")
    assert "views&#x27; agreement" in page or "views' agreement" in page

    # of two views every step sees both, in one order or the other: the gradient anew, without any of that code
    model = load_backbone(record_backbone("vggt-nano", Path("random"), TRAIN.seed))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    images = torch.from_numpy(load_images(tmp_path / "scenes/a")).permute(0, 3, 1, 2).float() / 255
    gradients = []
    for order in ([0, 1], [1, 0]):
        outputs = model(images[order][None])
        extrinsics, intrinsics = decode_pose(outputs["pose_enc"].float(), (28, 28))
        depth = outputs["depth"][0, ..., 0].float()
        loss = consistency_loss(images[order], depth, extrinsics[0], intrinsics[0], [(0, 1), (1, 0)])["loss"]
        gradients.append(
            torch.autograd.grad(loss, [model.get_parameter(f"{name}.weight") for name in record["modules"]])
        )
    basis = basis_for_model([subspace], model)
    for index, (name, values) in enumerate(record["modules"].items()):
        u, v = (side.double() for side in basis[name])
        possible = []
        for flipped in itertools.product((0, 1), repeat=4):  # the order in each of the four batches
            halves = [sum(gradients[flipped[i]][index].double() for i in (half, half + 2)) for half in range(2)]
            inside = sum(float((u.T @ half @ v).square().sum()) for half in halves)  # type: ignore[operator, union-attr]
            possible.append(inside / sum(float(half.square().sum()) for half in halves))  # type: ignore[union-attr]
        share = values["shares"]["basis"]["core"]
        assert min(abs(share - other) for other in possible) < 1e-6 + 1e-3 * share


def test_scenes_with_and_without_cameras_are_measured_together(tmp_path: Path) -> None:
    write_plane_scenes(tmp_path / "scenes", scenes=1, views=3)
    write_images(tmp_path / "scenes/photos", 4)
    subspace = write_subspace(tmp_path / "a.safetensors", tiny_vggt(), 2, 0)
    with contextlib.suppress(SystemExit):  # whether it fits does not matter here
        fit.run(config(tmp_path, subspace))
    record = read_json(tmp_path / "fit" / "fit.json")
    assert record["teacher"] == "both" and "Scenes without cameras or depth" in record["sentence"]
    assert record["shares"]["basis"]["core"] > 0


def test_a_single_image_without_depth_is_refused_by_its_name(tmp_path: Path) -> None:
    write_images(tmp_path / "scenes/one", 1)
    subspace = write_subspace(tmp_path / "a.safetensors", tiny_vggt(), 2, 0)
    with pytest.raises(ValueError, match=r"one/scene\.json must have depth and cameras, or at least 2 images"):
        fit.run(config(tmp_path, subspace))
    assert not (tmp_path / "fit").exists()


def test_shares_of_folders_without_cameras_are_refused_and_so_is_one_image_a_step(tmp_path: Path) -> None:
    write_images(tmp_path / "photos/a", 4)
    subspace = write_subspace(tmp_path / "a.safetensors", tiny_vggt(), 2, 0)
    (tmp_path / "mixture.yaml").write_text("photos: 1\n")
    with pytest.raises(ValueError, match="scenes must be a folder where frames have no cameras"):
        fit.run(dataclasses.replace(config(tmp_path, subspace), scenes=tmp_path / "mixture.yaml"))
    single = dataclasses.replace(TRAIN, frames=(1, 1), images_per_step=1)
    with pytest.raises(ValueError, match="images_per_step must be at least 2 where no depth is known, got 1"):
        fit.run(dataclasses.replace(config(tmp_path, subspace, train=single), scenes=tmp_path / "photos"))


def test_settings_out_of_range_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batches must be at least 2"):
        config(tmp_path, tmp_path / "a.safetensors", batches=1)
    with pytest.raises(ValueError, match="subspaces must be at least one"):
        config(tmp_path)
