"""Tuning on a few images: what is held out, what teaches, where it stops, what it says before and after."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from adapters.models import TINY
from training.plane_scenes import plane_views, write_plane_scenes

from subspace3d.adapters.methods import apply_method
from subspace3d.adapters.placement import place
from subspace3d.adapters.spectral import singular_basis
from subspace3d.backbones.vggt import VGGT
from subspace3d.commands import finetune, report
from subspace3d.commands.finetune import FinetuneConfig
from subspace3d.evaluation.scene import abs_rel
from subspace3d.formats.scene import Frame, write_frames, write_scene
from subspace3d.training.config import TrainConfig
from subspace3d.training.few import LEAST_TO_HOLD_OUT, UNJUDGED_STEPS, format_few, load_few, measure_few, tune_few
from subspace3d.training.tuned import load_tuned

CONFIG = TrainConfig(steps=15, lr=3e-3, warmup=0.0, weight_decay=0.0, device="cpu", threads=1)


def model_of(method: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = VGGT(TINY)
    basis = singular_basis(model, place(model, "psv").cores, 4) if method == "psv" else None
    return apply_method(model, method, rank=2, basis=basis, heads="frozen")  # type: ignore[arg-type]


def write_images(folder: Path, views: int = 4) -> Path:
    """A folder of images without cameras and depth, as a scene."""
    images, _, _, _ = plane_views(3, views, 28)
    write_frames(folder / "scene", (Frame(image, None, None) for image in images), {})
    return folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    return write_plane_scenes(tmp_path_factory.mktemp("few"), scenes=1, views=5)


def test_views_in_the_middle_are_held_out(tmp_path):
    write_plane_scenes(tmp_path, scenes=1, views=5)
    (scene,) = load_few(tmp_path, 28)
    assert scene.held_out == (2,) and scene.taught == (0, 1, 3, 4)
    write_scene(tmp_path / "long", *plane_views(1, 20, 28), provenance={})
    assert load_few(tmp_path / "long", 28)[0].held_out == (5, 15)
    write_scene(tmp_path / "short", *plane_views(1, LEAST_TO_HOLD_OUT - 1, 28), provenance={})
    assert load_few(tmp_path / "short", 28)[0].held_out == ()


def test_a_view_without_depth_neither_judges_nor_costs_the_run(tmp_path):
    images, depths, intrinsics, extrinsics = plane_views(1, 5, 28)
    for name, bare in (("one", {2}), ("most", {0, 1, 3, 4})):
        maps = [None if index in bare else depth for index, depth in enumerate(depths)]
        write_frames(tmp_path / name / "scene", map(Frame, images, intrinsics, extrinsics, maps), {})
    (one,) = load_few(tmp_path / "one", 28)
    assert one.held_out == (3,)
    (most,) = load_few(tmp_path / "most", 28)
    assert most.held_out == ()
    # frames that are all without depth have cameras to learn from, but no error of depth
    blind = dataclasses.replace(one, held_out=(2,))
    measured = measure_few(model_of("bias"), [blind], CONFIG, depth_error=abs_rel)
    assert "abs_rel_images" in measured and "abs_rel_held_out" not in measured


def test_what_cannot_teach_is_refused(tmp_path):
    write_images(tmp_path / "one", views=1)
    with pytest.raises(ValueError, match="must have depth and cameras, or at least 2 images"):
        load_few(tmp_path / "one", 28)
    write_plane_scenes(tmp_path / "many", scenes=4, views=8)
    with pytest.raises(ValueError, match=r"1 to 30 images in all for --few, got 32"):
        load_few(tmp_path / "many", 28)


def test_coordinates_of_a_map_teach_what_those_around_the_origin_do(tmp_path):
    images, depths, intrinsics, extrinsics = plane_views(1, 4, 28)
    far = extrinsics.astype(np.float64).copy()
    far[:, :, 3] -= far[:, :, :3] @ np.array([4e6, -3e6, 2e5])
    measured = []
    for name, poses in (("near", extrinsics), ("far", far)):
        write_scene(tmp_path / name / "scene", images, depths, intrinsics, poses, provenance={})
        measured.append(measure_few(model_of("bias"), load_few(tmp_path / name, 28), CONFIG))
    # float64 has 1e-9 left of 4e6 units, float32 would have half a unit
    assert measured[1] == pytest.approx(measured[0], rel=1e-5)


@pytest.mark.parametrize("method", ["bias", "lora", "psv"])
def test_depth_teaches_and_the_held_out_view_judges(scenes, method):
    model = model_of(method)
    result = tune_few(model, load_few(scenes, 28), CONFIG, fit=method == "psv")
    assert (result.images, result.held_out, result.teacher) == (5, 1, "depth")
    assert result.after["loss_held_out"] < result.before["loss_held_out"]
    # the weights that are kept are those of the best look
    assert min(loss for _, loss in result.curve) == pytest.approx(result.after["loss_held_out"], rel=1e-5)
    assert dict(result.curve)[result.best_step] == min(loss for _, loss in result.curve)
    assert (result.start is not None) == (method == "psv")
    if result.start is not None:
        assert result.start.after < result.start.before


def test_views_teach_where_there_is_no_depth(tmp_path):
    result = tune_few(model_of("bias"), load_few(write_images(tmp_path), 28), dataclasses.replace(CONFIG, lr=1e-3))
    assert result.teacher == "views"
    assert set(result.before) == {"loss_images", "loss_held_out"}
    assert result.after["loss_held_out"] <= result.before["loss_held_out"]


def test_it_stops_where_the_held_out_view_gains_nothing(scenes):
    # a rate that ruins the model: the start stays the best
    result = tune_few(model_of("lora"), load_few(scenes, 28), dataclasses.replace(CONFIG, steps=100, lr=0.1))
    assert result.best_step == 0
    assert "none was better on the held-out views than the start" in format_few(result)
    assert result.steps <= 20
    for name, value in result.before.items():
        assert result.after[name] == pytest.approx(value, rel=1e-5), name


def test_one_image_is_tuned_on_unjudged(tmp_path):
    write_plane_scenes(tmp_path, scenes=1, views=1)
    result = tune_few(model_of("bias"), load_few(tmp_path, 28), dataclasses.replace(CONFIG, steps=100))
    assert (result.steps, result.best_step, result.held_out) == (UNJUDGED_STEPS, UNJUDGED_STEPS, 0)
    assert result.after["loss_images"] < result.before["loss_images"]
    assert "no view to hold out" in format_few(result)


def test_the_same_seed_gives_the_same_result(scenes):
    results = [tune_few(model_of("lora"), load_few(scenes, 28), CONFIG) for _ in range(2)]
    assert results[0].curve == results[1].curve


def test_a_loss_that_is_not_finite_ends_it(scenes):
    model = model_of("bias")
    with torch.no_grad():
        next(parameter for parameter in model.parameters() if parameter.requires_grad).fill_(torch.nan)
    with pytest.raises((FloatingPointError, ValueError), match="finite"):
        tune_few(model, load_few(scenes, 28), CONFIG)


def test_what_was_forgotten_is_measured_on_generic_scenes(scenes, tmp_path):
    generic = write_plane_scenes(tmp_path, scenes=5, views=6, seed=7)
    values = measure_few(model_of("none"), load_few(scenes, 28), CONFIG, generic, abs_rel)
    assert set(values) == {
        f"{kind}_{where}" for kind in ("loss", "abs_rel") for where in ("images", "held_out", "generic")
    }
    assert all(np.isfinite(value) for value in values.values())
    with pytest.raises(ValueError, match="generic must hold a scene with depth"):
        measure_few(model_of("none"), load_few(scenes, 28), CONFIG, write_images(tmp_path / "images"))


def test_the_command(scenes, tmp_path, capsys):
    generic = write_plane_scenes(tmp_path / "generic", scenes=1, views=3, seed=7)
    config = FinetuneConfig(
        scenes=scenes, out=tmp_path / "run", method="psv", core_size=4, weights="random", few=True, generic=generic,
        train=TrainConfig(steps=5, image_size=28, device="cpu", threads=1),
    )  # fmt: skip
    record = finetune.run(config)
    printed = capsys.readouterr().out
    assert "AbsRel, held-out views" in printed and "loss, generic scenes" in printed
    assert "next: subspace3d report" in printed and "subspace3d evaluate" in printed
    assert record["few"]["images"] == 5
    assert record["settings"]["heads"] == "frozen" and record["settings"]["start"] == "fit"
    assert record["settings"]["weight_decay"] == 0.0 and record["settings"]["steps"] == 5
    # nothing but the cores: 2 x 4 Linears a block pair, 4 x 4 numbers each
    assert set(record["trainable"]) == {"aggregator", "total"}
    assert finetune.run(config) == json.loads(json.dumps(record))
    load_tuned(tmp_path / "run")
    report.run(report.ReportConfig(run=tmp_path / "run"))
    page = (tmp_path / "run" / "report" / "index.html").read_text(encoding="utf-8")
    assert "A few images" in page and "generic scenes" in page


def test_settings_that_do_not_go_together_are_refused(scenes, tmp_path):
    with pytest.raises(ValueError, match="generic must be none without --few"):
        FinetuneConfig(scenes=scenes, out=tmp_path, generic=scenes)
    with pytest.raises(ValueError, match="method must be another one for --few"):
        FinetuneConfig(scenes=scenes, out=tmp_path, few=True, method="adalora")
