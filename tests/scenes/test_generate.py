"""Data sets on disk: attribute control, determinism, resume, agreement of views."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from subspace3d.choices import ATTRIBUTES
from subspace3d.commands.generate import GenerateConfig, run
from subspace3d.formats.scene import find_scenes, load_scene
from subspace3d.mitsuba_variant import choose_variant

SMALL = {"scenes": 2, "views": 2, "resolution": 32, "spp": 4, "workers": 1}


def digest(folder) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".yaml"
    }


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_a_data_set_varies_one_attribute_and_data_sets_differ_in_the_others(tmp_path, attribute):
    folders = run(GenerateConfig(out=tmp_path, attribute=attribute, datasets=2, **SMALL))
    assert [folder.name for folder in folders] == [f"{attribute}_00", f"{attribute}_01"]
    first, second, other = (
        load_scene(folder / scene)
        for folder, scene in ((folders[0], "scene_0000"), (folders[0], "scene_0001"), (folders[1], "scene_0000"))
    )
    for name in ATTRIBUTES:
        for record in (first.provenance, first.provenance["seeds"]):
            mate = second.provenance if record is first.provenance else second.provenance["seeds"]
            far = other.provenance if record is first.provenance else other.provenance["seeds"]
            assert (record[name] != mate[name]) == (name == attribute)
            assert record[name] != far[name]
    seen = {"depths": attribute in ("geometry", "camera"), "extrinsics": attribute == "camera", "images": True}
    for name, differs in seen.items():
        assert np.array_equal(getattr(first, name), getattr(second, name)) != differs
    for scene in (first, second, other):
        assert ((scene.depths > 0).mean(axis=(1, 2)) >= 0.03).all() and scene.depths[scene.depths > 0].min() >= 0.15
        assert scene.images.std() > 5


def test_scenes_do_not_depend_on_workers_and_missing_ones_come_back_identical(tmp_path):
    settings = {**SMALL, "attribute": "all", "preset": "generic", "scenes": 3}
    run(GenerateConfig(out=tmp_path / "one", **settings))
    run(GenerateConfig(out=tmp_path / "two", **{**settings, "workers": 2}))
    whole = digest(tmp_path / "one")
    assert len(whole) == 3 * 5 and whole == digest(tmp_path / "two")

    shutil.rmtree(tmp_path / "one/all_00/scene_0001")
    leftover = tmp_path / "one/all_00/.scene_0001.s3d-abcdefgh.tmp"
    leftover.mkdir()
    kept = tmp_path / "one/all_00/scene_0002/scene.json"
    before = kept.stat().st_mtime_ns
    run(GenerateConfig(out=tmp_path / "one", **settings))
    assert digest(tmp_path / "one") == whole and kept.stat().st_mtime_ns == before and not leftover.exists()

    run(GenerateConfig(out=tmp_path / "one", **{**settings, "scenes": 4}))
    grown = digest(tmp_path / "one")
    assert len(grown) == 4 * 5 and whole.items() <= grown.items()


def test_other_settings_under_the_same_name_are_refused(tmp_path):
    run(GenerateConfig(out=tmp_path, name="set", **{**SMALL, "scenes": 1}))
    with pytest.raises(ValueError, match="resolution 32 there, 40 now"):
        run(GenerateConfig(out=tmp_path, name="set", **{**SMALL, "resolution": 40}))
    record = tmp_path / "config-set.yaml"
    record.write_text("".join(line for line in record.read_text().splitlines(True) if "denoise" not in line))
    run(GenerateConfig(out=tmp_path, name="set", **{**SMALL, "scenes": 1}))  # written before there was a denoiser
    with pytest.raises(ValueError, match="name must be a plain folder name"):
        run(GenerateConfig(out=tmp_path, name="../set", **SMALL))
    assert len(find_scenes(tmp_path)) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"preset": "paper", "views": 24, "scenes": 3},
        {"preset": "generic", "views": 6, "scenes": 3},
        {"regime": "room", "trajectory": "walk", "views": 3, "scenes": 2},
        {"trajectory": "tremor", "views": 3, "scenes": 2},
    ],
    ids=["paper", "generic", "walk", "tremor"],
)
def test_views_agree_through_their_depth_and_cameras(tmp_path, settings):
    """Points of one view, projected into the other, lie at that view's depth or behind what it sees."""
    run(GenerateConfig(out=tmp_path, attribute="all", **{**SMALL, "resolution": 64, "spp": 1, **settings}))
    agreeing = total = 0
    for path in find_scenes(tmp_path):
        scene = load_scene(path)
        count, height, width = scene.depths.shape
        pixel = np.stack([*np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5), np.ones((height, width))])
        for first, second in zip(range(count - 1), range(1, count)):
            inside = np.linalg.inv(scene.intrinsics[first]) @ pixel.reshape(3, -1) * scene.depths[first].ravel()
            rotation, translation = scene.extrinsics[first, :, :3], scene.extrinsics[first, :, 3:]
            world = rotation.T @ (inside - translation)
            there = scene.extrinsics[second, :, :3] @ world + scene.extrinsics[second, :, 3:]
            image = (scene.intrinsics[second] @ there)[:2] / there[2]
            column, row = np.floor(image).astype(int)
            smooth = smooth_pixels(scene.depths[first]).ravel()
            valid = smooth & (there[2] > 0) & (np.minimum(row, column) >= 0) & (row < height) & (column < width)
            depth = scene.depths[second][row[valid], column[valid]]
            away = smooth_pixels(scene.depths[second])[row[valid], column[valid]]
            expected = there[2, valid]
            # a point far behind the surface seen there is hidden; one well before it would be an error
            visible = away & (expected < 1.05 * depth)
            total += visible.sum()
            agreeing += (np.abs(expected - depth)[visible] < 0.02 * depth[visible]).sum()
    assert total > 2000 and agreeing / total > 0.9


