"""The image encoder: a vision transformer with registers that turns one image into patch tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subspace3d.backbones.config import VGGTConfig
from subspace3d.backbones.layers import Block, run_block

NORM_EPS = 1e-6


class PatchProjection(nn.Module):
    """Cuts an image into patches and projects each to a token: [N, 3, H, W] -> [N, H/p * W/p, dim]."""

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class ImageEncoder(nn.Module):
    """Vision transformer with a class token, register tokens and a learned position embedding (DINOv2 layout)."""

    def __init__(self, config: VGGTConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.patch_size = config.patch_size
        self.grid = config.image_size // config.patch_size
        self.checkpointing = False
        self.patch_embed = PatchProjection(config.patch_size, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid**2, dim))
        self.register_tokens = nn.Parameter(torch.zeros(1, config.num_registers, dim))
        # Only masked pre-training of the encoder used it; checkpoints hold it.
        self.mask_token = nn.Parameter(torch.zeros(1, dim), requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(dim, config.num_heads, config.mlp_ratio, config.encoder_layer_scale, norm_eps=NORM_EPS)
            for _ in range(config.encoder_depth)
        )
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)

    def position_embedding(self, rows: int, columns: int) -> Tensor:
        """The position embedding for a grid of patches: [1, 1 + rows * columns, dim], class token first."""
        if rows == columns == self.grid:
            return self.pos_embed
        cls_part, patch_part = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        square = patch_part.unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        resized = F.interpolate(square.float(), (rows, columns), mode="bicubic", antialias=True)
        return torch.cat((cls_part, resized.flatten(2).transpose(1, 2).to(cls_part.dtype)), dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """Patch tokens after the last norm.

        Args:
            images: [N, 3, H, W], normalised with the ImageNet mean and standard deviation.

        Returns:
            [N, H/p * W/p, dim]
        """
        rows, columns = images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size
        x = self.patch_embed(images)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)
        x = x + self.position_embedding(rows, columns)
        x = torch.cat((x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]), dim=1)
        for block in self.blocks:
            x = run_block(block, x, checkpointing=self.checkpointing)
        return self.norm(x[:, 1 + self.register_tokens.shape[1] :])
