"""The aggregator: alternates attention within each frame and attention over all frames of a scene."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from subspace3d.backbones.config import VGGTConfig
from subspace3d.backbones.layers import Block, rotary_table, run_block
from subspace3d.backbones.patch_embed import ImageEncoder

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


class Aggregator(nn.Module):
    """Images of a scene -> tokens of every frame: one camera token, the register tokens, then the patches."""

    image_mean: Tensor
    image_std: Tensor

    def __init__(self, config: VGGTConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.patch_size = config.patch_size
        self.head_dim = dim // config.num_heads
        self.rope_base = config.rope_base
        self.patch_start = 1 + config.num_registers
        self.checkpointing = False
        self.patch_embed = ImageEncoder(config)
        # Index 0 of the second axis serves the first frame, whose camera defines the world; index 1 all others.
        self.camera_token = nn.Parameter(torch.zeros(1, 2, 1, dim))
        self.register_token = nn.Parameter(torch.zeros(1, 2, config.num_registers, dim))
        self.frame_blocks, self.global_blocks = (
            nn.ModuleList(
                Block(dim, config.num_heads, config.mlp_ratio, config.layer_scale, qk_norm=True)
                for _ in range(config.depth)
            )
            for _ in range(2)
        )
        self.set_normalisation()

    def set_normalisation(self, device: torch.device | str | None = None) -> None:
        """(Re-)create the buffers with the colour statistics; no state dict holds them."""
        for name, values in (("image_mean", IMAGE_MEAN), ("image_std", IMAGE_STD)):
            self.register_buffer(name, torch.tensor(values, device=device).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor, keep: frozenset[int]) -> dict[int, Tensor]:
        """Tokens after the block pairs in ``keep``; other intermediate results are freed at once.

        Args:
            images: [B, S, 3, H, W] in 0..1.
            keep: indices of block pairs.

        Returns:
            for each index in ``keep`` [B, S, P, 2 * dim]: the frame block's output, then the global block's output.
        """
        batch, frames = images.shape[:2]
        tokens = self._embed(images)
        count, dim = tokens.shape[-2:]
        frame_rotation = self._rotation(images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size)
        global_rotation = (frame_rotation[0].repeat(frames, 1), frame_rotation[1].repeat(frames, 1))

        kept: dict[int, Tensor] = {}
        for index, (frame_block, global_block) in enumerate(zip(self.frame_blocks, self.global_blocks)):
            tokens = tokens.reshape(batch * frames, count, dim)
            within = run_block(frame_block, tokens, frame_rotation, self.checkpointing)
            across = within.reshape(batch, frames * count, dim)
            tokens = run_block(global_block, across, global_rotation, self.checkpointing)
            if index in keep:
                shape = (batch, frames, count, dim)
                kept[index] = torch.cat((within.reshape(shape), tokens.reshape(shape)), dim=-1)
        return kept

    def _embed(self, images: Tensor) -> Tensor:
        """Special tokens and patch tokens of every frame, [B, S, P, dim]."""
        batch, frames = images.shape[:2]
        normalised = ((images - self.image_mean) / self.image_std).flatten(0, 1)
        frozen = not (images.requires_grad or any(p.requires_grad for p in self.patch_embed.parameters()))
        with torch.no_grad() if frozen else contextlib.nullcontext():
            patches = self.patch_embed(normalised)
        special = torch.cat((self.camera_token, self.register_token), dim=2)
        first, others = special[:, :1], special[:, 1:].expand(-1, frames - 1, -1, -1)
        special = torch.cat((first, others), dim=1).expand(batch, -1, -1, -1)
        return torch.cat((special, patches.unflatten(0, (batch, frames))), dim=2)

    def _rotation(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Rotation tables of one frame's tokens: special tokens at (0, 0), patches from (1, 1) on."""
        device = self.camera_token.device
        grid = torch.cartesian_prod(
            torch.arange(1, rows + 1, device=device), torch.arange(1, columns + 1, device=device)
        )
        special = grid.new_zeros(self.patch_start, 2)
        return rotary_table(torch.cat((special, grid)), self.head_dim, self.rope_base)