def smooth_pixels(depth: np.ndarray) -> np.ndarray:
    """Pixels whose 3 x 3 neighbourhood is all surface and spans less than 3 % of its depth."""
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(depth, 1), (3, 3))
    low, high = windows.min(axis=(2, 3)), windows.max(axis=(2, 3))
    return (low > 0) & (high - low < 0.03 * depth)


def test_an_interrupted_run_leaves_nothing_partial_and_continues_to_the_same_bytes(tmp_path):
    settings = {"views": 2, "resolution": 96, "spp": 16, "workers": 2}
    out = tmp_path / "cut"
    command = (
        "from pathlib import Path; from subspace3d.commands.generate import GenerateConfig;"
        "from subspace3d.commands.generate import run;"
        f"run(GenerateConfig(out=Path({str(out)!r}), scenes=500, **{settings!r}))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", command],
        stderr=subprocess.PIPE,
        start_new_session=True,
        # a test run that was started in the background ignores SIGINT, and its children would inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 240
    while not list(out.glob("texture_00/scene_*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    errors = process.communicate(timeout=120)[1].decode()
    assert process.returncode != 0 and "KeyboardInterrupt" in errors
    assert not list(out.glob("texture_00/.*"))
    finished = find_scenes(out)
    assert finished
    for path in finished:
        load_scene(path)
    wanted = {**settings, "workers": 1, "scenes": 3}
    run(GenerateConfig(out=out, **wanted))
    run(GenerateConfig(out=tmp_path / "whole", **wanted))
    whole = digest(tmp_path / "whole")
    assert len(whole) == 3 * 5 and whole.items() <= digest(out).items()


def test_materials_come_from_a_folder_of_texture_maps(tmp_path):
    red = np.zeros((16, 16, 3), np.uint8)
    red[..., 0] = 200
    (tmp_path / "maps").mkdir()
    Image.fromarray(red).save(tmp_path / "maps/red_basecolor.png")
    settings = {**SMALL, "scenes": 1, "spp": 8, "preset": "release"}
    (folder,) = run(GenerateConfig(out=tmp_path, textures=tmp_path / "maps", **settings))
    scene = load_scene(folder / "scene_0000")
    assert {material["maps"] for material in scene.provenance["texture"]["materials"][:20]} == {"red"}
    color = scene.images[scene.depths > 0].mean(axis=0)
    assert color[0] > 2 * max(color[1], color[2])
    with pytest.raises(FileNotFoundError, match="textures: no such folder"):
        run(GenerateConfig(out=tmp_path / "other", textures=tmp_path / "none", **settings))
    assert not (tmp_path / "other").exists()


def test_denoised_images_are_nearer_to_converged_ones(tmp_path):
    settings = {**SMALL, "attribute": "all", "preset": "generic", "resolution": 40, "scenes": 1}
    if choose_variant("auto") == "scalar":
        with pytest.raises(ValueError, match="variant must be llvm or cuda with denoise, got 'scalar'"):
            run(GenerateConfig(out=tmp_path, denoise=True, **settings))
        return
    how = {"noisy": {}, "denoised": {"denoise": True}, "converged": {"spp": 144}}
    scenes = {
        name: [
            load_scene(folder)
            for folder in find_scenes(run(GenerateConfig(out=tmp_path / name, **{**settings, **one}))[0])
        ]
        for name, one in how.items()
    }
    for noisy, denoised, converged in zip(*scenes.values()):
        assert np.array_equal(noisy.depths, denoised.depths)
        errors = [np.sqrt(np.mean((scene.images.astype(float) - converged.images) ** 2)) for scene in (noisy, denoised)]
        assert errors[1] < 0.7 * errors[0]
        assert denoised.provenance["denoise"] and not noisy.provenance["denoise"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"span": (100.0, 90.0)}, "span must be 0 < least <= greatest <= 360"),
        ({"span": (60.0, 361.0)}, "span must be 0 < least <= greatest <= 360"),
        ({"preset": "paper", "span": (60.0, 90.0)}, "span must be given with wide paths of the preset generic only"),
        ({"regime": "room", "span": (60.0, 90.0)}, "span must be given with wide paths of the preset generic only"),
        ({"variant": "scalar", "denoise": True}, "variant must be llvm, cuda or auto with denoise"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        GenerateConfig(out=tmp_path, **{"preset": "generic", **settings})
