from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets.plane_world import camera_matrix, camera_path, color_error, plane_error, view
from torch.utils.data import DataLoader
from training.plane_scenes import write_plane_scenes

from subspace3d.datasets.multiview import MultiViewBatchSampler, MultiViewDataset, collate, draw_frames
from subspace3d.formats.scene import Frame, write_frames
from subspace3d.training.config import TrainConfig


@pytest.fixture
def dataset(tmp_path: Path) -> MultiViewDataset:
    return MultiViewDataset(write_plane_scenes(tmp_path / "set", scenes=3, views=4), image_size=28)


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """One scene of 12 views of a plane, 64 x 48 pixels with the principal point off the middle."""
    intrinsic = camera_matrix(64, 48)
    views = [(pose, *view(intrinsic, pose, 48, 64)) for pose in camera_path(12)]
    frames = [Frame(image, intrinsic, pose, depth.astype(np.float32)) for pose, image, depth in views]
    write_frames(tmp_path / "wide/scene", frames, {}, unit="m")
    return tmp_path / "wide"


def tensors(batch: dict) -> dict:
    return {key: value for key, value in batch.items() if key != "names"}


def assert_same(one: dict, other: dict) -> None:
    assert one["names"] == other["names"]
    assert all(torch.equal(value, other[key]) for key, value in tensors(one).items())


def test_shapes_and_types(dataset: MultiViewDataset) -> None:
    batch = dataset.batch(seed=0, step=0, frames=(2, 2), images_per_step=7)
    assert batch["images"].shape == (3, 2, 3, 28, 28) and batch["images"].dtype == torch.float32
    assert batch["images"].min() >= 0 and batch["images"].max() <= 1
    assert batch["depths"].shape == batch["point_masks"].shape == (3, 2, 28, 28)
    assert batch["point_masks"].dtype == torch.bool and batch["point_masks"].all()
    assert batch["extrinsics"].shape == (3, 2, 3, 4) and batch["intrinsics"].shape == (3, 2, 3, 3)
    assert batch["has_depth"].tolist() == batch["translation_known"].tolist() == [True] * 3
    assert sorted(batch["names"]) == ["scene_0000", "scene_0001", "scene_0002"]


def test_batch_depends_on_seed_and_step_alone(dataset: MultiViewDataset) -> None:
    arguments = {"frames": (2, 4), "images_per_step": 8}
    first = dataset.batch(5, 7, **arguments)
    dataset.batch(5, 8, **arguments)
    assert_same(first, MultiViewDataset(list(dataset.folders), 28).batch(5, 7, **arguments))
    others = [dataset.batch(seed, step, **arguments) for seed, step in ((5, 8), (6, 7), (8, 5))]
    assert all(
        other["images"].shape != first["images"].shape or not torch.equal(other["images"], first["images"])
        for other in others
    )


def test_worker_processes_give_the_same_batches_and_a_run_goes_on_where_it_was(wide: Path) -> None:
    dataset = MultiViewDataset(wide, 28, augment=True, mirror=True, aspect=(0.5, 1), zoom=(0.8, 1.2))
    torch.manual_seed(1)  # what the process drew before must not matter

    def loader(start: int, workers: int) -> DataLoader:
        sampler = MultiViewBatchSampler(dataset, seed=3, frames=(2, 4), images_per_step=4, steps=6, start=start)
        return DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=workers)

    alone = list(loader(0, 0))
    assert len(alone) == len(loader(0, 0)) == 6
    for step, batch in enumerate(loader(2, 2), start=2):
        assert_same(batch, alone[step])
        assert_same(batch, dataset.batch(3, step, (2, 4), 4))
    assert len({batch["images"].sum().item() for batch in alone}) == 6


def test_frame_count_is_drawn_once_per_batch_over_the_whole_range(dataset: MultiViewDataset) -> None:
    shapes = {dataset.batch(0, step, (2, 4), 8)["images"].shape[:2] for step in range(40)}
    # images_per_step // frames scenes
    assert shapes == {(4, 2), (2, 3), (2, 4)}


def test_frames_are_distinct_when_there_are_enough(dataset: MultiViewDataset) -> None:
    for step in range(10):
        centres = dataset.batch(0, step, (4, 4), 4)["extrinsics"][0, :, :, 3]
        assert len(torch.unique(centres, dim=0)) == 4
    assert dataset.batch(0, 0, (6, 6), 6)["images"].shape[:2] == (1, 6)


