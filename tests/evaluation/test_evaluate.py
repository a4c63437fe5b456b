"""The stage end to end on small scenes: results, pictures, what is skipped, what is kept."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from evaluation.analytic_scene import ball_and_wall, write_analytic_scene
from PIL import Image

from subspace3d.backbones.pose import encode_pose
from subspace3d.backbones.vggt_preset import VGGTBackbone
from subspace3d.commands import evaluate as command
from subspace3d.commands import finetune, report
from subspace3d.commands.evaluate import EvaluateConfig
from subspace3d.commands.finetune import FinetuneConfig
from subspace3d.commands.report import ReportConfig
from subspace3d.evaluation import evaluate, pictures
from subspace3d.evaluation.predict import choose_frames, predict
from subspace3d.evaluation.scene_metrics import measure
from subspace3d.evaluation.table import METRICS
from subspace3d.formats.scene import Frame, load_scene, write_frames, write_scene


class Oracle(torch.nn.Module):
    """Answers every call with the true depths and cameras, as a VGGT would."""

    def __init__(self, depths: torch.Tensor, pose_enc: torch.Tensor) -> None:
        super().__init__()
        self.depths, self.pose_enc = depths, pose_enc

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        assert images.dtype == torch.float32
        assert 0 <= images.min() <= images.max() <= 1
        return {"depth": self.depths[None, ..., None], "pose_enc": self.pose_enc[None]}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Thread barriers cost more than they gain on a model this small, and very much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Two scenes of one data set, and one of a single view without depth."""
    root = tmp_path_factory.mktemp("scenes")
    write_analytic_scene(root / "test_00" / "0000", every=4)
    write_analytic_scene(root / "test_00" / "0001", every=4, shift=-0.15)
    images, true = ball_and_wall(views=1)
    empty = np.zeros(true.depths.shape, np.float32)
    write_scene(root / "test_00" / "no_depth", images, empty, true.intrinsics, true.extrinsics, provenance={})
    return root


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, scenes):
    """A run that tuned nothing: the random backbone itself."""
    out = tmp_path_factory.mktemp("runs") / "untouched"
    finetune.run(FinetuneConfig(scenes=scenes, out=out, method="none", weights="random"))
    return out


def config_of(scenes, out, **changes) -> EvaluateConfig:
    return EvaluateConfig(scenes=scenes, out=out, weights="random", frames=3, kept_scenes=1, device="cpu", **changes)


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory, scenes, tuned):
    out = tmp_path_factory.mktemp("evaluation")
    return out, command.run(config_of(scenes, out, tuned=(tuned,)))


def test_frames_are_evenly_spaced():
    assert choose_frames(96, 8) == [0, 12, 24, 36, 48, 60, 72, 84]
    assert choose_frames(42, 7) == [0, 6, 12, 18, 24, 30, 36]
    assert choose_frames(3, 8) == [0, 1, 2]
    with pytest.raises(ValueError, match="at least 1"):
        choose_frames(3, 0)


def test_a_model_that_knows_the_truth_is_perfect():
    images, true = ball_and_wall()
    extrinsics, intrinsics = torch.from_numpy(true.extrinsics), torch.from_numpy(true.intrinsics)
    oracle = Oracle(torch.from_numpy(true.depths), encode_pose(extrinsics, intrinsics, (56, 56)))
    metrics = measure(predict(oracle, images, torch.device("cpu")), true, icp_threshold=0.1).metrics
    for name in ("accuracy", "completeness", "chamfer", "abs_rel", "rotation_error_deg", "translation_error_deg"):
        assert metrics[name] == pytest.approx(0, abs=1e-6), name
    assert metrics["normal_consistency"] == pytest.approx(1, abs=1e-6)


