"""The command fit on the smallest model: values, exit codes, what is written, what is not done twice."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from adapters.models import TINY, tiny_vggt, write_subspace
from training.plane_scenes import write_plane_scenes
from training.tiny import CONFIG

from subspace3d.adapters.basis import basis_for_model
from subspace3d.backbones.config import CONFIGS
from subspace3d.backbones.record import load_backbone, record_backbone
from subspace3d.commands import adapt, fit, mine, report
from subspace3d.commands.adapt import AdaptConfig
from subspace3d.commands.fit import FitConfig
from subspace3d.commands.mine import MineConfig
from subspace3d.commands.report import ReportConfig
from subspace3d.datasets.multiview import MultiViewDataset
from subspace3d.files import read_json, write_json
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


def test_settings_out_of_range_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batches must be at least 2"):
        config(tmp_path, tmp_path / "a.safetensors", batches=1)
    with pytest.raises(ValueError, match="subspaces must be at least one"):
        config(tmp_path)
