"""Cores in VGGT's own trainer: a model factory and a data set class for its Hydra configuration.

Copy this file next to the trainer (the folder `training/` of the VGGT repository) and name both in the configuration:

    model:
      _target_: reference_trainer.build_model
      weights: /path/to/model.pt
      basis: /path/to/basis.safetensors
    data:
      train:
        dataset:
          dataset_configs:
            - _target_: reference_trainer.SceneDataset
              root: /path/to/scenes
    optim:
      frozen_module_names: null
    distributed:
      broadcast_buffers: false
    checkpoint:
      resume_checkpoint_path: null

Four of these lines matter more than they seem:

- The factory loads the weights itself, before the cores go in. `resume_checkpoint_path` would look for the plain keys
  in the adapted model, match none of them and, with the trainer's `strict: False`, train from random weights.
- The default `frozen_module_names: ["*aggregator*"]` freezes the cores too, and the locked evaluation mode that comes
  with it switches the trainer's checkpointing of activations off.
- `broadcast_buffers: false`: the bases U and V are buffers, and would be sent to all processes in every forward pass.
- The trainer's checkpoints are `{"model": ...}` and hold U and V as well; `save_cores` keeps the cores alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

import subspace3d as s3
from subspace3d.formats.scene import SceneFile, find_scenes


def build_model(weights: str | None, basis: str, backbone: str = "vggt-1b") -> nn.Module:
    """A VGGT with cores on every module of ``basis``; all else is frozen.

    To tune the reference class itself, build and load it here instead: its module names are the same.
    """
    model = s3.build_backbone(backbone, weights)
    s3.inject(model, basis)
    return model


def save_cores(model: nn.Module, path: str) -> None:
    """Only what was trained."""
    save_file({name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}, path)


class SceneDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Scenes of this package, as the trainer's `ComposedDataset` asks for them.

    Args:
        common_conf: the trainer's common settings; only its attributes ``training`` and ``img_size`` are read.
        root: folder with scenes anywhere below it.
        len_train: samples in an epoch.
    """

    def __init__(self, common_conf: Any, root: str, len_train: int = 100_000) -> None:
        self.training = bool(common_conf.training)
        self.image_size = int(common_conf.img_size)
        self.len_train = len_train
        self.scenes = find_scenes(Path(root))

    def __len__(self) -> int:
        return self.len_train

    def __getitem__(self, index: tuple[int, int, float]) -> dict[str, Any]:
        scene, images, aspect_ratio = index
        return self.get_data(seq_index=scene, img_per_seq=images, aspect_ratio=aspect_ratio)

    def get_data(
        self,
        seq_index: int,
        img_per_seq: int,
        seq_name: str | None = None,
        ids: list[int] | None = None,
        aspect_ratio: float = 1.0,
    ) -> dict[str, Any]:
        """One sample: lists over frames of RGB uint8 [H, W, 3], z-depth [H, W] (0 = invalid) and OpenCV cameras.

        Images are square here, whatever ``aspect_ratio`` asks for.
        """
        folder = self.scenes[seq_index % len(self.scenes)]
        available = len(SceneFile(folder))
        if ids is None:
            ids = np.random.default_rng().choice(available, img_per_seq, replace=available < img_per_seq).tolist()
        scene = s3.load_scene(folder, self.image_size, ids)
        camera_points = [_camera_points(depth, k) for depth, k in zip(scene.depths, scene.intrinsics)]
        world_points = [(points - pose[:, 3]) @ pose[:, :3] for points, pose in zip(camera_points, scene.extrinsics)]
        return {
            "seq_name": seq_name or scene.name,
            "ids": np.asarray(ids),
            "frame_num": len(scene.images),
            "images": list(scene.images),
            "depths": list(scene.depths),
            "extrinsics": list(scene.extrinsics),
            "intrinsics": list(scene.intrinsics),
            "cam_points": camera_points,
            "world_points": world_points,
            "point_masks": [depth > 0 for depth in scene.depths],
            "original_sizes": [np.array(image.shape[:2]) for image in scene.images],
        }


def _camera_points(depth: np.ndarray, intrinsic: np.ndarray) -> np.ndarray:
    """Points [H, W, 3] of a depth map in its camera's frame."""
    from subspace3d.geometry import camera_rays, pixel_centres

    points: np.ndarray = depth[..., None] * camera_rays(intrinsic, pixel_centres(*depth.shape))
    return points