def test_results_hold_every_metric_of_every_scene(evaluation):
    out, results = evaluation
    assert json.loads((out / "results.json").read_text()) == results
    assert results["format"] == "subspace3d-results"
    assert results["scenes"] == ["test_00/0000", "test_00/0001"]
    assert list(results["methods"]) == ["base", "untouched"]
    for method in results["methods"].values():
        assert list(method["per_scene"]) == results["scenes"]
        for name in METRICS:
            values = [metrics[name] for metrics in method["per_scene"].values()]
            assert all(np.isfinite(value) for value in values)
            assert method["mean"][name] == pytest.approx(np.mean(values))
        assert method["trainable_parameters"] == 0
        assert method["evaluated"] == 2
        details = method["details"]["test_00/0000"]
        assert details["frame_indices"] == [0, 1, 2]
        # of 14 x 14 pixels with depth one lies in the corner without; each is 2 x 2 pixels at twice the size
        assert details["points"] == 3 * (14 * 14 - 1) * 4
    assert results["protocol"]["icp"]["threshold"] == 0.1
    assert set(results["metrics"]) == set(METRICS)


def test_a_run_that_tuned_nothing_measures_like_the_base(evaluation):
    methods = evaluation[1]["methods"]
    assert methods["untouched"]["per_scene"] == methods["base"]["per_scene"]


def test_a_scene_without_depth_is_skipped_with_its_reason(evaluation):
    (skipped,) = evaluation[1]["skipped"]
    assert skipped["scene"] == "test_00/no_depth"
    assert "at least 3 pixels must have true depth, got 0" in skipped["reason"]


def test_cameras_are_measured_where_there_is_no_depth(tmp_path):
    images, true = ball_and_wall(views=3)
    frames = [Frame(*view) for view in zip(images, true.intrinsics, true.extrinsics)]
    write_frames(tmp_path / "scenes/a", frames, {})
    command.run(config_of(tmp_path / "scenes", tmp_path / "out", protocol="all"))
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["scenes"] == ["a"] and results["skipped"] == [] and results["pictures"] == []
    base = results["methods"]["base"]
    measured = base["per_scene"]["a"]
    cameras = {
        "rotation_error_deg", "rotation_error_deg_median", "translation_error_deg", "translation_error_deg_median",
        "pose_auc_3", "pose_auc_5", "pose_auc_15", "pose_auc_30", "trajectory_error",
    }  # fmt: skip
    assert {name for name, value in measured.items() if value is not None} == cameras
    assert set(measured) == set(METRICS)
    assert set(base["reasons"]["a"].values()) == {"there is no true depth to compare with"}
    defined = {
        protocol: {name for name, value in values["per_scene"]["a"].items() if value is not None}
        for protocol, values in base["protocols"].items()
    }
    trajectory = {"ate", "rpe_translation", "rpe_rotation_deg"}
    assert defined == {
        "authors": set(),
        "vggt": {"auc_3", "auc_5", "auc_15", "auc_30"},
        "pi3": {"auc_5", "auc_15", "auc_30", *trajectory},
        "cut3r": trajectory,
        "da3": {"auc_3", "auc_5", "auc_15", "auc_30"},
    }
    page = report.run(ReportConfig(tmp_path)).read_text(encoding="utf-8")
    assert "Rot deg" in page and "No scenes were kept" in page


def test_what_a_report_shows_is_kept(evaluation, scenes):
    out, results = evaluation
    (entry,) = results["pictures"]
    assert entry["scene"] == "test_00/0000"
    assert set(entry["methods"]) == {"base", "untouched"}
    true, base = pictures.load(out / entry["true"]), pictures.load(out / entry["methods"]["base"])
    scene = load_scene(scenes / "test_00" / "0000", image_size=112, frames=[0, 1, 2])
    assert np.array_equal(true.images, scene.images)
    # float16 has 11 significant bits
    np.testing.assert_allclose(true.views.depths, scene.depths, rtol=2**-11)
    details = results["methods"]["base"]["details"]["test_00/0000"]
    assert base.depth_scale == details["depth_scale"]
    assert base.alignment.translation.tolist() == details["translation"]
    assert base.views.confidence.shape == true.views.depths.shape
    assert base.views.confidence.max() == 255


