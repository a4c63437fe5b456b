"""What is handed to the renderer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from subspace3d.formats.scene import DEPTH_SCALE
from subspace3d.scenes.geometry.shapes import SceneMeshes
from subspace3d.scenes.sampler import SceneSpec


@dataclass
class Draft:
    """A drawn scene, ready to be rendered."""

    spec: SceneSpec
    meshes: SceneMeshes
    pictures: dict[int, np.ndarray] = field(default_factory=dict)  # atlas cell -> linear RGB [h, w, 3]
    nearest: float = 0.15  # a view that sees a surface nearer than this is refused
    depth_scale: float = DEPTH_SCALE
    counts: Callable[[np.ndarray], np.ndarray] | None = None  # world points [..., 3] -> whether their depth counts
