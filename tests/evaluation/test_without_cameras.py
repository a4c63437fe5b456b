"""Models that predict no camera poses, no intrinsics, or points in their place: what can be measured is measured."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from evaluation.analytic_scene import ball_and_wall, write_analytic_scene
from evaluation.test_protocols import random_prediction

from subspace3d.cli import main
from subspace3d.evaluation import pictures
from subspace3d.evaluation.protocol_metrics import Measured
from subspace3d.evaluation.protocols import PROTOCOLS
from subspace3d.evaluation.scene_metrics import ALIGNED_CLOUD, POINTS, RAW_CLOUD, Views, measure
from subspace3d.evaluation.table import METRICS
from subspace3d.files import read_json
from subspace3d.reporting.space_section import scene_record
from subspace3d.reporting.viewer import place

DEPTH = {
    "abs_rel", "abs_rel_raw", "abs_rel_frame_affine", "delta_1_25", "delta_1_25_raw", "delta_1_25_frame_affine",
}  # fmt: skip
CLOUD = {*ALIGNED_CLOUD, *RAW_CLOUD}
POSES = set(METRICS) - DEPTH - set(POINTS) - CLOUD


@pytest.fixture
def pair(rng: np.random.Generator) -> tuple[Views, Views]:
    _, true = ball_and_wall(views=4, size=42)
    return replace(random_prediction(rng, true), scale="metric"), replace(true, unit="m")


def points_of(views: Views) -> np.ndarray:
    """``d K^-1 (x, y, 1)`` of every pixel."""
    size = views.depths.shape[1:]
    return views.camera_points(np.ones(views.depths.shape, bool)).reshape(len(views.depths), *size, 3)


def defined(metrics: dict[str, float | None]) -> set[str]:
    return {name for name, value in metrics.items() if value is not None}


def test_what_needs_no_camera_has_the_value_it_has_with_cameras(pair: tuple[Views, Views]) -> None:
    pred, true = pair
    whole = measure(pred, true, 0.1).metrics
    assert defined(whole) == set(METRICS)
    cases = (
        (replace(pred, extrinsics=None, intrinsics=None), DEPTH),
        (replace(pred, extrinsics=None), DEPTH | set(POINTS)),
        (replace(pred, extrinsics=None, intrinsics=None, points_in_camera=points_of(pred)), DEPTH | set(POINTS)),
        (replace(pred, intrinsics=None), DEPTH | POSES),
        (replace(pred, intrinsics=None, points_in_camera=points_of(pred)), set(METRICS)),
    )
    for views, wanted in cases:
        found = measure(views, true, 0.1)
        assert set(found.metrics) == set(METRICS) and defined(found.metrics) == wanted
        assert found.reasons.keys() == set(METRICS) - wanted
        for name in wanted:
            assert found.metrics[name] == pytest.approx(whole[name], rel=1e-9), name
        for name, reason in found.reasons.items():
            poses = views.extrinsics is None and name not in POINTS
            assert reason == (
                "not predicted: camera poses" if poses else "not predicted: intrinsics, and no points either"
            )


def test_points_that_are_not_finite_are_refused(pair: tuple[Views, Views]) -> None:
    pred, true = pair
    points = points_of(pred)
    points[0, 1, 1, 0] = np.nan
    with pytest.raises(ValueError, match="must be finite, got 1 values in points_in_camera"):
        measure(replace(pred, intrinsics=None, points_in_camera=points), true, 0.1)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_protocols_measure_what_needs_no_camera(name: str, pair: tuple[Views, Views]) -> None:
    pred, true = pair
    whole = PROTOCOLS[name].measure(Measured(pred, true))
    alone = PROTOCOLS[name].measure(Measured(replace(pred, extrinsics=None, intrinsics=None), true))
    depth = {metric for metric in whole.metrics if metric.startswith(("abs_rel", "delta"))}
    assert set(alone.metrics) == set(whole.metrics) and defined(alone.metrics) == depth
    assert all(alone.metrics[metric] == whole.metrics[metric] for metric in depth)
    for metric in set(whole.metrics) - depth - {"overall_dtu"}:
        assert alone.reasons[metric].startswith("not predicted: "), metric
    with_points = replace(pred, intrinsics=None, points_in_camera=points_of(pred))
    found = PROTOCOLS[name].measure(Measured(with_points, true))
    fused = {"f_score", "precision", "recall", "accuracy", "completeness", "overall"} if name == "da3" else set()
    for metric, value in whole.metrics.items():
        # depth maps are fused by their intrinsics; seen from the true cameras they need none of their own
        expected = None if metric in fused else value
        assert found.metrics[metric] == (expected if expected is None else pytest.approx(expected, rel=1e-9)), metric


def test_what_is_kept_of_such_a_scene_has_no_cameras(pair: tuple[Views, Views], tmp_path: Path) -> None:
    pred, _ = pair
    for lacking in ({"extrinsics": None}, {"intrinsics": None}, {"extrinsics": None, "intrinsics": None}):
        shown = pictures.shown_prediction(replace(pred, **lacking), 1.0, None)
        pictures.save(tmp_path / "x.safetensors", shown)
        views = pictures.load(tmp_path / "x.safetensors").views
        assert set(views.not_predicted()) == set(lacking)
        np.testing.assert_allclose(views.depths, pred.depths, rtol=1e-3)


def test_a_prediction_without_cameras_is_seen_from_the_true_ones(pair: tuple[Views, Views]) -> None:
    pred, true = pair
    truth = pictures.shown_truth(np.zeros((*true.depths.shape, 3), np.uint8), true)
    shown = pictures.shown_prediction(replace(pred, extrinsics=None), 3.0, None)
    points, in_the_true_world = place(shown, truth, "predicted cameras, aligned")
    everywhere = np.ones(true.depths.shape, bool)
    expected = replace(true, depths=3.0 * pred.depths).points(everywhere)
    assert in_the_true_world
    np.testing.assert_allclose(points.reshape(-1, 3), expected, rtol=1e-6)
    layers = scene_record("one", truth, [shown], 100)["layers"]
    assert layers[1]["cameras"] is None and layers[1]["alignment"] is None and len(layers[0]["cameras"]) == 4


FACTORY = """
import torch
from torch import nn
from subspace3d.backbones.protocol import Backbone, Prediction