def test_first_frame_varies(dataset: MultiViewDataset) -> None:
    firsts = {tuple(dataset.batch(0, step, (2, 2), 2)["extrinsics"][0, 0, :, 3].tolist()) for step in range(60)}
    assert len(firsts) == 12


@pytest.mark.parametrize("nearby", [0.0, 1.0, 2.0])
def test_frames_come_from_a_stretch_around_the_first(nearby: float) -> None:
    generator = torch.Generator().manual_seed(0)
    draws = [draw_frames(50, 4, nearby, generator) for _ in range(2000)]
    assert all(len(set(draw)) == 4 and min(draw) >= 0 and max(draw) < 50 for draw in draws)
    length = int(nearby * 4) or 50
    assert max(max(draw) - min(draw) for draw in draws) == length - 1
    # the reference is uniform: 2000 / 50 each, and no count is further off than 5 standard deviations (6.3)
    counts = np.bincount([draw[0] for draw in draws], minlength=50)
    assert np.abs(counts - 40).max() < 32


def test_roots_are_mixed_by_ratio(tmp_path: Path) -> None:
    for name, scenes in (("many", 9), ("few", 2)):
        write_plane_scenes(tmp_path / name, scenes=scenes, views=1)
    mixed = MultiViewDataset([tmp_path / "many", tmp_path / "few"], 28, ratios=[1, 3])
    drawn = [request.scene for step in range(500) for request in mixed.plan(0, step, (1, 1), 4)]
    # 2000 draws of probability 3/4: 5 standard deviations are 97
    assert sum(scene >= 9 for scene in drawn) == pytest.approx(1500, abs=97)
    assert set(drawn) == set(range(11))
    even = MultiViewDataset([tmp_path / "many", tmp_path / "few"], 28)
    drawn = [request.scene for step in range(500) for request in even.plan(0, step, (1, 1), 4)]
    # 2000 draws of 2 in 11 (less spread without replacement): 5 standard deviations are 86
    assert sum(scene >= 9 for scene in drawn) == pytest.approx(2000 * 2 / 11, abs=86)
    with pytest.raises(ValueError, match="one share"):
        MultiViewDataset([tmp_path / "many", tmp_path / "few"], 28, ratios=[1])


def test_a_mixture_file_names_roots_and_shares(tmp_path: Path) -> None:
    for name in ("real", "synthetic"):
        write_plane_scenes(tmp_path / name, scenes=2, views=1)
    (tmp_path / "mix.yaml").write_text("real: 0\nsynthetic: 1\n")
    config = dataclasses.replace(TrainConfig(), augment=True, nearby=2.0)
    mixed = MultiViewDataset.for_training(tmp_path / "mix.yaml", 28, config)
    assert mixed.augment and mixed.nearby == 2.0 and len(mixed) == 4
    drawn = {request.scene for step in range(20) for request in mixed.plan(0, step, (1, 1), 2)}
    assert drawn == {2, 3}
    (tmp_path / "mix.yaml").write_text("- real\n")
    with pytest.raises(ValueError, match="map folders"):
        MultiViewDataset.for_training(tmp_path / "mix.yaml", 28, config)
    with pytest.raises(FileNotFoundError, match=r"no such mixture of scenes: .*absent\.yaml"):
        MultiViewDataset.for_training(tmp_path / "absent.yaml", 28, config)


@pytest.mark.parametrize("mirror", [False, True])
def test_cut_views_show_the_same_world_and_are_centred(wide: Path, mirror: bool) -> None:
    dataset = MultiViewDataset(wide, 42, mirror=mirror, aspect=(0.33, 1.0), zoom=(0.5, 1.2))
    heights = set()
    flip = np.array([-1.0, 1, 1])
    for step in range(12):
        batch = dataset.batch(0, step, (3, 3), 3)
        height, width = batch["images"].shape[-2:]
        heights.add(height)
        assert width == 42 and height % 14 == 0
        # the principal point is the middle, whatever was cut
        torch.testing.assert_close(
            batch["intrinsics"][0, :, :2, 2], torch.tensor([21.0, height / 2]).expand(3, 2), atol=1e-4, rtol=0
        )
        mirrored = 0
        for depth, intrinsic, extrinsic in zip(*(batch[key][0].double().numpy() for key in _GEOMETRY)):
            # at most half a source pixel away, on a plane that recedes by at most 1.1 m per unit of ray here
            limit = 0.5 / 70 * 1.1 * 2.5
            back = flip[:, None] * extrinsic * [-1, 1, 1, 1]
            straight, turned = plane_error(depth, intrinsic, extrinsic), plane_error(depth[:, ::-1], intrinsic, back)
            assert min(straight, turned) < limit
            mirrored += turned < straight
        assert mirrored in (0, 3) and (mirror or mirrored == 0)
    assert heights == {14, 28}  # whole patches of at most 42 pixels times the aspect


