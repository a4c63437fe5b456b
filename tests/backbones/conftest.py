"""The big VGGT without storage, and a tiny one with every part of it that runs in milliseconds."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from subspace3d.backbones.config import CONFIGS, VGGTConfig
from subspace3d.backbones.vggt import VGGT

TINY = VGGTConfig(
    name="tiny",
    image_size=56,
    embed_dim=32,
    num_heads=2,
    encoder_depth=2,
    depth=4,
    layer_scale=0.5,
    camera_depth=2,
    depth_features=16,
    depth_channels=(8, 12, 16, 20),
    depth_taps=(0, 1, 2, 3),
    frames_chunk_size=3,
)


@pytest.fixture
def tiny() -> VGGT:
    return VGGT(TINY)


@pytest.fixture(scope="session")
def big() -> VGGT:
    with torch.device("meta"):
        return VGGT(CONFIGS["vggt-1b"])


@pytest.fixture
def other_packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pi3, VGGT-Omega and MapAnything are installed, as the small networks in ``standins``."""
    monkeypatch.syspath_prepend(Path(__file__).with_name("standins"))
    yield
    for name in list(sys.modules):
        if name.partition(".")[0] in ("pi3", "vggt_omega", "mapanything", "standin_layers"):
            del sys.modules[name]