class DepthAlone(Backbone):
    image_size, patch_size, licence = 28, 7, "MIT"
    targets = {"cores": "mix", "heads": "head", "all": "mix|head"}
    parts = {"mix": "blocks", "head": "depth_head"}

    def network(self):
        return Net()

    def __call__(self, model, images):
        return Prediction(model(images=images))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.head = nn.Linear(3, 5), nn.Linear(5, 1)

    def forward(self, *, images):
        return self.head(self.mix(images.movedim(2, -1)).tanh()).exp().squeeze(-1).to(torch.bfloat16)
"""


def test_a_model_of_depth_alone_goes_through_evaluate_and_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "depth_alone.py").write_text(FACTORY, encoding="utf-8")
    write_analytic_scene(tmp_path / "scenes/one", views=3, size=28)
    monkeypatch.chdir(tmp_path)
    try:
        backbone = ["--backbone", "depth_alone:DepthAlone", "--weights", "random", "--device", "cpu"]
        main(["evaluate", "--scenes", "scenes", "--out", "run/evaluation", "--protocol", "all", *backbone])
        printed = capsys.readouterr().out
        assert "not predicted: extrinsics, intrinsics; - where a metric needs them" in printed
        results = read_json(Path("run/evaluation/results.json"))
        assert results["backbone"]["lacks"] == {"extrinsics": "missing", "intrinsics": "missing"}
        base = results["methods"]["base"]
        assert defined(base["mean"]) == DEPTH
        assert base["reasons"]["one"]["rotation_error_deg"] == "not predicted: camera poses"
        assert base["protocols"]["pi3"]["mean"]["abs_rel_scale"] > 0
        main(["report", "run"])
        page = Path("run/report/index.html").read_text(encoding="utf-8")
        for text in (
            "depth_alone:DepthAlone", "random, seed 0", "none: random weights",
            "camera poses: missing; intrinsics: missing", "what needs them is not measured",
        ):  # fmt: skip
            assert text in page, text
    finally:
        sys.modules.pop("depth_alone", None)
