"""A small Pi3: the published inputs, outputs and module names, random weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from standin_layers import Block, ResConvBlock, encoder, patch_grid
from torch import Tensor, nn

DIM, PATCH, REGISTERS = 16, 14, 5


class TransformerDecoder(nn.Module):
    def __init__(self, out_dim: int) -> None:
        super().__init__()
        self.projects = nn.Linear(2 * DIM, DIM)
        self.blocks = nn.ModuleList([Block(DIM)])
        self.linear_out = nn.Linear(DIM, out_dim)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.projects(hidden)
        for block in self.blocks:
            hidden = block(hidden)
        return self.linear_out(hidden)


class LinearPts3d(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj = nn.Linear(DIM, channels * PATCH**2)

    def forward(self, tokens: Tensor, height: int, width: int) -> Tensor:
        features = self.proj(tokens).transpose(1, 2).reshape(len(tokens), -1, height // PATCH, width // PATCH)
        return F.pixel_shuffle(features, PATCH).permute(0, 2, 3, 1)


class CameraHead(nn.Module):
    """Nine numbers made a rotation by the singular value decomposition, and a translation: camera-to-world."""

    def __init__(self) -> None:
        super().__init__()
        self.res_conv = nn.ModuleList([ResConvBlock(DIM), ResConvBlock(DIM)])
        self.more_mlps = nn.Sequential(nn.Linear(DIM, DIM), nn.ReLU(), nn.Linear(DIM, DIM), nn.ReLU())
        self.fc_t, self.fc_rot = nn.Linear(DIM, 3), nn.Linear(DIM, 9)
        with torch.no_grad():
            # the gradient of a singular value decomposition needs distinct values
            self.fc_rot.bias.copy_(torch.diag(torch.tensor([3.0, 2.0, 1.0])).flatten())

    def forward(self, tokens: Tensor) -> Tensor:
        for layer in self.res_conv:
            tokens = layer(tokens)
        features = self.more_mlps(tokens.mean(1))
        u, _, vh = torch.linalg.svd(self.fc_rot(features).reshape(-1, 3, 3))
        signs = torch.stack([torch.ones(len(u)), torch.ones(len(u)), torch.det(u @ vh).detach()], -1)
        pose = torch.zeros(len(u), 4, 4)
        pose[:, :3, :3] = u * signs[:, None] @ vh
        pose[:, :3, 3] = self.fc_t(features)
        pose[:, 3, 3] = 1
        return pose


class Pi3(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = encoder(PATCH, DIM)
        self.position = nn.Linear(2, DIM)
        self.decoder = nn.ModuleList([Block(DIM) for _ in range(4)])
        self.register_token = nn.Parameter(torch.randn(1, 1, REGISTERS, DIM) * 0.02)
        self.point_decoder, self.point_head = TransformerDecoder(DIM), self.make_point_head()
        self.conf_decoder, self.conf_head = TransformerDecoder(DIM), LinearPts3d(1)
        self.camera_decoder, self.camera_head = TransformerDecoder(DIM), CameraHead()
        self.register_buffer("image_mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("image_std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))

    def make_point_head(self) -> nn.Module:
        return LinearPts3d(3)

    def features(self, imgs: Tensor) -> Tensor:
        scenes, views, _, height, width = imgs.shape
        imgs = (imgs - self.image_mean) / self.image_std
        hidden = self.encoder(imgs.flatten(0, 1))
        hidden = hidden + self.position(patch_grid(height, width, PATCH, hidden))
        hidden = torch.cat([self.register_token[0].expand(len(hidden), -1, -1), hidden], 1)
        levels = []
        for index, block in enumerate(self.decoder):
            shape = (scenes * views, -1) if index % 2 == 0 else (scenes, views * hidden.shape[-2])
            hidden = block(hidden.reshape(*shape, DIM) if index % 2 else hidden.reshape(scenes * views, -1, DIM))
            levels.append(hidden.reshape(scenes * views, -1, DIM))
            hidden = levels[-1]
        return torch.cat(levels[-2:], -1)

    def points(self, hidden: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        xyz = self.point_head(self.point_decoder(hidden)[:, REGISTERS:].float(), height, width)
        return xyz[..., :2], torch.exp(xyz[..., 2:])

    def forward(self, imgs: Tensor) -> dict[str, Tensor]:
        scenes, views, _, height, width = imgs.shape
        hidden = self.features(imgs)
        xy, z = self.points(hidden, height, width)
        local = torch.cat([xy * z, z], -1).reshape(scenes, views, height, width, 3)
        conf = self.conf_head(self.conf_decoder(hidden)[:, REGISTERS:].float(), height, width)
        poses = self.camera_head(self.camera_decoder(hidden)[:, REGISTERS:].float()).reshape(scenes, views, 4, 4)
        world = torch.einsum("bnij,bnhwj->bnhwi", poses[..., :3, :3], local) + poses[..., None, None, :3, 3]
        return {
            "points": world,
            "local_points": local,
            "conf": conf.reshape(scenes, views, height, width, 1),
            "camera_poses": poses,
        }
