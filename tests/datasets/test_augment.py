from __future__ import annotations

import colorsys
from pathlib import Path

import torch
from training.plane_scenes import write_plane_scenes

from subspace3d.datasets.augment import jitter_colours, mirror_views
from subspace3d.datasets.multiview import MultiViewDataset
from subspace3d.geometry import unproject

LUMA = torch.tensor([0.299, 0.587, 0.114])


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_mirrored_scene_is_consistent(tmp_path: Path) -> None:
    batch = MultiViewDataset(write_plane_scenes(tmp_path, scenes=1, views=2), 28).batch(0, 0, (2, 2), 2)
    sample = {key: batch[key][0] for key in ("images", "depths", "extrinsics", "intrinsics")}
    sample["intrinsics"][:, 0, 2] += 3  # off-centre, to see that it is mirrored too
    mirrored = mirror_views(sample)
    points, seen = (unproject(s["depths"], s["extrinsics"], s["intrinsics"]) for s in (sample, mirrored))
    # the pixel at column j shows what was at W - 1 - j, at the mirrored place
    torch.testing.assert_close(seen.flip(2) * torch.tensor([-1.0, 1, 1]), points, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.linalg.det(mirrored["extrinsics"][:, :, :3]), torch.ones(2))
    for key, value in mirror_views(mirrored).items():
        torch.testing.assert_close(value, sample[key])


def test_jitter_is_shared_by_the_views_of_a_scene() -> None:
    images = torch.rand(1, 3, 8, 8).expand(3, -1, -1, -1)
    shared = jitter_colours(images, generator(), same=1.0, probability=1.0)
    assert torch.equal(shared[0], shared[1]) and not torch.equal(shared[0], images[0])
    own = jitter_colours(images, generator(), same=0.0, probability=1.0)
    assert not torch.equal(own[0], own[1])
    assert own.min() >= 0 and own.max() <= 1
    torch.testing.assert_close(jitter_colours(images, generator(), strength=0, hue=0, grey=0), images)


def test_the_affine_map_is_brightness_contrast_and_saturation_in_turn() -> None:
    images = 0.3 + 0.4 * torch.rand(4, 3, 6, 5)  # so that nothing is clipped on the way
    jittered = jitter_colours(images, generator(), strength=0.2, hue=0.0, probability=1.0, same=0.0, grey=0.0)
    draw = generator()
    torch.rand(3, 4, generator=draw)
    factors = 1 + 0.2 * (2 * torch.rand(4, 4, generator=draw) - 1)
    brightness, contrast, saturation = factors[:3, :, None, None, None]
    step = images * brightness
    mean = (step * LUMA[:, None, None]).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    step = mean + contrast * (step - mean)
    grey = (step * LUMA[:, None, None]).sum(1, keepdim=True)
    torch.testing.assert_close(jittered, grey + saturation * (step - grey))


def test_hue_turns_around_the_colour_circle() -> None:
    """A third of a turn carries red to green, and small turns move the hue of HSV the same way by about as much."""
    red = torch.tensor([0.8, 0.2, 0.2]).reshape(1, 3, 1, 1)
    hues = []
    for seed in range(40):
        color = jitter_colours(red, generator(seed), strength=0.0, hue=0.1, probability=1.0, grey=0.0).flatten()
        assert abs(color.mean().item() - 0.4) < 1e-6  # the axis of the turn is grey
        hues.append((colorsys.rgb_to_hsv(*color.tolist())[0] + 0.5) % 1 - 0.5)
    # HSV's hexagon and the circle agree at every sixth of a turn and differ by at most 0.003 of one between
    assert -0.103 < min(hues) < -0.08 and 0.08 < max(hues) < 0.103


def test_a_share_of_the_images_is_left_alone_or_made_grey() -> None:
    images = torch.rand(4000, 3, 1, 2)
    out = jitter_colours(images, generator(), probability=0.9, same=0.0, grey=0.05)
    untouched = float((out == images).flatten(1).all(1).double().mean())
    grey = float(((out - out.mean(1, keepdim=True)).abs() < 1e-6).flatten(1).all(1).double().mean())
    # 4000 draws: five standard deviations are 0.024 and 0.017. Untouched are a tenth of those that are not made grey
    assert abs(grey - 0.05) < 0.017 and untouched < 0.1 * 0.95 + 0.024
    # an image left alone goes through the identity up to one rounding
    close = float(((out - images).abs() < 1e-6).flatten(1).all(1).double().mean())
    assert abs(close - 0.1 * 0.95) < 0.024
