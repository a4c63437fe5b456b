"""VGGT-Omega, of the user's installed package ``vggt_omega``."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from subspace3d.backbones.construction import HostRanges, keep_float32
from subspace3d.backbones.prediction import Prediction
from subspace3d.backbones.protocol import Backbone
from subspace3d.backbones.weights import load_weights

_LINEARS = r"(attn\.(qkv|proj)|mlp\.(fc1|fc2))"
_CORES = rf"aggregator\.(frame_blocks|inter_frame_blocks)\.\d+\.{_LINEARS}"
_CAMERA = rf"camera_head\.(camera_branch\.[02]|trunk\.\d+\.{_LINEARS})"
# Entries 0 and 1 of resize_layers are transposed convolutions, entry 2 is the identity.
_DENSE = (
    r"dense_head\.(projects\.\d+|resize_layers\.3|proj|proj_conf"
    r"|scratch\.(layer\d_rn|refinenet\d\.(out_conv|resConfUnit[12]\.conv[12])))"
)


class OmegaBackbone(Backbone):
    """VGGT's outputs with one camera encoding, patches of 16 pixels, and a qkv whose bias is masked.

    The masked qkv has a forward of its own, so cores sit beside it.
    """

    name = "vggt-omega"
    image_size = 512
    patch_size = 16
    special_tokens = 17
    targets: Mapping[str, str] = {
        "cores": _CORES,
        "heads": f"({_CAMERA}|{_DENSE})",
        "all": f"({_CORES}|{_CAMERA}|{_DENSE})",
    }
    parts: Mapping[str, str] = {"aggregator": "aggregator", "dense_head": "depth_head", "camera_head": "camera_head"}
    frozen = ("aggregator.patch_embed", "text_alignment_head")
    head_width = "dense_head.scratch.layer1_rn"
    blocks = r"aggregator\.(frame_blocks|inter_frame_blocks)\.\d+"
    licence = "FAIR Noncommercial Research License (facebook/VGGT-Omega)"
    weights_advice = "vggt_omega_1b_512.pt from https://huggingface.co/facebook/VGGT-Omega (gated)"
    requires = ("vggt_omega",)
    install = "pip install git+https://github.com/facebookresearch/vggt-omega"

    def network(self) -> nn.Module:
        with HostRanges():
            model = importlib.import_module("vggt_omega.models.vggt_omega").VGGTOmega()
        _fill_masks(model)
        for head in (model.camera_head, model.dense_head):
            # the package asks for this on a GPU alone
            keep_float32(head)
        return model

    def load(self, path: Path) -> nn.Module:
        model = self.network()
        load_weights(model, path, ignored_parts=("text_alignment_head",))
        return model

    def __call__(self, model: nn.Module, images: Tensor) -> Prediction:
        return Prediction.from_vggt(model(images))


@torch.no_grad()
def _fill_masks(model: nn.Module) -> None:
    """Keep the biases of queries and values, drop that of keys: without a checkpoint the package leaves NaN there."""
    for module in model.modules():
        mask = getattr(module, "bias_mask", None)
        if isinstance(mask, Tensor) and not mask.is_meta:
            queries, keys, values = mask.chunk(3)
            queries.fill_(1), keys.fill_(0), values.fill_(1)


def preset(name: str) -> Backbone:
    """``vggt-omega``."""
    return OmegaBackbone()
