"""Pi3 and Pi3X, of the user's installed package ``pi3``."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from subspace3d.backbones.construction import HostRanges, keep_float32
from subspace3d.backbones.point_maps import PointMapBackbone, intrinsics_from_points, world_to_camera
from subspace3d.backbones.prediction import Prediction
from subspace3d.backbones.protocol import Backbone
from subspace3d.backbones.weights import load_weights

_LINEARS = r"(attn\.(qkv|proj)|mlp\.(fc1|fc2))"
_DECODERS = rf"(point|camera)_decoder\.(projects|linear_out|blocks\.\d+\.{_LINEARS})"
_CAMERA = r"camera_head\.(res_conv\.\d+\.res_conv[123]|more_mlps\.[02]|fc_t|fc_rot)"
_HEADS = ("point_head", "conf_head", "camera_head", "metric_head")
# Inputs beside images, which are not given here.
_CONDITIONS = ("depth_encoder", "depth_emb", "ray_embed", "pose_inject_blk")


class Pi3Backbone(PointMapBackbone):
    """Images -> points in each camera, camera-to-world poses in a world of its own, a confidence logit.

    Points and poses are trained; the confidence, and the metric scale of Pi3X, have no target here and stay frozen.
    """

    frame = "free"
    special_tokens = 5
    frozen = ("encoder", "conf_decoder", "conf_head", "metric_decoder", "metric_head", "metric_token")
    parts: Mapping[str, str] = {
        "decoder": "decoder",
        "point_decoder": "point_head",
        "point_head": "point_head",
        "camera_decoder": "camera_head",
        "camera_head": "camera_head",
    }
    blocks = r"decoder\.\d+|(point|camera|conf)_decoder\.blocks\.\d+"
    licence = "CC BY-NC 4.0 (non-commercial)"
    requires = ("pi3",)
    install = "pip install git+https://github.com/yyfz/Pi3"

    def __init__(self, name: str) -> None:
        self.name = name
        # the convolutions of Pi3X's point head pad by repetition, for which PEFT has no LoRA
        points = r"|point_head\.proj" if name == "pi3" else ""
        cores, heads = rf"decoder\.\d+\.{_LINEARS}", rf"({_DECODERS}|{_CAMERA}{points})"
        self.targets = {"cores": cores, "heads": heads, "all": f"({cores}|{heads})"}
        repository = "yyfz233/Pi3" if name == "pi3" else "yyfz233/Pi3X"
        self.weights_advice = f"model.safetensors from https://huggingface.co/{repository}"
        self.scale = "free" if name == "pi3" else "metric"

    def network(self) -> nn.Module:
        with HostRanges():
            if self.name == "pi3":
                model = importlib.import_module("pi3.models.pi3").Pi3()
            else:
                model = importlib.import_module("pi3.models.pi3x").Pi3X(use_multimodal=False)
        if self.name == "pi3x":
            # its forward writes the scaled poses into those the gradient of the scale would need
            model.metric_head.register_forward_hook(_without_graph)
        for name, module in model.named_children():
            # the package asks for this on a GPU alone
            if name in _HEADS:
                keep_float32(module)
        return model

    def load(self, path: Path) -> nn.Module:
        model = self.network()
        load_weights(model, path, ignored_parts=_CONDITIONS if self.name == "pi3x" else ())
        return model

    def local_points(self, outputs: dict[str, Tensor]) -> Tensor:
        return outputs["local_points"]

    def __call__(self, model: nn.Module, images: Tensor) -> Prediction:
        outputs = model(images)
        points = outputs["local_points"].float()
        confidence = outputs["conf"].squeeze(-1).float().sigmoid()
        return Prediction(
            depth=points[..., 2],
            confidence=confidence,
            extrinsics=world_to_camera(outputs["camera_poses"].float()),
            intrinsics=intrinsics_from_points(points, confidence),
            outputs=outputs,
        )


def _without_graph(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    return output.detach()


def preset(name: str) -> Backbone:
    """``pi3`` or ``pi3x``."""
    return Pi3Backbone(name)