_GEOMETRY = ("depths", "intrinsics", "extrinsics")


def test_zoom_is_drawn_per_image_within_its_range(wide: Path) -> None:
    dataset = MultiViewDataset(wide, 28, zoom=(0.8, 1.2))
    focal = torch.cat([dataset.batch(0, step, (4, 4), 4)["intrinsics"][0, :, 0, 0] for step in range(60)])
    # the square around the principal point is limited by its height: 2 x 22.08 pixels of 48, seen with fx = 70.4
    whole = 1.1 * 64 * 28 / 44.16
    assert focal.min() == pytest.approx(whole, rel=1e-5)  # half of the draws are capped at 1
    assert focal.max() <= whole / 0.8 * (1 + 1e-5) and focal.max() > whole / 0.85
    # half of the heights are capped at 1, nearly always less than the widths
    assert 0.3 < float((focal < whole * (1 + 1e-5)).double().mean()) < 0.6


def test_resized_images_show_what_depth_says(wide: Path) -> None:
    batch = MultiViewDataset(wide, 28).batch(0, 0, (4, 4), 4)
    for image, depth, intrinsic, extrinsic in zip(*(batch[key][0].double().numpy() for key in ("images", *_GEOMETRY))):
        colors = np.rint(255 * image.transpose(1, 2, 0))
        # half a source pixel of 1/70 at 2.5 m moves a point by 18 mm, along which colours change by 120 x 3.9 per metre
        assert color_error(colors[2:-2, 2:-2], *_crop(depth, intrinsic, 2), extrinsic) < 120 * 3.9 * 0.018 * 1.5


def _crop(depth: np.ndarray, intrinsic: np.ndarray, border: int) -> tuple[np.ndarray, np.ndarray]:
    shift = np.array([[0, 0, border], [0, 0, border], [0, 0, 0]])
    return depth[border:-border, border:-border], intrinsic - shift


def test_scenes_without_depth_or_translation_say_so(tmp_path: Path) -> None:
    intrinsic = camera_matrix(48, 36)
    views = [(pose, *view(intrinsic, pose, 36, 48)) for pose in camera_path(2)]
    write_frames(tmp_path / "a", [Frame(image, intrinsic, pose) for pose, image, _ in views], {})
    frames = [Frame(image, intrinsic, pose, depth) for pose, image, depth in views]
    write_frames(tmp_path / "b", frames, {}, translation_known=False)
    batch = MultiViewDataset(tmp_path, 28).batch(0, 0, (2, 2), 4)
    for index, name in enumerate(batch["names"]):
        assert bool(batch["has_depth"][index]) == bool(batch["point_masks"][index].any()) == (name == "b")
        assert bool(batch["translation_known"][index]) == (name == "a")


@pytest.mark.parametrize("zoom", [(1.0, 1.0), (0.8, 1.0)])
def test_small_cache_gives_the_same_batches(dataset: MultiViewDataset, zoom: tuple[float, float]) -> None:
    whole = MultiViewDataset(dataset.folders, 28, zoom=zoom)
    frame = 28 * 28 * 7  # bytes of image and depth
    bounded = MultiViewDataset(dataset.folders, 28, zoom=zoom, cache_bytes=int(5.5 * frame))
    for step in range(6):
        assert_same(bounded.batch(0, step, (2, 2), 6), whole.batch(0, step, (2, 2), 6))
    assert len(bounded._views) == 5 and bounded._views.cost == 5 * frame


def test_a_scene_comes_whole(dataset: MultiViewDataset) -> None:
    scene = dataset.scene(1)
    assert scene.name == "scene_0001" and scene.images.shape == (4, 28, 28, 3) and scene.extrinsics.shape == (4, 3, 4)


def test_settings_out_of_range(dataset: MultiViewDataset) -> None:
    with pytest.raises(ValueError, match="aspect must be"):
        MultiViewDataset(dataset.folders, 28, aspect=(1.0, 0.5))
    with pytest.raises(ValueError, match="nearby must be"):
        MultiViewDataset(dataset.folders, 28, nearby=-1)
    with pytest.raises(ValueError, match="least <= most <= images_per_step"):
        dataset.batch(0, 0, (2, 9), 8)


def test_empty_root(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"scene\.json"):
        MultiViewDataset(tmp_path, 28)
    with pytest.raises(FileNotFoundError):
        MultiViewDataset(tmp_path / "absent", 28)
