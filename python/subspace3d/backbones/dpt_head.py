"""The depth head: fuses tokens of four aggregator levels into a depth map and its confidence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from subspace3d.backbones.config import VGGTConfig

HIDDEN_CHANNELS = 32
EMBEDDING_SCALE = 0.1
EMBEDDING_BASE = 100.0


def _axis_embedding(coordinates: Tensor, channels: int) -> Tensor:
    """``[sin(x w_k), cos(x w_k)]`` with ``w_k = 100^(-2 k / channels)``: [n] -> [channels, n] float32."""
    half = channels // 2
    exponents = torch.arange(half, device=coordinates.device, dtype=torch.float32) / half
    angles = EMBEDDING_BASE ** -exponents[:, None] * coordinates
    return torch.cat((angles.sin(), angles.cos()))


def position_map(channels: int, height: int, width: int, aspect: float, device: torch.device) -> Tensor:
    """Sine-cosine embedding of every cell's place in the image, [channels, height, width] float32.

    Cell centres have coordinates (u, v) in the image plane whose half diagonal is 1; the first half of the channels
    embeds u (column), the second half v (row).

    Args:
        channels: a multiple of 4.
        height, width: size of the grid.
        aspect: image width / image height.
    """
    diagonal = (1 + aspect**2) ** 0.5
    half_width, half_height = aspect / diagonal * (width - 1) / width, 1 / diagonal * (height - 1) / height
    u = torch.linspace(-half_width, half_width, width, device=device)
    v = torch.linspace(-half_height, half_height, height, device=device)
    across = _axis_embedding(u, channels // 2)[:, None, :].expand(-1, height, -1)
    down = _axis_embedding(v, channels // 2)[:, :, None].expand(-1, -1, width)
    return torch.cat((across, down))


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


class ResidualConvUnit(nn.Module):
    """``r + conv2(relu(conv1(r)))`` with ``r = relu(x)``.

    The residual is the rectified input, not the input: the published weights were trained with an in-place ReLU.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        rectified = F.relu(x)
        return rectified + self.conv2(F.relu(self.conv1(rectified)))


class FusionBlock(nn.Module):
    """Adds a finer level to what came from the coarser ones and enlarges the sum."""

    def __init__(self, channels: int, coarsest: bool = False) -> None:
        super().__init__()
        self.out_conv = nn.Conv2d(channels, channels, 1)
        if not coarsest:
            self.resConfUnit1 = ResidualConvUnit(channels)
        self.resConfUnit2 = ResidualConvUnit(channels)

    def forward(self, x: Tensor, level: Tensor | None, size: tuple[int, int]) -> Tensor:
        if level is not None:
            x = x + self.resConfUnit1(level)
        return self.out_conv(_resize(self.resConfUnit2(x), size))


class Fusion(nn.Module):
    """The convolutions after the four levels have got their sizes."""

    def __init__(self, level_channels: tuple[int, ...], features: int) -> None:
        super().__init__()
        for number, channels in enumerate(level_channels, start=1):
            self.add_module(f"layer{number}_rn", nn.Conv2d(channels, features, 3, padding=1, bias=False))
        for number in range(1, 5):
            self.add_module(f"refinenet{number}", FusionBlock(features, coarsest=number == 4))
        self.output_conv1 = nn.Conv2d(features, features // 2, 3, padding=1)
        self.output_conv2 = nn.Sequential(
            nn.Conv2d(features // 2, HIDDEN_CHANNELS, 3, padding=1), nn.ReLU(), nn.Conv2d(HIDDEN_CHANNELS, 2, 1)
        )

    def forward(self, levels: list[Tensor]) -> Tensor:
        """Four maps from fine to coarse -> [N, features / 2, 2 h, 2 w] with (h, w) the size of the finest."""
        levels = [self.get_submodule(f"layer{number}_rn")(level) for number, level in enumerate(levels, start=1)]
        x: Tensor = levels[3]
        for number in (4, 3, 2, 1):
            level = None if number == 4 else levels[number - 1]
            if number > 1:
                size = (levels[number - 2].shape[-2], levels[number - 2].shape[-1])
            else:
                size = (2 * x.shape[-2], 2 * x.shape[-1])
            x = self.get_submodule(f"refinenet{number}")(x, level, size)
        return self.output_conv1(x)


class DepthHead(nn.Module):
    """Tokens of four aggregator levels -> ``depth = exp(a)``, ``confidence = 1 + exp(b)`` for every pixel."""

    def __init__(self, config: VGGTConfig) -> None:
        super().__init__()
        dim = 2 * config.embed_dim
        fine, middle, same, coarse = config.depth_channels
        self.patch_size = config.patch_size
        self.frames_chunk_size = config.frames_chunk_size
        self.checkpointing = False
        self.norm = nn.LayerNorm(dim)
        self.projects = nn.ModuleList(nn.Conv2d(dim, channels, 1) for channels in config.depth_channels)
        self.resize_layers = nn.ModuleList(
            (
                nn.ConvTranspose2d(fine, fine, 4, stride=4),
                nn.ConvTranspose2d(middle, middle, 2, stride=2),
                nn.Identity(),
                nn.Conv2d(coarse, coarse, 3, stride=2, padding=1),
            )
        )
        self.scratch = Fusion((fine, middle, same, coarse), config.depth_features)

    def forward(self, levels: list[Tensor], patch_start: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Depth and confidence of every frame; frames do not see each other here.

        Args:
            levels: four of [B, S, P, 2 * dim], from shallow to deep.
            patch_start: number of special tokens before the patches in P.
            height, width: image size in pixels.

        Returns:
            (depth [B, S, height, width], z-depth in scene units; confidence [B, S, height, width], above 1)
        """
        batch, frames = levels[0].shape[:2]
        patches = [level.flatten(0, 1)[:, patch_start:] for level in levels]
        needs_backward = torch.is_grad_enabled() and (
            any(level.requires_grad for level in levels) or any(p.requires_grad for p in self.parameters())
        )
        outputs = []
        for chunk in zip(*(level.split(self.frames_chunk_size) for level in patches)):
            if self.checkpointing and needs_backward:
                outputs.append(checkpoint(self._decode, chunk, height, width, use_reentrant=False))
            else:
                outputs.append(self._decode(chunk, height, width))
        logits = torch.cat(outputs).unflatten(0, (batch, frames))
        return logits[:, :, 0].exp(), 1 + logits[:, :, 1].exp()

    def _decode(self, patches: tuple[Tensor, ...], height: int, width: int) -> Tensor:
        """Four of [N, patches, 2 * dim] -> [N, 2, height, width]."""
        aspect = width / height
        grid = (height // self.patch_size, width // self.patch_size)
        levels = []
        for tokens, project, resize in zip(patches, self.projects, self.resize_layers):
            x = project(self.norm(tokens).transpose(1, 2).unflatten(2, grid))
            levels.append(resize(_add_position(x, aspect)))
        x = _resize(self.scratch(levels), (height, width))
        return self.scratch.output_conv2(_add_position(x, aspect))


def _add_position(x: Tensor, aspect: float) -> Tensor:
    """``x + 0.1 * position_map`` for [N, channels, h, w]."""
    embedding = position_map(x.shape[1], x.shape[2], x.shape[3], aspect, x.device)
    return x + (EMBEDDING_SCALE * embedding).to(x.dtype)
