"""Batches of several views of several scenes, each batch a function of (seed, step) alone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from subspace3d.datasets.scene_format import Scene, find_scenes, load_scene


class MultiViewDataset:
    """All scenes below some folders, decoded once and kept in memory as long as the byte budget allows.

    Args:
        roots (Path | Sequence[Path]): folders with scenes anywhere below them.
        image_size (int): width and height the images are resized to, pixels.
        augment (bool): colour jitter on the images of a batch.
        mirror (bool): show half of the scenes mirrored left to right, cameras included.
        cache_bytes (int): scenes beyond it are read from disk again.

    Raises:
        FileNotFoundError: a root does not exist.
        ValueError: a root holds no scenes.
    """

    def __init__(
        self,
        roots: Path | Sequence[Path],
        image_size: int,
        augment: bool = False,
        mirror: bool = False,
        cache_bytes: int = 4 << 30,
    ) -> None:
        self.folders = [
            folder for root in ([roots] if isinstance(roots, str | Path) else roots) for folder in find_scenes(root)
        ]
        self.image_size, self.augment, self.mirror = image_size, augment, mirror
        self._cache_bytes = cache_bytes
        self._cached_bytes = 0
        self._cache: OrderedDict[int, Scene] = OrderedDict()

    def __len__(self) -> int:
        return len(self.folders)

    def scene(self, index: int) -> Scene:
        """Scene ``index`` with all its frames, resized; shared with the cache, so not to be written to."""
        if index in self._cache:
            self._cache.move_to_end(index)
            return self._cache[index]
        scene = load_scene(self.folders[index], image_size=self.image_size)
        size = scene.images.nbytes + scene.depths.nbytes
        while self._cache and self._cached_bytes + size > self._cache_bytes:
            _, dropped = self._cache.popitem(last=False)
            self._cached_bytes -= dropped.images.nbytes + dropped.depths.nbytes
        if size <= self._cache_bytes:
            self._cache[index] = scene
            self._cached_bytes += size
        return scene

    def batch(self, seed: int, step: int, frames: tuple[int, int], images_per_step: int) -> dict:
        """The batch of one step: the same for the same arguments, whatever was drawn before."""
        generator = torch.Generator().manual_seed(_mix(seed, step))
        return self.sample_batch(generator, frames, images_per_step)

    def sample_batch(self, generator: torch.Generator, frames: tuple[int, int], images_per_step: int) -> dict:
        """Draw scenes and frames: S uniform in ``frames``, once per batch; B = images_per_step // S scenes.

        Scenes, and the frames of a scene, are drawn without replacement when there are enough of them. Frames come
        in random order; the first is the reference.

        Returns:
            dict: ``images [B, S, 3, H, W]`` float32 in 0..1, ``depths [B, S, H, W]`` float32 (unit of the scene,
            0 = invalid), ``point_masks [B, S, H, W]`` bool, ``extrinsics [B, S, 3, 4]`` float32 OpenCV
            camera-from-world, ``intrinsics [B, S, 3, 3]`` float32 in pixels, ``names`` list of B scene names.
        """
        count = int(torch.randint(frames[0], frames[1] + 1, (), generator=generator))
        chosen = _draw(len(self), images_per_step // count, generator)
        samples = [self._sample(self.scene(index), count, generator) for index in chosen]
        batch: dict = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
        batch["point_masks"] = batch["depths"] > 0
        batch["names"] = [self.folders[index].name for index in chosen]
        return batch

    def _sample(self, scene: Scene, count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        views = _draw(len(scene.images), count, generator)
        images = torch.from_numpy(scene.images[views]).permute(0, 3, 1, 2).float() / 255
        sample = {
            "images": images,
            "depths": torch.from_numpy(np.asarray(scene.depths[views], np.float32)),
            "extrinsics": torch.from_numpy(np.asarray(scene.extrinsics[views], np.float32)),
            "intrinsics": torch.from_numpy(np.asarray(scene.intrinsics[views], np.float32)),
        }
        if self.augment:
            sample["images"] = jitter_colours(images, generator)
        if self.mirror and float(torch.rand((), generator=generator)) < 0.5:
            sample = mirror_views(sample)
        return sample


def mirror_views(sample: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """[R | t] -> [F R F | F t], F = diag(-1, 1, 1), cx -> W - cx: the same cameras in the mirrored world.

    Args:
        sample (dict): ``images [S, 3, H, W]``, ``depths [S, H, W]``, ``extrinsics [S, 3, 4]``,
            ``intrinsics [S, 3, 3]``.
    """
    flip = torch.tensor([-1.0, 1.0, 1.0])
    extrinsics = flip[:, None] * sample["extrinsics"] * torch.tensor([-1.0, 1.0, 1.0, 1.0])
    intrinsics = sample["intrinsics"].clone()
    intrinsics[:, 0, 2] = sample["images"].shape[-1] - intrinsics[:, 0, 2]
    return {
        "images": sample["images"].flip(-1),
        "depths": sample["depths"].flip(-1),
        "extrinsics": extrinsics,
        "intrinsics": intrinsics,
    }


def jitter_colours(
    images: torch.Tensor, generator: torch.Generator, strength: float = 0.3, same: float = 0.7
) -> torch.Tensor:
    """Brightness, contrast and saturation, each scaled by a factor uniform in [1 - strength, 1 + strength].

    Args:
        images (Tensor): views of one scene, ``[S, 3, H, W]``, in 0..1.
        generator (Generator): source of the factors.
        strength (float): in [0, 1).
        same (float): probability that all views share their factors; otherwise every view has its own.
    """
    shared = float(torch.rand((), generator=generator)) < same
    factors = 1 + strength * (2 * torch.rand(3, len(images), 1, 1, 1, generator=generator) - 1)
    brightness, contrast, saturation = factors[:, :1] if shared else factors
    images = (images * brightness).clamp(0, 1)
    luma = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    mean = (images * luma).sum(dim=1, keepdim=True).mean(dim=(2, 3), keepdim=True)
    images = (mean + contrast * (images - mean)).clamp(0, 1)
    grey = (images * luma).sum(dim=1, keepdim=True)
    return (grey + saturation * (images - grey)).clamp(0, 1)


def _draw(available: int, wanted: int, generator: torch.Generator) -> list[int]:
    if wanted <= available:
        return torch.randperm(available, generator=generator)[:wanted].tolist()
    return torch.randint(available, (wanted,), generator=generator).tolist()


def _mix(seed: int, step: int) -> int:
    # neighbouring (seed, step) pairs must not share a stream, as they would with seed + step
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> np.uint64(1))
