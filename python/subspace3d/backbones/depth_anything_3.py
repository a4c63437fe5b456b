"""Depth Anything 3 as a backbone: the inner network of the user's installed ``depth-anything-3``, with its own names.

``depth_anything_3.api.DepthAnything3`` runs under inference mode; its ``model`` is what is tuned here. The package pins
libraries that the network does not import, so `INSTALL` takes it without them.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from subspace3d.backbones.aggregator import IMAGE_MEAN, IMAGE_STD
from subspace3d.backbones.construction import HostRanges
from subspace3d.backbones.prediction import Prediction
from subspace3d.backbones.protocol import Backbone

INSTALL = "pip install 'subspace3d[da3]' && pip install --no-deps depth-anything-3"
_LINEARS = r"(attn\.(qkv|proj)|mlp\.(fc1|fc2))"
# The rays of the second head, whose modules end in _aux, are dropped where cameras are decoded. Entries 0 and 1 of
# resize_layers are transposed convolutions, entry 2 is the identity.
_DEPTH = (
    r"head\.(projects\.\d+|resize_layers\.3|scratch\.(layer\d_rn|output_conv1|output_conv2\.[02]"
    r"|refinenet\d\.(out_conv|resConfUnit[12]\.conv[12])))"
)
_CAMERA = r"cam_dec\.(backbone\.[02]|fc_t|fc_qvec|fc_fov\.0)"
_UNUSED = (
    "cam_enc",
    *(f"head.scratch.refinenet{level}_aux" for level in range(1, 5)),
    "head.scratch.output_conv1_aux",
    "head.scratch.output_conv2_aux",
)


@dataclass(frozen=True)
class _Published:
    repository: str
    licence: str
    depth: int
    first_across: int
    """The first block that was trained with several images: its predecessors are DINOv2's, one image at a time."""


_PUBLISHED = {
    "da3-small": _Published("depth-anything/DA3-SMALL", "Apache-2.0", 12, 4),
    "da3-base": _Published("depth-anything/DA3-BASE", "Apache-2.0", 12, 4),
    "da3-large": _Published("depth-anything/DA3-LARGE-1.1", "CC-BY-NC-4.0", 24, 8),
}


class DepthAnything3(Backbone):
    """``DepthAnything3Net``: cores on the blocks from the first one that looks across images, the first image as frame.

    Args:
        name: of the preset.
        depth: blocks of the transformer.
        first_across: the first block that is tuned; those before it stay frozen, as DINOv2's image encoder.
    """

    image_size = 504
    patch_size = 14
    scale = "scene"
    frame = "first"
    parts: Mapping[str, str] = {"backbone": "backbone", "head": "depth_head", "cam_dec": "camera_head"}
    head_width = "head.scratch.layer1_rn"
    blocks = r"backbone\.pretrained\.blocks\.\d+"
    special_tokens = 1
    weight_prefixes = ("model.",)
    requires = ("depth_anything_3", "addict", "omegaconf", "einops")
    install = INSTALL

    def __init__(self, name: str, depth: int, first_across: int) -> None:
        self.name = name
        tuned = "|".join(map(str, range(first_across, depth)))
        cores = rf"backbone\.pretrained\.blocks\.({tuned})\.{_LINEARS}"
        self.targets = {"cores": cores, "heads": rf"({_DEPTH}|{_CAMERA})", "all": rf"({cores}|{_DEPTH}|{_CAMERA})"}
        inside = ("patch_embed", "cls_token", "pos_embed", *(f"blocks.{index}" for index in range(first_across)))
        self.frozen = (*(f"backbone.pretrained.{part}" for part in inside), *_UNUSED)

    def network(self) -> nn.Module:
        package = import_package()
        with HostRanges():
            return package.create_object(package.load_config(package.MODEL_REGISTRY[self.name]))

    def __call__(self, model: nn.Module, images: Tensor) -> Prediction:
        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
        outputs = model((images - mean) / std, ref_view_strategy="first")
        return Prediction(
            depth=outputs["depth"],
            confidence=outputs["depth_conf"],
            extrinsics=outputs["extrinsics"][..., :3, :],
            intrinsics=outputs["intrinsics"],
            outputs=outputs,
        )

    def download(self) -> Path:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(_PUBLISHED[self.name].repository, "model.safetensors"))


def preset(name: str) -> Backbone:
    """``da3-small``, ``da3-base`` or ``da3-large``."""
    published = _PUBLISHED[name]
    backbone = DepthAnything3(name, published.depth, published.first_across)
    backbone.licence = published.licence
    backbone.weights_advice = (
        f"pass model.safetensors of https://huggingface.co/{published.repository} (licence: {published.licence}), "
        "or weights='hub' to download it"
    )
    return backbone


class _Package:
    def __init__(self) -> None:
        # otherwise it prints a line for every network and forward pass
        os.environ.setdefault("DA3_LOG_LEVEL", "WARN")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its libraries, about names it uses of them
            from depth_anything_3.cfg import create_object, load_config
            from depth_anything_3.registry import MODEL_REGISTRY

        self.create_object, self.load_config, self.MODEL_REGISTRY = create_object, load_config, MODEL_REGISTRY


def import_package() -> _Package:
    """What builds a published network, quiet.

    Raises:
        ModuleNotFoundError: the package or a library of its network is not installed; names the command.
    """
    try:
        return _Package()
    except ImportError as error:
        raise ModuleNotFoundError(
            f"Depth Anything 3 cannot be imported ({error}); {INSTALL}", name=error.name
        ) from error
