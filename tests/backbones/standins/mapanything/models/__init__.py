"""A small MapAnything: lists of view dicts in and out, the published keys and module names, random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from standin_layers import Block, SwiGLU, encoder, patch_grid
from torch import Tensor, nn

PATCH = 14


class Encoder(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.data_norm_type = "dinov2"
        self.patches = encoder(PATCH, dim)

    def forward(self, images: Tensor) -> Tensor:
        return self.patches(images)


class InfoSharing(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.self_attention_blocks = nn.ModuleList([Block(dim, mlp=SwiGLU) for _ in range(4)])


class DPTFeature(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scratch = nn.Module()
        for level in range(1, 5):
            self.scratch.add_module(f"layer{level}_rn", nn.Conv2d(dim, dim, 3, padding=1, bias=False))
        self.scratch.layer_rn = nn.ModuleList(self.scratch.get_submodule(f"layer{level}_rn") for level in range(1, 5))
        further: list[list[nn.Module]] = [
            [nn.ConvTranspose2d(dim, dim, 1)], [nn.ConvTranspose2d(dim, dim, 1)], [],
            [nn.Conv2d(dim, dim, 3, padding=1)],
        ]  # fmt: skip
        # as published: the convolutions above once more, called by these names alone
        self.input_process = nn.ModuleList(
            nn.Sequential(nn.Sequential(nn.Conv2d(dim, dim, 1), *rest), last)
            for rest, last in zip(further, self.scratch.layer_rn)
        )

    def forward(self, levels: list[Tensor]) -> Tensor:
        total = torch.zeros_like(levels[0])
        for process, x in zip(self.input_process, levels):
            total = total + process(x)
        return total


class DPTRegressionProcessor(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.conv2 = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1), nn.ReLU(), nn.Conv2d(dim, 5, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(self.conv1(x), scale_factor=PATCH, mode="bilinear", align_corners=True)
        return self.conv2(x)


class ResConvBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.res_conv1, self.res_conv2, self.res_conv3 = (nn.Conv2d(dim, dim, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.res_conv3(F.relu(self.res_conv2(F.relu(self.res_conv1(x))))))


class PoseHead(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, dim, 1)
        self.res_conv = nn.ModuleList([ResConvBlock(dim)])
        self.more_mlps = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU())
        self.fc_t, self.fc_rot = nn.Linear(dim, 3), nn.Linear(dim, 4)
        with torch.no_grad():
            self.fc_rot.bias.copy_(torch.tensor([0.0, 0.0, 0.0, 1.0]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for layer in (self.proj, *self.res_conv):
            x = layer(x)
        x = self.more_mlps(x.mean((-2, -1)))
        return self.fc_t(x), F.normalize(self.fc_rot(x), dim=-1)


class MapAnything(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.encoder = Encoder(dim)
        self.position = nn.Linear(2, dim)
        self.fusion_norm_layer = nn.LayerNorm(dim)
        self.scale_token = nn.Parameter(torch.randn(dim) * 0.02)
        self.info_sharing = InfoSharing(dim)
        self.dpt_feature_head, self.dpt_regressor_head = DPTFeature(dim), DPTRegressionProcessor(dim)
        # as published, the two have second names
        self.dense_head = nn.Sequential(self.dpt_feature_head, self.dpt_regressor_head)
        self.pose_head = PoseHead(dim)
        self.scale_head = nn.Linear(dim, 1)

    @classmethod
    def from_pretrained(cls, folder: str) -> MapAnything:
        model = cls(**json.loads((Path(folder) / "config.json").read_text()))
        model.load_state_dict(load_file(Path(folder) / "model.safetensors"), strict=False)
        return model.eval()

    def forward(self, views: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        assert all(view["data_norm_type"] == ["dinov2"] for view in views)
        scenes, _, height, width = views[0]["img"].shape
        count, grid = len(views), (height // PATCH, width // PATCH)
        tokens = self.encoder(torch.cat([view["img"] for view in views]))
        tokens = self.fusion_norm_layer(tokens + self.position(patch_grid(height, width, PATCH, tokens)))
        patches, dim = tokens.shape[1:]
        levels = [tokens]
        scale = self.scale_token.expand(scenes, 1, dim)
        for index, block in enumerate(self.info_sharing.self_attention_blocks):
            if index % 2 == 0:
                tokens = block(tokens)
            else:
                # the first dimension runs over views, then over scenes
                joined = tokens.reshape(count, scenes, patches, dim).transpose(0, 1).reshape(scenes, -1, dim)
                joined = block(torch.cat([joined, scale], 1))
                joined, scale = joined[:, :-1], joined[:, -1:]
                tokens = joined.reshape(scenes, count, patches, dim).transpose(0, 1).reshape(-1, patches, dim)
            levels.append(tokens)
        # float32, as normalisation leaves them inside the autocast of a GPU
        maps = [level.float().transpose(1, 2).reshape(-1, dim, *grid) for level in (levels[0], *levels[-3:])]
        # as published, on every device
        with torch.autocast(tokens.device.type, enabled=False):
            dense, pose = self.dense_head(maps), self.pose_head(maps[-1])
            metric = torch.exp(self.scale_head(scale[:, 0].float()))
        rays = F.normalize(torch.cat([dense[:, :2], 1 + dense[:, 2:3].abs()], 1), dim=1).permute(0, 2, 3, 1)
        along = torch.exp(dense[:, 3:4]).permute(0, 2, 3, 1)
        translations, quaternions = pose
        results = []
        for index in range(count):
            chosen = slice(index * scenes, (index + 1) * scenes)
            factor = metric[:, :, None, None]
            results.append({
                "pts3d_cam": rays[chosen] * along[chosen] * factor,
                "ray_directions": rays[chosen],
                "depth_along_ray": along[chosen] * factor,
                "cam_trans": translations[chosen] * metric,
                "cam_quats": quaternions[chosen],
                "metric_scaling_factor": metric,
                "conf": 1 + torch.exp(dense[chosen, 4]),
            })  # fmt: skip
        return results


def init_model_from_config(model_name: str, device: str = "cuda", machine: str = "default") -> nn.Module:
    assert model_name == "mapanything"
    return MapAnything(dim=16).to(device).eval()
