"""Mine attribute subspaces from adapters and fine-tune 3D foundation models inside them.

Importing this package is cheap: each public name is imported when it is first used, and with it torch, PEFT or Mitsuba
where it needs them.
"""

from __future__ import annotations

import importlib as _importlib
from importlib import metadata as _metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from subspace3d.adapters.basis import build_basis as build_basis
    from subspace3d.adapters.inject import inject as inject
    from subspace3d.adapters.peft.tuner import SubspaceConfig as SubspaceConfig
    from subspace3d.backbones.build import build_backbone as build_backbone
    from subspace3d.datasets.multiview import MultiViewDataset as MultiViewDataset
    from subspace3d.evaluation.scene import evaluate_scene as evaluate_scene
    from subspace3d.formats.basis import load_basis as load_basis
    from subspace3d.formats.basis import save_basis as save_basis
    from subspace3d.formats.scene import load_scene as load_scene
    from subspace3d.formats.subspace import load_subspace as load_subspace
    from subspace3d.training.config import TrainConfig as TrainConfig
    from subspace3d.training.loop import train as train

_HOMES = {
    "MultiViewDataset": "datasets.multiview",
    "SubspaceConfig": "adapters.peft.tuner",
    "TrainConfig": "training.config",
    "build_backbone": "backbones.build",
    "build_basis": "adapters.basis",
    "evaluate_scene": "evaluation.scene",
    "inject": "adapters.inject",
    "load_basis": "formats.basis",
    "load_scene": "formats.scene",
    "load_subspace": "formats.subspace",
    "save_basis": "formats.basis",
    "train": "training.loop",
}

__all__ = [
    "MultiViewDataset",
    "SubspaceConfig",
    "TrainConfig",
    "__version__",
    "build_backbone",
    "build_basis",
    "evaluate_scene",
    "inject",
    "load_basis",
    "load_scene",
    "load_subspace",
    "save_basis",
    "train",
]

__version__ = _metadata.version("subspace3d")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(_importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
