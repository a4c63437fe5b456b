"""Every planted fault is named, sound scenes pass: rendered ones far apart, and a plane seen by a shaking hand."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from datasets.plane_world import camera_matrix, camera_path, view
from PIL import Image

from subspace3d.commands import generate
from subspace3d.commands import validate as command
from subspace3d.commands.generate import GenerateConfig
from subspace3d.datasets import reprojection, validate
from subspace3d.datasets.validate import SceneReport
from subspace3d.formats.scene import Frame, SceneFile, find_scenes, load_scene, write_frames, write_scene

FLIP = np.diag([1.0, -1.0, -1.0])


def check(folder: Path) -> SceneReport:
    with ThreadPoolExecutor(1) as pool:
        return validate.check_scene(folder, folder.name, pool)


def messages(report: SceneReport, severity: str = "error") -> list[str]:
    return [finding.message for finding in report.findings if finding.severity == severity]


def edit(folder: Path, change) -> None:
    record = json.loads((folder / "scene.json").read_text())
    change(record)
    (folder / "scene.json").write_text(json.dumps(record))


def change_poses(change):
    def apply(record: dict) -> None:
        for frame in record["frames"]:
            frame["extrinsics_w2c"] = change(np.array(frame["extrinsics_w2c"])).tolist()

    return apply


def inverse(extrinsic: np.ndarray) -> np.ndarray:
    return np.linalg.inv(np.vstack([extrinsic, [0, 0, 0, 1]]))[:3]


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small scenes of the generator, in which everything varies: wide baselines, and objects on a ground."""
    out = tmp_path_factory.mktemp("rendered")
    for preset in ("paper", "generic"):
        config = GenerateConfig(
            out=out, attribute="all", preset=preset, name=preset, scenes=2, views=5, resolution=48, spp=1,
            workers=1, variant="scalar",
        )  # fmt: skip
        generate.run(config)
    return out


@pytest.fixture(scope="module")
def shaken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plane 2 m away, seen while a hand moves 10 cm and turns by 2 degrees: the stored depth fits many cameras."""
    folder = tmp_path_factory.mktemp("shaken") / "scene"
    intrinsic = camera_matrix(160, 120)
    poses = [pose * [[1, 1, 1, 1]] for pose in camera_path(6, reach=0.05)]
    images, depths = zip(*(view(intrinsic, pose, 120, 160) for pose in poses))
    write_scene(folder, np.stack(images), np.stack(depths), np.stack([intrinsic] * 6), np.stack(poses), {})
    return folder.parent


@pytest.fixture(params=["rendered", "shaken"])
def scene(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of one sound scene of either kind, to be spoiled."""
    folder = find_scenes(request.getfixturevalue(request.param))[0]
    return Path(shutil.copytree(folder, tmp_path / "scene"))


@pytest.mark.parametrize("kind", ["rendered", "shaken"])
def test_sound_scenes_pass(request: pytest.FixtureRequest, kind: str, capsys) -> None:
    root = request.getfixturevalue(kind)
    result = command.run(command.ValidateConfig(root))
    assert all(report["findings"] == [] and report["unchecked"] is None for report in result["reports"])
    # nothing contradicts but what lies within a pixel of an edge
    assert all(report["agreement"] > 0.98 for report in result["reports"])
    assert f"{len(result['reports'])} without fault, 0 with errors" in capsys.readouterr().out


CONVENTIONS = {
    "c2w": (inverse, "camera-to-world matrices (c2w): store their inverse"),
    "opengl": (lambda pose: FLIP @ pose, "in OpenGL axes (y up, z backward): negate its second and third row"),
    "c2w opengl": (lambda pose: inverse(FLIP @ pose), "(c2w) in OpenGL axes"),
}


@pytest.mark.parametrize("case", CONVENTIONS)
def test_a_camera_mix_up_is_named(scene: Path, case: str) -> None:
    change, message = CONVENTIONS[case]
    edit(scene, change_poses(change))
    (found,) = messages(check(scene))
    assert message in found