def test_reduced_views_show_the_same_points():
    images, true = ball_and_wall(views=2, size=600)
    reduced = pictures.reduce_views(true, [1])
    assert reduced.depths.shape == (1, 200, 200)
    mask = np.ones(true.depths.shape, bool)
    full = true.points(mask).reshape(2, 600, 600, 3)[1]
    points = reduced.points(np.ones(reduced.depths.shape, bool)).reshape(200, 200, 3)
    np.testing.assert_allclose(points, full[1::3, 1::3], atol=1e-12)
    assert pictures.reduce_images(images).shape == (2, 200, 200, 3)


def test_table_is_printed(scenes, evaluation, capsys):
    command.run(config_of(scenes, evaluation[0], tuned=()))
    printed = capsys.readouterr().out
    assert printed.splitlines()[2].startswith("base")
    assert "skipped test_00/no_depth" in printed


def test_what_was_measured_is_kept_until_its_inputs_change(scenes, tuned, tmp_path, monkeypatch):
    measured = []

    def counted(name, *arguments):
        measured.append(name)
        return original(name, *arguments)

    original = evaluate._measure_method
    monkeypatch.setattr(evaluate, "_measure_method", counted)
    first = command.run(config_of(scenes / "test_00" / "0000", tmp_path))
    command.run(config_of(scenes / "test_00" / "0000", tmp_path, tuned=(tuned / "tuned",)))
    assert measured == ["base", "untouched"]
    assert command.run(config_of(scenes / "test_00" / "0000", tmp_path))["methods"] == first["methods"]
    (tmp_path / "pictures" / "0000" / "base.safetensors").unlink()
    command.run(config_of(scenes / "test_00" / "0000", tmp_path))
    assert measured == ["base", "untouched", "base"]
    command.run(config_of(scenes / "test_00" / "0000", tmp_path, icp_threshold=0.2))
    assert measured == ["base", "untouched", "base", "base"]


