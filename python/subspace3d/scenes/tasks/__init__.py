"""Stand-ins for the paper's three tasks, made from code: printed faces, clothed bodies, transparent objects."""

from __future__ import annotations

from subspace3d.scenes.config import SceneConfig
from subspace3d.scenes.draft import Draft
from subspace3d.scenes.sampler import Seeds
from subspace3d.scenes.tasks.bodies import draw_bodies
from subspace3d.scenes.tasks.faces import draw_faces
from subspace3d.scenes.tasks.glass import draw_glass

SPLITS = ("train", "test", "cross")  # training, in-domain test, cross-domain test


def draw_task(config: SceneConfig, seeds: Seeds, split: str, scene: int, detail: int) -> Draft:
    """Draw scene number ``scene`` of a split of ``config.task``; ``detail`` multiplies the meshes' resolution."""
    if config.task == "faces":
        return draw_faces(seeds, split, scene, config.scene_views, config.resolution, config.pictures)
    if config.task == "bodies":
        return draw_bodies(seeds, split, config.scene_views, config.arc, detail)
    return draw_glass(seeds, split, config.scene_views, detail)
