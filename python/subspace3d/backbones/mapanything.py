"""MapAnything, of the user's installed package ``mapanything``."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from subspace3d.backbones.aggregator import IMAGE_MEAN, IMAGE_STD
from subspace3d.backbones.construction import HostRanges
from subspace3d.backbones.point_maps import PointMapBackbone, intrinsics_from_points, world_to_camera
from subspace3d.backbones.pose import quaternion_to_matrix
from subspace3d.backbones.prediction import Kind, Prediction
from subspace3d.backbones.protocol import Backbone
from subspace3d.backbones.weights import load_weights

_CORES = r"info_sharing\.self_attention_blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2|w12|w3))"
# Of the published head the convolutions scratch.layer*_rn have three names, and its forward calls them by another than
# the one that PEFT replaces.
_DPT = (
    r"dpt_feature_head\.(input_process\.(\d+\.0\.0|3\.0\.1)|scratch\.refinenet\d\.(out_conv|resConfUnit[12]\.conv[12]))"
    r"|dpt_regressor_head\.(conv1|conv2\.[02])"
)
_POSE = r"pose_head\.(proj|res_conv\.\d+\.res_conv[123]|more_mlps\.[02]|fc_t|fc_rot)"
_NORMALISATION = "dinov2"


class MapAnythingBackbone(PointMapBackbone):
    """A list of views -> rays, depth along them, camera-to-world quaternions and translations, metric.

    z-depth is the depth along the ray times the z of its unit direction. Points and poses are trained up to scale, so
    the metric scale is kept as it is.
    """

    scale = "metric"
    frame = "first"
    targets: Mapping[str, str] = {"cores": _CORES, "heads": f"({_DPT}|{_POSE})", "all": f"({_CORES}|{_DPT}|{_POSE})"}
    parts: Mapping[str, str] = {
        "info_sharing": "info_sharing",
        "dpt_feature_head": "depth_head",
        "dpt_regressor_head": "depth_head",
        "dense_head": "depth_head",
        "pose_head": "camera_head",
    }
    frozen = (
        "encoder", "ray_dirs_encoder", "depth_encoder", "depth_scale_encoder", "cam_rot_encoder", "cam_trans_encoder",
        "cam_trans_scale_encoder", "fusion_norm_layer", "scale_head", "scale_token",
    )  # fmt: skip
    blocks = r"info_sharing\.self_attention_blocks\.\d+"
    lacks: Mapping[Kind, str] = {"intrinsics": "from the rays"}
    requires = ("mapanything",)
    install = "pip install git+https://github.com/facebookresearch/map-anything"

    def __init__(self, name: str) -> None:
        self.name = name
        apache = name.endswith("-apache")
        self.licence = "Apache-2.0" if apache else "CC BY-NC 4.0 (non-commercial)"
        repository = "facebook/map-anything-apache" if apache else "facebook/map-anything"
        self.weights_advice = f"model.safetensors, beside its config.json, from https://huggingface.co/{repository}"

    def network(self) -> nn.Module:
        device = str(torch.get_default_device())
        with HostRanges():
            return importlib.import_module("mapanything.models").init_model_from_config("mapanything", device=device)

    def load(self, path: Path) -> nn.Module:
        """The network that ``config.json`` beside the file describes, with the weights in it.

        The package builds it from a folder with the published file, which a checkpoint of one's own lies beside.
        """
        missing = [name for name in ("config.json", "model.safetensors") if not (path.parent / name).is_file()]
        if missing:
            raise ValueError(
                f"weights of {self.name} must lie beside their config.json and the published model.safetensors, "
                f"{path.parent} has no {' and no '.join(missing)}"
            )
        model = importlib.import_module("mapanything.models").MapAnything.from_pretrained(str(path.parent))
        # what the package left out or made up is refused here
        load_weights(model, path, ignored_parts=())
        return model.train()

    def local_points(self, outputs: list[dict[str, Tensor]]) -> Tensor:
        return torch.stack([view["pts3d_cam"] for view in outputs], dim=1)

    def __call__(self, model: nn.Module, images: Tensor) -> Prediction:
        wanted = next((m.data_norm_type for m in model.modules() if hasattr(m, "data_norm_type")), _NORMALISATION)
        if wanted != _NORMALISATION:
            raise ValueError(f"backbone: {self.name} must take images normalised as {_NORMALISATION}, got {wanted!r}")
        mean, deviation = (images.new_tensor(values)[:, None, None] for values in (IMAGE_MEAN, IMAGE_STD))
        normalised = (images - mean) / deviation
        views: list[dict[str, Any]] = [
            {"img": view, "data_norm_type": [_NORMALISATION]} for view in normalised.unbind(1)
        ]
        outputs = model(views)
        rays, along, quaternions, centres = (
            torch.stack([view[key] for view in outputs], dim=1).float()
            for key in ("ray_directions", "depth_along_ray", "cam_quats", "cam_trans")
        )
        confidence = torch.stack([view["conf"] for view in outputs], 1) if "conf" in outputs[0] else None
        poses = torch.cat([quaternion_to_matrix(quaternions), centres[..., None]], dim=-1)
        return Prediction(
            depth=(along * rays[..., 2:]).squeeze(-1),
            confidence=confidence,
            extrinsics=world_to_camera(poses),
            intrinsics=intrinsics_from_points(rays),
            outputs=outputs,
        )


def preset(name: str) -> Backbone:
    """``mapanything`` or ``mapanything-apache``."""
    return MapAnythingBackbone(name)
