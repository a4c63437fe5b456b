"""The measurements, the cooldown and the export of the pre-training of vggt-nano."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from adapters.models import TINY
from torch import nn
from training.plane_scenes import write_plane_scenes
from training.tiny import read_metrics

from experiments.pretraining import model_card, run
from experiments.pretraining.growing import GrowingScenes
from experiments.pretraining.matching import Pretraining
from experiments.pretraining.measure import measure
from experiments.pretraining.pictures import plot_losses
from subspace3d.backbones.pose import encode_pose
from subspace3d.backbones.vggt import VGGT
from subspace3d.backbones.weights import load_weights
from subspace3d.datasets.multiview import MultiViewDataset
from subspace3d.files import load_tensors
from subspace3d.training.device import Processes
from subspace3d.training.schedule import constant_rate, cooldown_rate


class Oracle(nn.Module):
    """Answers with the true cameras and 7 times the true depth of the scene whose images it is shown."""

    def __init__(self, dataset: MultiViewDataset) -> None:
        super().__init__()
        self.device_holder = nn.Parameter(torch.zeros(1))
        self.scenes = [dataset.scene(index) for index in range(len(dataset))]

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        frames = images.shape[1]
        shown = (images[0].permute(0, 2, 3, 1) * 255).round().byte().numpy()
        scene = next(scene for scene in self.scenes if np.array_equal(scene.images[:frames], shown))
        extrinsics, intrinsics = (torch.from_numpy(a[:frames])[None] for a in (scene.extrinsics, scene.intrinsics))
        return {
            "depth": 7 * torch.from_numpy(scene.depths[:frames])[None, ..., None],
            "pose_enc": encode_pose(extrinsics, intrinsics, (112, 112)),
        }


def test_measure_of_a_perfect_model(tmp_path: Path) -> None:
    dataset = MultiViewDataset(write_plane_scenes(tmp_path, scenes=2, views=3, size=112), 112)
    figures = measure(Oracle(dataset), dataset, frames=3)
    assert figures["abs_rel"] == pytest.approx(0, abs=1e-6)
    assert figures["abs_rel_constant"] > 0.02
    for kind in ("rotation", "translation"):
        assert figures[f"{kind}_error_median_deg"] <= figures[f"{kind}_error_mean_deg"] + 1e-9
        assert figures[f"{kind}_error_mean_deg"] == pytest.approx(0, abs=1e-2)
    # a plane has no edges to find
    assert (figures["edge_recall"], figures["edge_precision"]) == (0, 0)


def test_exported_weights_load_as_the_backbone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, path = VGGT(run.SHAPE), tmp_path / "nano.safetensors"
    run.export(model, path, {"held_out": {"abs_rel": 0.1}})
    assert path.stat().st_size < run.LARGEST_FILE
    header = load_tensors(path)[1]
    assert (header["held_out"], header["backbone"]) == ({"abs_rel": 0.1}, "vggt-nano")
    loaded = VGGT(run.SHAPE)
    load_weights(loaded, path)
    for (name, expected), (_, found) in zip(model.named_parameters(), loaded.named_parameters()):
        assert found.dtype == torch.float32
        assert torch.equal(found, expected.half().float()), name
    with pytest.raises(ValueError, match="at most 20000000 bytes"):
        run.export(nn.Linear(4000, 4000), tmp_path / "large.safetensors", {})


def test_a_run_goes_on_from_exported_weights_and_adds_to_their_record(tmp_path: Path) -> None:
    torch.manual_seed(0)
    before, path = VGGT(run.SHAPE), tmp_path / "nano.safetensors"
    record = {"stages": {"constant rate": {}, "cooldown": {}}, "data": {"scenes": 500}}
    run.export(before, path, record)
    after = VGGT(run.SHAPE)
    earlier = run.load_initial(after, path)
    assert all(torch.equal(a.half(), b.half()) for a, b in zip(before.parameters(), after.parameters()))
    assert earlier["stages"] == record["stages"] and earlier["data"] == record["data"]
    assert run.next_stage(earlier["stages"], "cooldown") == "cooldown 2"
    assert run.next_stage({"cameras": {}}, "cooldown") == "cooldown"
    # from nothing: values that can match, and an empty record
    assert run.load_initial(after, None) == {"stages": {}, "data": {"scenes": 0}}
    assert not torch.equal(next(before.parameters()), next(after.parameters()))


def test_other_processes_wait_until_a_shard_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["pretrain", "--out", str(tmp_path)])
    monkeypatch.setattr(run, "SHARD_SCENES", 2)
    arguments = run.parse_arguments()
    folder = run.shard_folder(arguments, 3)
    ended = threading.Event()

    def wait() -> None:
        assert run.wait_for_shard(arguments, 3) == folder
        ended.set()

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    for scene in ("scene_0000", "scene_0001"):
        assert not ended.wait(0.2)
        (folder / scene).mkdir(parents=True)
        (folder / scene / "scene.json").write_text("{}", encoding="utf-8")
    assert ended.wait(30)


def test_a_cooldown_starts_at_the_long_run_and_leaves_it_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["pretrain", "--out", str(tmp_path), "--images", "6", "--cooldown", "2"])
    arguments = run.parse_arguments()
    with pytest.raises(FileNotFoundError, match="no checkpoint yet"):
        run.branch(tmp_path / "long", arguments, Processes())
    folder = write_plane_scenes(tmp_path / "scenes", scenes=3, views=6, size=56)
    monkeypatch.setattr(run, "SHAPE", dataclasses.replace(TINY, image_size=56))
    scenes = GrowingScenes(lambda number: folder, lambda folders: MultiViewDataset(folders, 56), 1, 1, 1)

    def trainer() -> nn.Module:
        torch.manual_seed(0)
        return Pretraining(VGGT(run.SHAPE), blocks=(1,))

    def constant(step: int) -> float:
        return constant_rate(step, arguments.lr, 1)

    run.run(trainer(), scenes, run.run_config(arguments, 2), tmp_path / "long", constant, "long", Processes())
    before, branched = run.branch(tmp_path / "long", arguments, Processes())
    assert before["step"] == 2 and branched == tmp_path / "cooldown_2_2"

    def falling(step: int) -> float:
        return cooldown_rate(step, 2, 2, arguments.lr)

    cooled = trainer()
    result = run.run(cooled, scenes, run.run_config(arguments, 4), branched, falling, "cooldown", Processes())
    assert result.steps == 4
    assert [line["step"] for line in read_metrics(branched)] == [3, 4]
    assert [line["lr"] for line in read_metrics(branched)] == [falling(2), falling(3)]
    # the long run goes on from where it was, with the same bits as if nothing had been branched off
    run.run(trainer(), scenes, run.run_config(arguments, 3), tmp_path / "long", constant, "long", Processes())
    run.run(trainer(), scenes, run.run_config(arguments, 3), tmp_path / "straight", constant, "long", Processes())
    ends = [load_tensors(tmp_path / name / "checkpoints/step_3/model.safetensors")[0] for name in ("long", "straight")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])
    plot_losses([folder / "metrics.jsonl" for folder in (tmp_path / "long", branched)], 2, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_the_model_card_shows_what_the_script_measures(tmp_path: Path) -> None:
    dataset = MultiViewDataset(write_plane_scenes(tmp_path, scenes=1, views=3, size=112), 112)
    figures = {**measure(Oracle(dataset), dataset, frames=2), "edge_recall": 0.512}
    record = {"steps": 40, "seconds": 120.0}
    recipe = {"images_per_step": 12, "frames": [2, 6], "lr": 1e-3, "camera_weight": 1.0}
    report = {
        "stages": {"cooldown": {"recipe": recipe, "training": record}},
        "data": {"scenes": 10_000, "views": 8},
        "held_out": {"circles": figures},
    }
    run.export(nn.Linear(2, 2), tmp_path / "nano.safetensors", report)
    page = model_card.content(tmp_path / "nano.safetensors")
    assert "| cooldown | 40 | 12 | 2 to 6 | 0.001 | 1 | 2 min |" in page
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()]
    start = next(number for number, line in enumerate(lines) if line[:1] == ["scenes"])
    names, _, row = lines[start : start + 3]
    assert dict(zip(names, row))["edges found"] == "51 %" and dict(zip(names, row))["scenes"] == "circles"
    assert len(names) == len(set(figures)) + 1  # every figure has its column
    assert ["depth edges found within 2 pixels, circles", "51 %", "50 %"] in lines