def test_a_killed_evaluation_continues(scenes, tuned, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    original = evaluate._measure_method
    monkeypatch.setattr(
        evaluate, "_measure_method", lambda name, *rest: killed() if name == "untouched" else original(name, *rest)
    )
    with pytest.raises(KeyboardInterrupt):
        command.run(config_of(scenes / "test_00" / "0000", tmp_path, tuned=(tuned,)))
    assert not (tmp_path / "results.json").exists()
    base = (tmp_path / "methods" / "base.json").stat().st_mtime_ns
    monkeypatch.setattr(evaluate, "_measure_method", original)
    command.run(config_of(scenes / "test_00" / "0000", tmp_path, tuned=(tuned,)))
    assert (tmp_path / "methods" / "base.json").stat().st_mtime_ns == base


def test_a_method_that_was_cut_off_goes_on_with_the_scenes_that_are_missing(scenes, tmp_path, monkeypatch, evaluation):
    def measured_first(method, scene, *rest):
        if scene == stop:
            raise KeyboardInterrupt
        measured.append(scene)
        return original(method, scene, *rest)

    original, measured, stop = evaluate._measure_scene, [], "test_00/0001"
    monkeypatch.setattr(evaluate, "_measure_scene", measured_first)
    with pytest.raises(KeyboardInterrupt):
        command.run(config_of(scenes, tmp_path))
    # with other settings the scenes are measured anew
    with pytest.raises(KeyboardInterrupt):
        command.run(config_of(scenes, tmp_path, icp_threshold=0.2))
    with pytest.raises(KeyboardInterrupt):
        command.run(config_of(scenes, tmp_path))
    stop = ""
    base = command.run(config_of(scenes, tmp_path))["methods"]["base"]
    assert measured == ["test_00/0000"] * 3 + ["test_00/0001", "test_00/no_depth"]
    whole = evaluation[1]["methods"]["base"]
    assert base["per_scene"] == whole["per_scene"] and base["mean"] == whole["mean"]
    assert base.keys() == whole.keys() and base["seconds"] > sum(
        details["inference_seconds"] for details in base["details"].values()
    )
    assert not list(tmp_path.glob("methods/*.parts"))


def test_a_model_that_answers_nan_fails_on_the_scene(scenes, tmp_path, monkeypatch):
    def broken(model, images, device):
        views = predict(model, images, device)
        views.depths[0] = np.nan
        return views

    monkeypatch.setattr(evaluate, "predict", broken)
    with pytest.raises(ValueError, match=r"no scene could be evaluated.*base on test_00/0000: the prediction must be"):
        command.run(config_of(scenes, tmp_path))


@pytest.mark.parametrize("changes", [{"frames": 0}, {"kept_scenes": -1}, {"icp_threshold": 0.0}])
def test_bad_settings_are_refused(scenes, tmp_path, changes):
    with pytest.raises(ValueError, match="got"):
        command.run(EvaluateConfig(scenes=scenes, out=tmp_path, **changes))


def test_bad_run_folders_are_refused(tuned, tmp_path):
    with pytest.raises(FileNotFoundError, match="no tuned result"):
        evaluate.method_folders((tmp_path,))
    with pytest.raises(ValueError, match="different names"):
        evaluate.method_folders((tuned, tuned / "tuned"))


def test_changed_files_of_a_scene_are_measured_anew(tmp_path, capsys):
    scenes, out = tmp_path / "scenes", tmp_path / "out"
    write_analytic_scene(scenes / "one", views=2, size=28, every=4)
    kept = scenes.parent / "kept"
    first = command.run(config_of(scenes, out))["methods"]["base"]
    shutil.copytree(out, kept)
    mask = scenes / "one" / "mask" / "0001.png"
    with Image.open(mask) as image:
        pixels = np.array(image)
    pixels[:, 14:] = 0
    Image.fromarray(pixels).save(mask)
    second = command.run(config_of(scenes, out))["methods"]["base"]
    assert second["details"]["one"]["points"] < first["details"]["one"]["points"]
    assert second["mean"] != first["mean"] and "files" not in second
    # records of before the digests are taken for what they are
    for file in kept.glob("methods/*.json"):
        record = json.loads(file.read_text())
        del record["files"]
        file.write_text(json.dumps(record))
    assert command.run(config_of(scenes, kept))["methods"]["base"]["mean"] == first["mean"]


def test_lengths_of_scenes_in_different_units_have_no_mean(tmp_path, capsys):
    images, true = ball_and_wall(views=2, size=28)
    for unit, name, scale in (("m", "a", 1), ("meters", "b", 1), ("mm", "c", 1000)):
        moved = true.extrinsics * [1, 1, 1, scale]
        frames = (
            Frame(images[i], true.intrinsics[i], moved[i], (scale * true.depths[i]).astype(np.float32), exact=True)
            for i in range(2)
        )
        write_frames(tmp_path / "scenes" / name, frames, {}, unit)
    results = command.run(replace(config_of(tmp_path / "scenes", tmp_path / "out"), protocol="cut3r"))
    assert results["units"] == {"a": "m", "b": "m", "c": "mm"}
    base = results["methods"]["base"]
    for name, metric in METRICS.items():
        values = [base["per_scene"][scene][name] for scene in "abc"]
        assert (base["mean"][name] is None) == (metric.unit == "scene" or None in values), name
        assert base["scenes_in_mean"][name] == (0 if metric.unit == "scene" else 3 - values.count(None))
    cut3r = base["protocols"]["cut3r"]
    assert cut3r["mean"]["accuracy"] is None and cut3r["per_scene"]["c"]["accuracy"] is not None
    assert cut3r["mean"]["abs_rel_scale"] is not None
    assert "distances have no mean: the scenes are in m and mm" in capsys.readouterr().out
    alone = command.run(config_of(tmp_path / "scenes" / "a", tmp_path / "alone"))
    assert alone["methods"]["base"]["mean"]["accuracy"] is not None


def test_scenes_of_fewer_frames_than_the_backbone_takes_are_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(VGGTBackbone, "frames", (2, None))
    write_analytic_scene(tmp_path / "scenes" / "one", views=1, size=28)
    write_analytic_scene(tmp_path / "scenes" / "two", views=2, size=28)
    results = command.run(config_of(tmp_path / "scenes", tmp_path / "out"))
    assert results["scenes"] == ["two"]
    assert results["skipped"] == [{"scene": "one", "reason": "frames must be at least 2 for vggt-nano, got 1 to 1"}]
