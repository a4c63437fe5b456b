"""Layers that the small stand-ins of other packages share, under the module names those packages have."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.w12, self.w3 = nn.Linear(dim, 4 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, qkv: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = qkv(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        # as VGGT-Omega does, the width is read from the layer
        width = self.qkv.in_features
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int = 2, qkv: type[nn.Linear] = nn.Linear, mlp: type[nn.Module] = Mlp) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), Attention(dim, heads, qkv)
        self.norm2, self.mlp = nn.LayerNorm(dim), mlp(dim)

    def forward(self, x: Tensor, xpos: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ResConvBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.res_conv1, self.res_conv2, self.res_conv3 = (nn.Linear(dim, dim) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.res_conv3(F.relu(self.res_conv2(F.relu(self.res_conv1(x))))))


def encoder(patch: int, dim: int) -> nn.Module:
    """``[N, 3, H, W]`` -> ``[N, patches, dim]``."""
    return nn.Sequential(nn.Conv2d(3, dim, patch, patch), nn.Flatten(2), Transposed())


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def patch_grid(height: int, width: int, patch: int, reference: Tensor) -> Tensor:
    """Centre of every patch in -1..1, ``[patches, 2]``."""
    y, x = (torch.linspace(-1, 1, size // patch).to(reference) for size in (height, width))
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(-1, 2)
