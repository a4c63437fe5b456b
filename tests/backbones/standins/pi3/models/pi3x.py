"""A small Pi3X: beside Pi3 a convolutional point head and a metric factor on everything."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pi3.models.pi3 import DIM, PATCH, Pi3


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(DIM, DIM, 3, padding=1, padding_mode="replicate") for _ in range(2)]
        norms = [nn.GroupNorm(1, DIM), nn.GroupNorm(1, DIM)]
        self.layers = nn.Sequential(norms[0], nn.ReLU(), convolutions[0], norms[1], nn.ReLU(), convolutions[1])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class ConvHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        up = nn.Sequential(
            nn.ConvTranspose2d(DIM, DIM, 2, 2), nn.Conv2d(DIM, DIM, 3, padding=1, padding_mode="replicate")
        )
        self.upsample_blocks = nn.ModuleList([nn.Sequential(up, Residual())])
        self.output_block = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(DIM, DIM, 3, padding=1, padding_mode="replicate"),
                nn.ReLU(),
                nn.Conv2d(DIM, channels, 1, padding_mode="replicate"),
            )
            for channels in (2, 1)
        )

    def forward(self, tokens: Tensor, height: int, width: int) -> Tensor:
        x = tokens.transpose(1, 2).reshape(len(tokens), DIM, height // PATCH, width // PATCH)
        for block in self.upsample_blocks:
            x = block(x)
        x = F.interpolate(x, (height, width), mode="bilinear")
        return torch.cat([block(x) for block in self.output_block], 1).permute(0, 2, 3, 1)


class Pi3X(Pi3):
    def __init__(self, use_multimodal: bool = True) -> None:
        super().__init__()
        self.use_multimodal = use_multimodal
        if use_multimodal:
            self.ray_embed, self.depth_emb = nn.Linear(2, DIM), nn.Parameter(torch.zeros(1, 1, DIM))
        self.metric_token = nn.Parameter(torch.zeros(1, 1, 2 * DIM))
        self.metric_decoder, self.metric_head = nn.Linear(2 * DIM, DIM), nn.Linear(DIM, 1)

    def make_point_head(self) -> nn.Module:
        return ConvHead()

    def forward(self, imgs: Tensor) -> dict[str, Tensor]:
        outputs = super().forward(imgs)
        hidden = self.features(imgs).reshape(len(imgs), -1, 2 * DIM).mean(1)
        metric = self.metric_head(self.metric_decoder(hidden + self.metric_token[0])).reshape(-1).exp()
        factor = metric[:, None, None, None, None]
        poses, local = outputs["camera_poses"], outputs["local_points"]
        points = outputs["points"] * factor
        # in place, as published
        poses[..., :3, 3] = poses[..., :3, 3] * metric[:, None, None]
        return {
            "points": points,
            "local_points": local * factor,
            "rays": F.normalize(local, dim=-1),
            "conf": outputs["conf"],
            "camera_poses": poses,
            "metric": metric,
        }
