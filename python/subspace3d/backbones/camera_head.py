"""The camera head: refines each frame's camera encoding over a few iterations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subspace3d.backbones.config import VGGTConfig
from subspace3d.backbones.layers import Block, Mlp

ENCODING = 9
FIELD_OF_VIEW = slice(7, 9)


class CameraHead(nn.Module):
    """Camera tokens -> camera encodings (see `subspace3d.backbones.pose`), one for each iteration."""

    def __init__(self, config: VGGTConfig) -> None:
        super().__init__()
        dim = 2 * config.embed_dim
        self.iterations = config.camera_iterations
        self.token_norm = nn.LayerNorm(dim)
        self.trunk = nn.Sequential(
            *(Block(dim, config.num_heads, config.mlp_ratio, config.layer_scale) for _ in range(config.camera_depth))
        )
        self.trunk_norm = nn.LayerNorm(dim)
        self.empty_pose_tokens = nn.Parameter(torch.zeros(1, 1, ENCODING))
        self.embed_pose = nn.Linear(ENCODING, dim)
        self.poseLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 3 * dim))
        self.adaln_norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.pose_branch = Mlp(dim, dim // 2, ENCODING)

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """``x = gate * (norm(t) * (1 + scale) + shift) + t``; the branch on ``trunk(x)`` adds to the encoding.

        Shift, scale and gate come from the encoding of the iteration before, through which no gradient flows.

        Args:
            tokens: [B, S, P, 2 * dim] last tokens of the aggregator; the camera token is the first of P.

        Returns:
            one [B, S, 9] for each iteration; the last one is the result.
        """
        camera_tokens = self.token_norm(tokens[:, :, 0])
        normalised = self.adaln_norm(camera_tokens)
        encoding: Tensor | None = None
        results = []
        for _ in range(self.iterations):
            if encoding is None:
                previous = self.empty_pose_tokens.expand(*camera_tokens.shape[:2], -1)
            else:
                previous = encoding.detach()
            shift, scale, gate = self.poseLN_modulation(self.embed_pose(previous)).chunk(3, dim=-1)
            x = self.trunk(gate * (normalised * (1 + scale) + shift) + camera_tokens)
            delta = self.pose_branch(self.trunk_norm(x))
            encoding = delta if encoding is None else encoding + delta
            results.append(_activate(encoding))
        return results


def _activate(encoding: Tensor) -> Tensor:
    """A field of view is never negative; translation and quaternion stay as they are."""
    start = FIELD_OF_VIEW.start
    return torch.cat((encoding[..., :start], F.relu(encoding[..., FIELD_OF_VIEW])), dim=-1)
