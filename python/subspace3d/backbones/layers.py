"""Parts shared by the image encoder, the aggregator and the camera head: attention, MLP, pre-norm block, rotation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Rotation = tuple[Tensor, Tensor]


def rotary_table(positions: Tensor, head_dim: int, base: float) -> Rotation:
    """``angle[n, axis, k] = positions[n, axis] * base^(-4 k / head_dim)`` as cosine and sine tables.

    The first half of a head's dimensions turns with the first coordinate, the second half with the second one.
    Within a half, dimension j is paired with dimension j + head_dim / 4.

    Args:
        positions: [N, 2] integer (row, column) of every token.
        head_dim: dimensions of one head, a multiple of 4.
        base: base of the frequencies.

    Returns:
        (cosine, sine), each [N, head_dim] float32.
    """
    quarter = head_dim // 4
    exponents = torch.arange(quarter, device=positions.device, dtype=torch.float32) / quarter
    angles = positions.float()[:, :, None] * base**-exponents
    angles = angles[:, :, None, :].expand(-1, -1, 2, -1).flatten(1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn the paired dimensions of ``x`` [..., N, head_dim] by the angles of `rotary_table`."""
    cosine, sine = rotation
    first, second = x.unflatten(-1, (2, 2, -1)).unbind(-2)
    turned = torch.stack((-second, first), dim=-2).flatten(-3)
    return x * cosine + turned * sine


class Attention(nn.Module):
    """Multi-head self-attention, optionally with normalised and rotated queries and keys."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_dim) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rotation: Rotation | None = None) -> Tensor:
        """x [B, N, dim] -> [B, N, dim]."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        # norm and rotation give float32 under autocast; attention runs in the type of the projections
        y = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
        return self.proj(y.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """``fc2(gelu(fc1(x)))``"""

    def __init__(self, dim: int, hidden: int, out: int | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim if out is None else out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """``gamma * x``, one factor per channel."""

    def __init__(self, dim: int, value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """``x += ls1(attn(norm1(x))); x += ls2(mlp(norm2(x)))``"""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: int,
        layer_scale: float,
        qk_norm: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads, qk_norm)
        self.ls1 = LayerScale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, mlp_ratio * dim)
        self.ls2 = LayerScale(dim, layer_scale)

    def forward(self, x: Tensor, rotation: Rotation | None = None) -> Tensor:
        """x [B, N, dim] -> [B, N, dim]."""
        x = x + self.ls1(self.attn(self.norm1(x), rotation))
        return x + self.ls2(self.mlp(self.norm2(x)))


def run_block(block: nn.Module, x: Tensor, rotation: Rotation | None = None, checkpointing: bool = False) -> Tensor:
    """``block(x, rotation)``, recomputed in the backward pass if ``checkpointing`` and a gradient will be asked for.

    Whether the block is in training or evaluation mode plays no part: a frozen block in evaluation mode that holds
    adapters, or whose input needs a gradient, keeps its activations just like any other.
    """
    needs_backward = torch.is_grad_enabled() and (
        x.requires_grad or any(parameter.requires_grad for parameter in block.parameters())
    )
    if checkpointing and needs_backward:
        return checkpoint(block, x, rotation, use_reentrant=False)
    return block(x, rotation)
