"""VGGT as a backbone: ours in its two sizes, and any other with the published module names."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn

from subspace3d.backbones.config import VGGTConfig, named_config
from subspace3d.backbones.protocol import Backbone, Prediction, attach
from subspace3d.backbones.targets import EXPRESSIONS
from subspace3d.backbones.vggt import NANO_WEIGHTS, VGGT, build_vggt
from subspace3d.backbones.weights import HUB_FILE, HUB_REPOSITORY, download_from_hub


class VGGTBackbone(Backbone):
    """The published module names and outputs."""

    scale = "scene"
    frame = "first"
    targets = EXPRESSIONS
    parts: Mapping[str, str] = {name: name for name in ("aggregator", "depth_head", "camera_head")}
    frozen = ("aggregator.patch_embed",)
    encoder = "aggregator.patch_embed"
    # the depth head brings every level of features to this width before it fuses them: 256 in VGGT-1B
    head_width = "depth_head.scratch.layer1_rn"

    def __init__(self, config: VGGTConfig | None = None) -> None:
        self.config = config
        self.name = config.name if config is not None else "vggt"
        if config is not None:
            self.image_size, self.patch_size = config.image_size, config.patch_size
            self.special_tokens = 1 + config.num_registers

    def network(self) -> nn.Module:
        if self.config is None:
            raise ValueError("backbone must be a preset to be built, got a model of VGGT's layout without one")
        return VGGT(self.config)

    def __call__(self, model: nn.Module, images: Tensor) -> Prediction:
        outputs = model(images)
        # a network of another kind, trained with an objective of its own
        return Prediction.from_vggt(outputs) if isinstance(outputs, Mapping) else Prediction(outputs=outputs)

    def build(self, weights: str | os.PathLike[str] | None = None) -> nn.Module:
        return attach(build_vggt(self.name, weights), self)

    def download(self) -> Path:
        return download_from_hub(self.name)

    def checkpointing(self, model: nn.Module, enabled: bool) -> None:
        for module in model.modules():
            if isinstance(module, VGGT):
                module.enable_checkpointing(enabled)


class VGGTFromFactory(VGGTBackbone):
    """What a function makes of ``weights``: a user's own VGGT, or a network with a backbone attached."""

    def __init__(self, factory: Callable[..., object]) -> None:
        super().__init__()
        self.factory = factory

    def network(self) -> nn.Module:
        return self.build("random")

    def build(self, weights: str | os.PathLike[str] | None = None) -> nn.Module:
        model = self.factory(weights)
        if not isinstance(model, nn.Module):
            raise ValueError(f"backbone: {self.name} must return a torch.nn.Module, got {type(model).__name__}")
        return attach(model, self)


def preset(name: str) -> Backbone:
    """``vggt-nano`` or ``vggt-1b``."""
    backbone = VGGTBackbone(named_config(name))
    if name == "vggt-nano":
        backbone.shipped = NANO_WEIGHTS
        backbone.licence = "Apache-2.0"
    else:
        backbone.licence = "VGGT License, non-commercial"
        backbone.weights_advice = f"{HUB_FILE} or model.pt from https://huggingface.co/{HUB_REPOSITORY}"
    return backbone


def describe(model: nn.Module) -> Backbone:
    """The backbone of a network that nothing is attached to: of our VGGT with its sizes, else of the published one."""
    own = next((module for module in model.modules() if isinstance(module, VGGT)), None)
    return VGGTBackbone(own.config if own is not None else None)
