"""Batches of several views of several scenes, each batch a function of (seed, step) alone.

`MultiViewDataset.batch` makes a batch in this process. For worker processes the same batches come from
``DataLoader(dataset, batch_sampler=MultiViewBatchSampler(dataset, ...), collate_fn=collate, num_workers=...)``.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from subspace3d.cropping import centred_box, crop_resize
from subspace3d.datasets.augment import jitter_colours, mirror_views
from subspace3d.formats.scene import Scene, SceneFile, View, find_scenes
from subspace3d.geometry import near_origin
from subspace3d.tables import read_table

_OPEN_SCENES = 64 << 20  # bytes of scene.json kept parsed


class Sampling(Protocol):
    """How the images of a training run are drawn; `training.config.TrainConfig` says what each means."""

    @property
    def augment(self) -> bool: ...

    @property
    def aspect(self) -> tuple[float, float]: ...

    @property
    def zoom(self) -> tuple[float, float]: ...

    @property
    def nearby(self) -> float: ...


@dataclass(frozen=True)
class SampleRequest:
    """One scene of a batch; with the dataset's settings it decides the sample."""

    scene: int
    count: int  # frames
    height: int  # of the images, pixels; the width is the dataset's image_size
    seed: int


class MultiViewDataset(Dataset[dict[str, Any]]):
    """All scenes below some folders; decoded frames stay in memory as long as the byte budget allows.

    Images are cut so that the principal point is in the middle, which is what a pose encoding by fields of view
    assumes, and resized to ``image_size`` pixels across.

    Args:
        roots (Path | Sequence[Path]): folders with scenes anywhere below them.
        image_size (int): width of the images in pixels, and their height unless ``aspect`` says otherwise.
        augment (bool): colour jitter on the images of a batch.
        mirror (bool): show half of the scenes mirrored left to right, cameras included.
        cache_bytes (int): frames beyond it are read from disk again; each worker process has a budget of its own.
        ratios (Sequence[float]): share of each root in the batches; none: every scene is equally likely.
        aspect (tuple[float, float]): range of height / width, drawn once per batch; heights are rounded down to a
            multiple of ``patch_size``. (1, 1): square.
        zoom (tuple[float, float]): range of the share of height and of width that is kept around the principal point,
            drawn per image and capped at 1.
        nearby (float): frames of a sample come from a stretch of ``nearby`` x count frames around the first one, in
            recorded order; 0: from the whole scene.
        patch_size (int): of the backbone, pixels.

    Raises:
        FileNotFoundError: a root does not exist.
        ValueError: a root holds no scenes, or a setting is out of its range.
    """

    def __init__(
        self,
        roots: Path | Sequence[Path],
        image_size: int,
        augment: bool = False,
        mirror: bool = False,
        cache_bytes: int = 4 << 30,
        ratios: Sequence[float] = (),
        aspect: tuple[float, float] = (1.0, 1.0),
        zoom: tuple[float, float] = (1.0, 1.0),
        nearby: float = 0.0,
        patch_size: int = 14,
    ) -> None:
        listed = [roots] if isinstance(roots, str | Path) else list(roots)
        found = [find_scenes(root) for root in listed]
        _check_ranges(listed, ratios, aspect, zoom, nearby)
        self.folders = [folder for folders in found for folder in folders]
        starts = np.cumsum([0, *map(len, found)])
        self._groups = [range(starts[i], starts[i + 1]) for i in range(len(found))] if ratios else [range(starts[-1])]
        self._ratios = torch.tensor(ratios or [1.0], dtype=torch.float64)
        self.image_size, self.augment, self.mirror = image_size, augment, mirror
        self.aspect, self.zoom, self.nearby, self.patch_size = aspect, zoom, nearby, patch_size
        self._files = _LeastRecent(_OPEN_SCENES)
        self._views = _LeastRecent(cache_bytes)

    @classmethod
    def for_training(
        cls, roots: Path | Sequence[Path], image_size: int, config: Sampling, patch_size: int = 14
    ) -> MultiViewDataset:
        """The data set with the augmentation and frame sampling of ``config``.

        A root that is a YAML file is a mixture: it maps folders (relative to it) to their shares of the batches.
        """
        ratios: list[float] = []
        if isinstance(roots, str | Path) and Path(roots).suffix in (".yaml", ".yml"):
            roots, ratios = read_mixture(Path(roots))
        return cls(
            roots,
            image_size,
            augment=config.augment,
            ratios=ratios,
            aspect=config.aspect,
            zoom=config.zoom,
            nearby=config.nearby,
            patch_size=patch_size,
        )

    def require_cameras(self) -> MultiViewDataset:
        """Itself; refuses at once, and not at the step that draws it, a scene that cannot be trained on.

        Raises:
            ValueError: a scene.json breaks the format, or has frames without cameras.
        """
        for index in range(len(self)):
            self._file(index)
        return self

    def __len__(self) -> int:
        return len(self.folders)

    def scene(self, index: int) -> Scene:
        """Scene ``index`` with all its frames as squares of ``image_size``."""
        file = self._file(index)
        square = (self.image_size, self.image_size)
        return Scene.of(file, (self._view(index, i, square) for i in range(len(file))))

    def batch(self, seed: int, step: int, frames: tuple[int, int], images_per_step: int) -> dict[str, Any]:
        """The batch of one step: the same for the same arguments, whatever was drawn before. See `collate`."""
        return collate([self[request] for request in self.plan(seed, step, frames, images_per_step)])

    def plan(self, seed: int, step: int, frames: tuple[int, int], images_per_step: int) -> list[SampleRequest]:
        """What the batch of one step consists of: S frames uniform in ``frames``, B = images_per_step // S scenes.

        S and the height of the images are drawn once per batch. Scenes are drawn without replacement as long as there
        are enough of them; with ``ratios`` the root is drawn first, for every scene anew.

        Raises:
            ValueError: ``images_per_step`` is smaller than the most frames.
        """
        if not 1 <= frames[0] <= frames[1] <= images_per_step:
            raise ValueError(
                f"frames must be 1 <= least <= most <= images_per_step, got {frames} and {images_per_step}"
            )
        generator = torch.Generator().manual_seed(_mix(seed, step))
        count = int(torch.randint(frames[0], frames[1] + 1, (), generator=generator))
        height = self.image_size
        if self.aspect != (1.0, 1.0):
            aspect = _uniform(self.aspect, generator)
            height = max(1, int(self.image_size * aspect + 1e-6) // self.patch_size) * self.patch_size
        scenes = self._draw_scenes(images_per_step // count, generator)
        return [SampleRequest(scene, count, height, _mix(seed, step, slot)) for slot, scene in enumerate(scenes)]

    def __getitem__(self, request: SampleRequest) -> dict[str, Any]:
        """One scene: ``images [S, 3, H, W]`` float32 in 0..1, ``depths``, ``extrinsics``, ``intrinsics``, ``has_depth``
        and ``translation_known`` (bool), ``names``; as in `collate` but without the leading axis."""
        generator = torch.Generator().manual_seed(request.seed)
        file = self._file(request.scene)
        chosen = draw_frames(len(file), request.count, self.nearby, generator)
        size = (request.height, self.image_size)
        views = [self._view(request.scene, index, size, self._draw_zoom(generator)) for index in chosen]
        images, depths, intrinsics, extrinsics = map(np.stack, zip(*views))
        sample = as_sample(images, depths, intrinsics, extrinsics, file)
        if self.augment:
            sample["images"] = jitter_colours(sample["images"], generator)
        if self.mirror and float(torch.rand((), generator=generator)) < 0.5:
            sample = mirror_views(sample)
        return sample

    def __getstate__(self) -> dict[str, Any]:
        # a worker process starts with empty caches instead of a copy of this one's
        state = self.__dict__.copy()
        state["_files"], state["_views"] = _LeastRecent(self._files.budget), _LeastRecent(self._views.budget)
        return state

    def _draw_scenes(self, wanted: int, generator: torch.Generator) -> list[int]:
        if len(self._groups) == 1:
            return [self._groups[0][index] for index in _draw(len(self), wanted, generator)]
        picks = torch.multinomial(self._ratios, wanted, replacement=True, generator=generator).tolist()
        drawn = [iter(_draw(len(group), picks.count(i), generator)) for i, group in enumerate(self._groups)]
        return [self._groups[pick][next(drawn[pick])] for pick in picks]

    def _draw_zoom(self, generator: torch.Generator) -> tuple[float, float]:
        if self.zoom == (1.0, 1.0):
            return self.zoom
        return min(1.0, _uniform(self.zoom, generator)), min(1.0, _uniform(self.zoom, generator))

    def _file(self, index: int) -> SceneFile:
        file = self._files.get(index)
        if file is None:
            file = SceneFile(self.folders[index])
            if not file.has_cameras:
                raise ValueError(
                    f"{file.file} has frames without cameras, with which training compares: convert a capture that has "
                    "them (COLMAP, nerfstudio, rgbd), or tune by finetune --few, which needs images alone"
                )
            self._files.put(index, file, file.file.stat().st_size)
        return file

    def _view(self, scene: int, frame: int, size: tuple[int, int], zoom: tuple[float, float] = (1.0, 1.0)) -> View:
        """One view cut around its principal point and resized to ``size``; shared with the cache where possible."""
        # where every draw has another cut, what can be used again is the frame as stored
        varies = self.aspect != (1.0, 1.0) or self.zoom != (1.0, 1.0)
        view = self._views.get((scene, frame))
        if view is None:
            file = self._file(scene)
            view = (file.image(frame), file.valid_depth(frame), *file.camera(frame))
            # names the frame where images cannot be cut around its principal point
            file.square(frame, view[2])
            if not varies:
                view = _cut(view, size, zoom)
            self._views.put((scene, frame), view, view[0].nbytes + view[1].nbytes)
        return _cut(view, size, zoom) if varies else view


class MultiViewBatchSampler(Sampler[list[SampleRequest]]):
    """The plans of the steps ``start``, ..., ``steps`` - 1; a run that was cut off goes on with another ``start``.

    Args:
        dataset (MultiViewDataset): whose scenes are drawn.
        seed (int): of the run.
        frames (tuple[int, int]): least and most frames per scene.
        images_per_step (int): most images in a batch.
        steps (int): of the whole run.
        start (int): steps already taken.
    """

    def __init__(
        self,
        dataset: MultiViewDataset,
        seed: int,
        frames: tuple[int, int],
        images_per_step: int,
        steps: int,
        start: int = 0,
    ) -> None:
        self.dataset, self.seed, self.frames, self.images_per_step = dataset, seed, frames, images_per_step
        self.steps, self.start = steps, start

    def __iter__(self) -> Iterator[list[SampleRequest]]:
        for step in range(self.start, self.steps):
            yield self.dataset.plan(self.seed, step, self.frames, self.images_per_step)

    def __len__(self) -> int:
        return max(0, self.steps - self.start)


def as_sample(
    images: np.ndarray, depths: np.ndarray, intrinsics: np.ndarray, extrinsics: np.ndarray, scene: SceneFile | Scene
) -> dict[str, Any]:
    """Views of ``scene`` as tensors, as `MultiViewDataset` returns them: uint8 images, the rest as in `Scene`."""
    return {
        "images": torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255,
        "depths": torch.from_numpy(depths),
        "extrinsics": torch.from_numpy(near_origin(extrinsics)[0]).float(),
        "intrinsics": torch.from_numpy(intrinsics).float(),
        "has_depth": torch.tensor(scene.has_depth),
        "translation_known": torch.tensor(scene.translation_known),
        "names": scene.name,
    }


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stack samples with equal numbers of frames.

    Returns:
        dict: ``images [B, S, 3, H, W]`` float32 in 0..1, ``depths [B, S, H, W]`` float32 (unit of the scene,
        0 = invalid), ``point_masks [B, S, H, W]`` bool, ``extrinsics [B, S, 3, 4]`` float32 OpenCV camera-from-world,
        of cameras far from the origin in the world of `geometry.near_origin`,
        ``intrinsics [B, S, 3, 3]`` float32 in pixels, ``has_depth [B]`` and ``translation_known [B]`` bool,
        ``names`` list of B scene names.
    """
    names = [sample["names"] for sample in samples]
    batch: dict[str, Any] = {
        key: torch.stack([sample[key] for sample in samples]) for key in samples[0] if key != "names"
    }
    return batch | {"point_masks": batch["depths"] > 0, "names": names}


def read_mixture(path: Path) -> tuple[list[Path], list[float]]:
    """Folders and their shares from a YAML file that maps one to the other.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a mapping of folders to numbers.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such mixture of scenes: {path}")
    try:
        content = read_table(path)
    except ValueError as error:
        raise ValueError(f"{path} must map folders of scenes to their shares: {error}") from error
    if not all(
        isinstance(share, int | float) and not isinstance(share, bool) and math.isfinite(share)
        for share in content.values()
    ):
        raise ValueError(f"{path} must map folders of scenes to their shares, like 'real: 0.4'")
    return [path.parent / str(folder) for folder in content], [float(share) for share in content.values()]


def draw_frames(available: int, count: int, nearby: float, generator: torch.Generator) -> list[int]:
    """The reference, uniform over the scene, then frames from a stretch around it, in random order.

    The stretch has ceil(nearby x count) frames, at least ``count``, and is moved inside the scene at its ends; with
    ``nearby`` 0 it is the scene. Frames repeat only where the scene has fewer than ``count``.
    """
    if count > available:
        return torch.randint(available, (count,), generator=generator).tolist()
    length = min(available, max(count, math.ceil(nearby * count))) if nearby else available
    reference = int(torch.randint(available, (), generator=generator))
    start = min(max(0, reference - length // 2), available - length)
    others = [start + index for index in torch.randperm(length, generator=generator).tolist()]
    return [reference, *(index for index in others if index != reference)][:count]


class _LeastRecent:
    """Values by key up to a total cost; the ones used longest ago go first."""

    def __init__(self, budget: int) -> None:
        self.budget, self.cost = budget, 0
        self._entries: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> Any:
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key][0]

    def put(self, key: Hashable, value: Any, cost: int) -> None:
        while self._entries and self.cost + cost > self.budget:
            _, (_, dropped) = self._entries.popitem(last=False)
            self.cost -= dropped
        if cost <= self.budget:
            self._entries[key] = (value, cost)
            self.cost += cost


def _cut(view: View, size: tuple[int, int], zoom: tuple[float, float]) -> View:
    image, depth, intrinsic, extrinsic = view
    box = centred_box(intrinsic, (depth.shape[0], depth.shape[1]), aspect=size[0] / size[1], zoom=zoom)
    return *crop_resize(image, depth, intrinsic, box, size), extrinsic


def _check_ranges(
    roots: Sequence[Path],
    ratios: Sequence[float],
    aspect: tuple[float, float],
    zoom: tuple[float, float],
    nearby: float,
) -> None:
    if ratios and (len(ratios) != len(roots) or min(ratios) < 0 or sum(ratios) <= 0):
        raise ValueError(f"ratios must be one share of at least 0 for each of {len(roots)} roots, got {list(ratios)}")
    for name, (low, high) in (("aspect", aspect), ("zoom", zoom)):
        if not 0 < low <= high:
            raise ValueError(f"{name} must be a range 0 < least <= most, got {(low, high)}")
    if nearby < 0:
        raise ValueError(f"nearby must be at least 0, got {nearby}")


def _draw(available: int, wanted: int, generator: torch.Generator) -> list[int]:
    if wanted <= available:
        return torch.randperm(available, generator=generator)[:wanted].tolist()
    return torch.randint(available, (wanted,), generator=generator).tolist()


def _uniform(bounds: tuple[float, float], generator: torch.Generator) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * float(torch.rand((), generator=generator))


def _mix(*numbers: int) -> int:
    # neighbouring (seed, step, slot) must not share a stream, as they would with a sum
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
