from __future__ import annotations

from pathlib import Path

import pytest
import torch
from training.plane_scenes import write_plane_scenes

from subspace3d.backbones.pose import unproject_depth
from subspace3d.datasets.multiview import MultiViewDataset, jitter_colours, mirror_views


@pytest.fixture
def dataset(tmp_path: Path) -> MultiViewDataset:
    return MultiViewDataset(write_plane_scenes(tmp_path / "set", scenes=3, views=4), image_size=28)


def test_shapes_and_types(dataset: MultiViewDataset) -> None:
    batch = dataset.batch(seed=0, step=0, frames=(2, 2), images_per_step=7)
    assert batch["images"].shape == (3, 2, 3, 28, 28) and batch["images"].dtype == torch.float32
    assert batch["images"].min() >= 0 and batch["images"].max() <= 1
    assert batch["depths"].shape == batch["point_masks"].shape == (3, 2, 28, 28)
    assert batch["point_masks"].dtype == torch.bool and batch["point_masks"].all()
    assert batch["extrinsics"].shape == (3, 2, 3, 4) and batch["intrinsics"].shape == (3, 2, 3, 3)
    assert sorted(batch["names"]) == ["scene_0000", "scene_0001", "scene_0002"]


def test_batch_depends_on_seed_and_step_alone(dataset: MultiViewDataset) -> None:
    arguments = {"frames": (2, 4), "images_per_step": 8}
    first = dataset.batch(5, 7, **arguments)
    dataset.batch(5, 8, **arguments)
    again = MultiViewDataset(list(dataset.folders), 28).batch(5, 7, **arguments)
    assert first["names"] == again["names"]
    assert all(torch.equal(first[key], again[key]) for key in first if key != "names")
    others = [dataset.batch(seed, step, **arguments) for seed, step in ((5, 8), (6, 7), (8, 5))]
    assert all(
        other["images"].shape != first["images"].shape or not torch.equal(other["images"], first["images"])
        for other in others
    )


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


def test_small_cache_gives_the_same_batches(dataset: MultiViewDataset) -> None:
    bounded = MultiViewDataset(dataset.folders, 28, cache_bytes=60_000)  # one scene takes 4 * 28 * 28 * 7 bytes
    for step in range(6):
        assert torch.equal(bounded.batch(0, step, (2, 2), 6)["depths"], dataset.batch(0, step, (2, 2), 6)["depths"])
    assert len(bounded._cache) == 2
    assert bounded._cached_bytes == 2 * 4 * 28 * 28 * 7


def test_mirrored_scene_is_consistent(dataset: MultiViewDataset) -> None:
    batch = dataset.batch(0, 0, (2, 2), 2)
    sample = {key: batch[key][0] for key in ("images", "depths", "extrinsics", "intrinsics")}
    sample["intrinsics"][:, 0, 2] += 3  # off-centre, to see that it is mirrored too
    mirrored = mirror_views(sample)
    points, seen = (unproject_depth(s["depths"], s["extrinsics"], s["intrinsics"]) for s in (sample, mirrored))
    # the pixel at column j shows what was at W - 1 - j, at the mirrored place
    torch.testing.assert_close(seen.flip(2) * torch.tensor([-1.0, 1, 1]), points, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.linalg.det(mirrored["extrinsics"][:, :, :3]), torch.ones(2))
    for key, value in mirror_views(mirrored).items():
        torch.testing.assert_close(value, sample[key])


def test_jitter_is_shared_by_the_views_of_a_scene() -> None:
    images = torch.rand(1, 3, 8, 8).expand(3, -1, -1, -1)
    shared = jitter_colours(images, torch.Generator().manual_seed(1), same=1.0)
    assert torch.equal(shared[0], shared[1]) and not torch.equal(shared[0], images[0])
    own = jitter_colours(images, torch.Generator().manual_seed(1), same=0.0)
    assert not torch.equal(own[0], own[1])
    assert own.min() >= 0 and own.max() <= 1
    torch.testing.assert_close(jitter_colours(images, torch.Generator(), strength=0.0), images)


def test_empty_root(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"scene\.json"):
        MultiViewDataset(tmp_path, 28)
    with pytest.raises(FileNotFoundError):
        MultiViewDataset(tmp_path / "absent", 28)