@pytest.mark.parametrize(("factor", "message"), [(1000, "by 0.001 (depth in mill"), (5, "by 0.2"), (0.01, "by 100")])
def test_a_depth_unit_is_named(scene: Path, factor: float, message: str) -> None:
    edit(scene, lambda record: record.update(depth_scale=record["depth_scale"] * factor))
    (found,) = messages(check(scene))
    assert "another unit than the translations" in found and message in found


def test_an_odd_depth_factor_is_measured(rendered: Path, tmp_path: Path) -> None:
    scene = Path(shutil.copytree(find_scenes(rendered)[0], tmp_path / "scene"))
    edit(scene, lambda record: record.update(depth_scale=record["depth_scale"] * 0.4))
    (finding,) = check(scene).findings
    factor = float(finding.detail.split("depth times ")[1].split()[0])
    # points count as agreeing up to 2 % of their depth
    assert factor == pytest.approx(2.5, rel=reprojection.TOLERANCE)


def test_distance_along_the_ray_is_named(rendered: Path, tmp_path: Path) -> None:
    scene = Path(shutil.copytree(find_scenes(rendered)[-1], tmp_path / "scene"))
    stored = load_scene(scene)
    for index, (depth, intrinsic) in enumerate(zip(stored.depths, stored.intrinsics)):
        x, y = np.meshgrid(np.arange(48) + 0.5, np.arange(48) + 0.5)
        rays = np.stack([x, y, np.ones_like(x)], -1) @ np.linalg.inv(intrinsic).T
        np.save(scene / f"depth/{index}.npy", depth * np.linalg.norm(rays, axis=-1))
    edit(scene, lambda record: [f.update(depth=f"depth/{i}.npy") for i, f in enumerate(record["frames"])])
    (found,) = messages(check(scene))
    assert "distance along the ray" in found


def test_single_frames_are_named(scene: Path) -> None:
    depth = load_scene(scene).depths[1]
    np.save(scene / "depth/1.npy", 1000 * depth)
    edit(scene, lambda record: record["frames"][1].update(depth="depth/1.npy"))
    assert any("depth of single frames is in another unit" in message for message in messages(check(scene)))
    assert all("frame 1" in finding.detail for finding in check(scene).findings)


def test_a_single_wrong_camera_is_named(rendered: Path, tmp_path: Path) -> None:
    scene = Path(shutil.copytree(find_scenes(rendered)[-1], tmp_path / "scene"))
    pose = SceneFile(scene).camera(2)[1]
    edit(scene, lambda record: record["frames"][2].update(extrinsics_w2c=inverse(pose).tolist()))
    findings = check(scene).findings
    assert [finding.detail.split(":")[0] for finding in findings] == ["frame 2"]


def _truncate(folder: Path) -> None:
    path = folder / "images/0001.png"
    path.write_bytes(path.read_bytes()[:500])


def _resize(folder: Path) -> None:
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(folder / "images/0001.png")


def _empty_mask(folder: Path) -> None:
    scene = SceneFile(folder)
    (folder / "mask").mkdir()
    Image.fromarray(np.zeros(scene.size, np.uint8)).save(folder / "mask/0001.png")
    edit(folder, lambda record: record["frames"][1].update(mask="mask/0001.png"))


def _negative(folder: Path) -> None:
    np.save(folder / "depth/1.npy", -load_scene(folder).depths[1])
    edit(folder, lambda record: record["frames"][1].update(depth="depth/1.npy"))


def _no_depth(folder: Path) -> None:
    for path in (folder / "depth").glob("*.png"):
        Image.fromarray(np.zeros(SceneFile(folder).size, np.uint16)).save(path)


