"""A small VGGT-Omega: the published inputs, outputs, module names and masked qkv, random weights."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from standin_layers import Block, encoder, patch_grid
from torch import Tensor, nn

DIM, PATCH, SPECIAL, DEPTH = 16, 16, 3, 2


class LinearKMaskedBias(nn.Linear):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.register_buffer("bias_mask", torch.full_like(self.bias, math.nan))

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias * self.bias_mask.to(self.bias.dtype))


class Aggregator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = encoder(PATCH, DIM)
        self.position = nn.Linear(2, DIM)
        self.frame_blocks = nn.ModuleList([Block(DIM, qkv=LinearKMaskedBias) for _ in range(DEPTH)])
        self.inter_frame_blocks = nn.ModuleList([Block(DIM, qkv=LinearKMaskedBias) for _ in range(DEPTH)])
        self.camera_token = nn.Parameter(torch.randn(1, 2, 1, DIM) * 0.1)
        self.register_token = nn.Parameter(torch.randn(1, 2, SPECIAL - 1, DIM) * 0.1)

    def forward(self, images: Tensor) -> Tensor:
        scenes, frames, _, height, width = images.shape
        tokens = self.patch_embed(images.flatten(0, 1))
        tokens = tokens + self.position(patch_grid(height, width, PATCH, tokens))
        special = torch.cat([self.camera_token, self.register_token], 2)
        special = torch.cat([special[:, :1], special[:, 1:].expand(-1, frames - 1, -1, -1)], 1)
        special = special.expand(scenes, -1, -1, -1).flatten(0, 1)
        tokens = torch.cat([special, tokens], 1)
        count = tokens.shape[1]
        for frame, every in zip(self.frame_blocks, self.inter_frame_blocks):
            within = frame(tokens.reshape(scenes * frames, count, DIM))
            tokens = every(within.reshape(scenes, frames * count, DIM))
        tokens = tokens.reshape(scenes, frames, count, DIM)
        return torch.cat([within.reshape(tokens.shape), tokens], -1)


class CameraHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.ModuleList([Block(2 * DIM, qkv=LinearKMaskedBias)])
        self.camera_branch = nn.Sequential(nn.Linear(2 * DIM, DIM), nn.GELU(), nn.Linear(DIM, 9))
        with torch.no_grad():
            self.camera_branch[2].bias[6:] = 1.0

    def forward(self, tokens: Tensor) -> Tensor:
        scenes, frames = tokens.shape[:2]
        x = tokens[:, :, :SPECIAL].reshape(scenes, frames * SPECIAL, -1)
        for block in self.trunk:
            x = block(x)
        raw = self.camera_branch(x.reshape(scenes, frames, SPECIAL, -1)[:, :, 0])
        return torch.cat([raw[..., :7], F.relu(raw[..., 7:]) + 0.01], -1)


class ResidualConvUnit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(DIM, DIM, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class Fusion(nn.Module):
    def __init__(self, has_residual: bool) -> None:
        super().__init__()
        self.out_conv = nn.Conv2d(DIM, DIM, 1)
        if has_residual:
            self.resConfUnit1 = ResidualConvUnit()
        self.resConfUnit2 = ResidualConvUnit()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is not None:
            x = x + self.resConfUnit1(residual)
        return self.out_conv(self.resConfUnit2(x))


class DenseHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.projects = nn.ModuleList([nn.Conv2d(2 * DIM, DIM, 1) for _ in range(4)])
        self.resize_layers = nn.ModuleList([
            nn.ConvTranspose2d(DIM, DIM, 1), nn.ConvTranspose2d(DIM, DIM, 1), nn.Identity(),
            nn.Conv2d(DIM, DIM, 3, padding=1),
        ])  # fmt: skip
        self.scratch = nn.Module()
        for level in range(1, 5):
            self.scratch.add_module(f"layer{level}_rn", nn.Conv2d(DIM, DIM, 3, padding=1, bias=False))
            self.scratch.add_module(f"refinenet{level}", Fusion(level < 4))
        self.proj, self.proj_conf = (nn.Conv2d(DIM, PATCH**2, 1) for _ in range(2))

    def forward(self, tokens: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        scenes, frames = tokens.shape[:2]
        x = tokens[:, :, SPECIAL:].flatten(0, 1).transpose(1, 2)
        x = x.reshape(scenes * frames, 2 * DIM, height // PATCH, width // PATCH)
        fused = None
        for level in range(4, 0, -1):
            y = self.resize_layers[level - 1](self.projects[level - 1](x))
            y = self.scratch.get_submodule(f"layer{level}_rn")(y)
            refine = self.scratch.get_submodule(f"refinenet{level}")
            fused = refine(y) if fused is None else refine(fused, y)
        depth, conf = (F.pixel_shuffle(head(fused), PATCH) for head in (self.proj, self.proj_conf))
        depth = torch.exp(depth).permute(0, 2, 3, 1).reshape(scenes, frames, height, width, 1)
        return depth, 1 + torch.exp(conf).reshape(scenes, frames, height, width)


class VGGTOmega(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.aggregator, self.camera_head, self.dense_head = Aggregator(), CameraHead(), DenseHead()
        self.text_alignment_head = None

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        if images.dim() == 4:
            images = images.unsqueeze(0)
        tokens = self.aggregator(images)
        # as published, on a GPU alone
        with torch.autocast("cuda", enabled=False):
            depth, conf = self.dense_head(tokens, *images.shape[-2:])
            pose = self.camera_head(tokens)
        outputs = {
            "camera_and_register_tokens": tokens[:, :, :SPECIAL],
            "pose_enc": pose,
            "depth": depth,
            "depth_conf": conf,
        }
        return outputs if self.training else {**outputs, "images": images}
