"""VGGT as a backbone: ours in its two sizes, and any other with the published module names."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from subspace3d.backbones.config import VGGTConfig, named_config
from subspace3d.backbones.own_code import said_of
from subspace3d.backbones.prediction import Prediction
from subspace3d.backbones.protocol import Backbone, attach
from subspace3d.backbones.vggt import NANO_WEIGHTS, VGGT, build_vggt
from subspace3d.backbones.vggt_targets import EXPRESSIONS
from subspace3d.backbones.weights import HUB_FILE, HUB_REPOSITORY, download_from_hub
from subspace3d.log import logger


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
    """What a function makes of ``weights``: a user's own VGGT, of the sizes that its network has."""

    def __init__(self, name: str, factory: Callable[..., object]) -> None:
        super().__init__()
        self.name, self.factory = name, factory
        self._take(_sizes_without_weights(name, factory))

    def _take(self, sizes: tuple[int, int, int] | None) -> None:
        if sizes is not None:
            self.image_size, self.patch_size, self.special_tokens = sizes

    def network(self) -> nn.Module:
        return self.build("random")

    def build(self, weights: str | os.PathLike[str] | None = None) -> nn.Module:
        with said_of(self.name):
            model = self.factory(weights)
        if not isinstance(model, nn.Module):
            raise ValueError(f"backbone: {self.name} must return a torch.nn.Module, got {type(model).__name__}")
        sizes = measured_sizes(model)
        self._take(sizes)
        if sizes is None:
            raise ValueError(
                f"backbone: {self.name} takes weights, so it must return a VGGT with the published module names, got "
                f"{type(model).__name__}; for another model return a subspace3d Backbone, without arguments"
            )
        return attach(model, self)


@functools.cache
def _sizes_without_weights(name: str, factory: Callable[..., object]) -> tuple[int, int, int] | None:
    """`measured_sizes` of what ``factory("random")`` makes without storage; None, with a warning, where that fails."""
    try:
        with torch.device("meta"), said_of(name):
            model = factory("random")
    except ValueError as error:
        size = f"{VGGTBackbone.image_size} px and patches of {VGGTBackbone.patch_size} px"
        logger.warning(f"{size} are assumed for {name}, which does not say its sizes without its weights: {error}")
        return None
    return measured_sizes(model) if isinstance(model, nn.Module) else None


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
    """The backbone of a network that nothing is attached to: a VGGT of the sizes that it has."""
    own = next((module for module in model.modules() if isinstance(module, VGGT)), None)
    backbone = VGGTBackbone(own.config if own is not None else None)
    found = measured_sizes(model) if own is None else None
    if found is not None:
        backbone.image_size, backbone.patch_size, backbone.special_tokens = found
    return backbone


def measured_sizes(model: nn.Module) -> tuple[int, int, int] | None:
    """Image side and patch in pixels and special tokens of a network with the published module names; None: it has
    others.

    The position embedding ``aggregator.patch_embed.pos_embed`` ``[1, 1 + n, dim]`` is that of ``sqrt(n)`` patches a
    side, whose size is the kernel of ``aggregator.patch_embed.patch_embed.proj``.
    """
    aggregator = next(
        (module for name, module in model.named_modules() if name.rpartition(".")[2] == "aggregator"), None
    )
    try:
        if aggregator is None:
            return None
        encoder = aggregator.get_submodule("patch_embed")
        patch = encoder.get_submodule("patch_embed.proj").kernel_size[0]
        side = math.isqrt(encoder.get_parameter("pos_embed").shape[1] - 1)
        return side * int(patch), int(patch), 1 + aggregator.get_parameter("register_token").shape[-2]
    except AttributeError:
        return None