BROKEN = {
    "truncated": (_truncate, "image: missing, truncated", "0001.png is not a whole image"),
    "missing": (lambda folder: (folder / "depth/0001.png").unlink(), "depth: missing", "no such file"),
    "size": (_resize, "image: missing", "got 9 x 9"),
    "record": (lambda folder: (folder / "scene.json").write_text("{"), "scene.json breaks", "not valid JSON"),
    "camera": (
        lambda folder: edit(folder, change_poses(lambda pose: 2 * pose)),
        "extrinsics_w2c: missing",
        "R a rotation",
    ),
    "mask": (_empty_mask, "a mask is empty", "frame 1"),
    "negative": (_negative, "depth is negative", "frame 1"),
    "empty": (_no_depth, "no pixel has valid depth", "0 in every"),
    "intrinsics": (
        lambda folder: edit(folder, lambda r: r["frames"][0]["intrinsics"][0].__setitem__(2, 3 * r["width"])),
        "principal point is far",
        "frame 0",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_named(shaken: Path, tmp_path: Path, case: str) -> None:
    import re

    spoil, message, detail = BROKEN[case]
    scene = Path(shutil.copytree(shaken / "scene", tmp_path / "scene"))
    spoil(scene)
    errors = [finding for finding in check(scene).findings if finding.severity == "error"]
    assert any(re.search(message, error.message) and detail in error.detail for error in errors), errors


def test_warnings(shaken: Path, tmp_path: Path) -> None:
    scene = Path(shutil.copytree(shaken / "scene", tmp_path / "scene"))
    depth = load_scene(scene).depths[0]
    depth[:10] = np.nan
    np.save(scene / "depth/0.npy", depth)
    edit(scene, lambda record: record["frames"][0].update(depth="depth/0.npy"))
    steps = np.zeros(depth.shape, np.uint16)
    steps[0, :50] = 10_000
    Image.fromarray(steps).save(scene / "depth/0001.png")
    steps[:] = 65535
    Image.fromarray(steps).save(scene / "depth/0002.png")
    found = " ".join(messages(check(scene), "warning"))
    assert all(words in found for words in ("NaN", "less than 1% of a frame", "largest value of a 16-bit png"))


def test_scenes_whose_cameras_cannot_be_checked_say_so(tmp_path: Path, capsys) -> None:
    intrinsic = camera_matrix(48, 36)
    views = [(pose, *view(intrinsic, pose, 36, 48)) for pose in camera_path(3)]
    write_frames(tmp_path / "bare", [Frame(image, intrinsic, pose) for pose, image, _ in views], {}, unit="m")
    write_frames(tmp_path / "one", [Frame(views[0][1], intrinsic, views[0][0], views[0][2])], {}, unit="m")
    write_frames(
        tmp_path / "turning",
        [Frame(image, intrinsic, pose, depth) for pose, image, depth in views],
        {},
        unit="m",
        translation_known=False,
    )
    result = command.run(command.ValidateConfig(tmp_path))
    reasons = {report["scene"]: report["unchecked"] for report in result["reports"]}
    assert reasons == {
        "bare": "no depth", "one": "fewer than two whole views", "turning": "only rotations are known",
    }  # fmt: skip
    assert "cameras of 1 scenes not checked: no depth" in capsys.readouterr().out


def test_metres_are_plausible(shaken: Path, tmp_path: Path) -> None:
    scene = Path(shutil.copytree(shaken / "scene", tmp_path / "scene"))

    def to_kilometres(record: dict) -> None:
        record.update(unit="m", depth_scale=1000 * record["depth_scale"])
        for frame in record["frames"]:
            for row in frame["extrinsics_w2c"]:
                row[3] *= 1000

    edit(scene, to_kilometres)
    assert any("not plausible in metres" in message for message in messages(check(scene), "warning"))


def test_the_command_line_ends_with_exit_code_2_and_names_the_fault(shaken: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(shaken / "scene", tmp_path / "set" / name)
    edit(tmp_path / "set/b", change_poses(inverse))
    script = Path(sys.executable).with_name("subspace3d")
    command = [str(script), "validate", str(tmp_path / "set")]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 2
    assert "1 without fault, 1 with errors" in answer.stdout and "(c2w): store their inverse" in answer.stdout
    assert answer.stderr.splitlines()[-1].endswith("1 of 2 scenes in " + str(tmp_path / "set") + " have errors")
    answer = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    reports = json.loads(answer.stdout)["reports"]
    assert [len(report["findings"]) for report in reports] == [0, 1]
    assert answer.returncode == 2
    shutil.rmtree(tmp_path / "set/b")
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def _reorder(order):
    def apply(record: dict) -> None:
        poses = [frame["extrinsics_w2c"] for frame in record["frames"]]
        for index, frame in zip(order(len(poses)), record["frames"]):
            frame["extrinsics_w2c"] = poses[index]

    return apply


ORDERS = {
    "reverse order": (lambda count: list(range(count))[::-1], "reverse order of the images"),
    "one image off": (lambda count: [(index + 1) % count for index in range(count)], "one image off"),
    "one back": (lambda count: [(index - 1) % count for index in range(count)], "one image off"),
    "sorted as text": (lambda count: sorted(range(count), key=str), "the cameras are sorted by name"),
    "images as text": (lambda count: np.argsort(sorted(range(count), key=str)).tolist(), "the images are sorted by"),
}


@pytest.mark.parametrize("case", ORDERS)
@pytest.mark.parametrize("reach", [0.05, 0.4])
def test_poses_in_another_order_are_named(tmp_path: Path, case: str, reach: float) -> None:
    """A plane with a step of depth, seen from 13 places along a path that bends."""
    order, message = ORDERS[case]
    intrinsic = camera_matrix(96, 72)
    poses = camera_path(13, reach)
    images, depths = zip(*(view(intrinsic, pose, 72, 96) for pose in poses))
    folder = tmp_path / "scene"
    write_scene(folder, np.stack(images), np.stack(depths), np.stack([intrinsic] * 13), np.stack(poses), {})
    assert messages(check(folder)) == []
    edit(folder, _reorder(order))
    assert any(message in found for found in messages(check(folder))), check(folder).findings


def test_frames_without_depth_are_counted(shaken: Path, tmp_path: Path) -> None:
    scene = Path(shutil.copytree(shaken / "scene", tmp_path / "scene"))
    edit(scene, lambda record: [record["frames"][index].update(depth=None) for index in (1, 3)])
    (finding,) = check(scene).findings
    assert finding.severity == "warning" and "frames without depth" in finding.message
    assert finding.detail == "2 of 6 frames: 1, 3"


@pytest.mark.parametrize("factor", [3e-4, 0.037, 271.0, 2e5])
def test_units_far_off_are_named_with_their_factor(rendered: Path, tmp_path: Path, factor: float) -> None:
    scene = Path(shutil.copytree(next(path for path in find_scenes(rendered)), tmp_path / "scene"))
    edit(scene, lambda record: record.update(depth_scale=record["depth_scale"] * factor))
    (found,) = [finding for finding in check(scene).findings if finding.severity == "error"]
    assert "depth is in another unit than the translations" in found.message
    told = float(found.detail.split("depth times ")[1].split()[0])
    assert told == pytest.approx(1 / factor, rel=0.03)


@pytest.mark.parametrize("spoil", ["unit", "inverse"])
def test_a_long_slow_video_is_judged_by_its_parallax(tmp_path: Path, spoil: str) -> None:
    """40 views, each hardly different from the next: read wrongly, neighbours agree all the same."""
    intrinsic = camera_matrix(64, 48)
    poses = camera_path(40, 0.3)
    images, depths = zip(*(view(intrinsic, pose, 48, 64) for pose in poses))
    folder = tmp_path / "scene"
    write_scene(folder, np.stack(images), np.stack(depths), np.stack([intrinsic] * 40), np.stack(poses), {})
    assert messages(check(folder)) == []
    if spoil == "unit":
        edit(folder, lambda record: record.update(depth_scale=5 * record["depth_scale"]))
    else:
        edit(folder, change_poses(inverse))
    found = messages(check(folder))
    assert len(found) == 1 and ("another unit" if spoil == "unit" else "(c2w)") in found[0], found
