"""The losses of tuning on a few images as a source of gradients, for scenes whose frames have no cameras."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from subspace3d.formats.scene import SceneFile
from subspace3d.training.config import TrainConfig
from subspace3d.training.device import choose_device
from subspace3d.training.few import draw_pairs, draw_views, few_loss, read_few, taught_by


class FewLosses:
    """The loss of `few_loss` on some views of one scene a step; a `gradients.StepLosses`.

    Scenes take turns in random order. Of a scene at most half of its views (but at least 2, and no more than
    ``images_per_step``) are drawn, so that the steps of one half of the batches see others than those of the other.
    Images are squares as they are: nothing of the augmentation of a training counts here.

    Args:
        model (nn.Module): whose loss is taken, on the device of ``config``.
        folders (Sequence[Path]): of the scenes, of any number of images.
        image_size (int): side of the square images, pixels.
        config (TrainConfig): seed, images per step, precision and device.

    Raises:
        FileNotFoundError: a scene does not exist.
        ValueError: a scene breaks the format, or has one image and no depth, so that nothing teaches.
    """

    def __init__(self, model: nn.Module, folders: Sequence[Path], image_size: int, config: TrainConfig) -> None:
        self._model, self._image_size, self._config = model, image_size, config
        self._files = [SceneFile(folder) for folder in folders]
        teachers = {taught_by(file) for file in self._files}
        self.teacher = "both" if len(teachers) > 1 else teachers.pop()
        """``depth``, ``views``, or ``both`` where scenes differ; see `taught_by`."""
        generator = torch.Generator().manual_seed(config.seed)
        self._order = torch.randperm(len(self._files), generator=generator).tolist()

    @classmethod
    def where_needed(
        cls, model: nn.Module, folders: Sequence[Path], image_size: int, config: TrainConfig
    ) -> FewLosses | None:
        """The losses where a scene has frames without cameras; none: all have cameras, with which a loss compares."""
        if all(SceneFile(folder).has_cameras for folder in folders):
            return None
        return cls(model, folders, image_size, config)

    def __call__(self, step: int) -> Iterator[torch.Tensor]:
        config = self._config
        file = self._files[self._order[step % len(self._order)]]
        seed = np.random.SeedSequence([config.seed, step]).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(seed))
        count = min(config.images_per_step, max(2, len(file) // 2))
        scene = read_few(file, self._image_size, draw_views(range(len(file)), count, generator))
        views = range(len(scene.images))
        pairs = draw_pairs(len(views), generator) if scene.scene is None else []
        yield few_loss(self._model, scene, views, pairs, config, choose_device(config.device))
