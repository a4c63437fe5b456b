"""Training a VGGT from random weights on few images: a start that can match, and losses that teach matching.

From scratch, camera and depth losses alone leave the cameras where they start for tens of thousands of images: seven
numbers a frame say little about which patches of two images show the same thing. So the pre-training of vggt-nano also
asks every patch for its points in the first camera's frame (DUSt3R, CVPR 2024), and some heads of the global attention
to look where the true depth and cameras say the patch is in the other images. Both help only while they train: the
extra layers are dropped, and an exported model has none of them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subspace3d.backbones.layers import Attention, Rotation, rotate
from subspace3d.backbones.losses import LossCounts, camera_loss, multitask_loss
from subspace3d.backbones.vggt import VGGT
from subspace3d.geometry import unproject

POINTS_PER_SIDE = 2  # of a patch
MATCH_WEIGHT = 0.3
SAME_SURFACE = 0.05  # relative difference of depths up to which a point counts as seen in another image
_TOKEN_SCALE = 0.5
_POSITION_SCALE = 0.5
_KEY_LIKE_QUERY = 0.9


@torch.no_grad()
def start_able_to_match(model: VGGT) -> None:
    """Initial values that let attention compare patches and tell where they are, instead of having to learn both.

    Keys of the aggregator start correlated with queries, so that alike tokens attend to each other (Trockman & Kolter,
    Mimetic initialization, ICML 2023); position embeddings start as sines and cosines of a size comparable to the
    content; special tokens start large enough to tell the first frame from the others.
    """
    aggregator, encoder = model.aggregator, model.aggregator.patch_embed
    for tokens in (
        aggregator.camera_token,
        aggregator.register_token,
        encoder.cls_token,
        encoder.register_tokens,
    ):
        nn.init.normal_(tokens, std=_TOKEN_SCALE)
    side, dim = model.config.image_size // model.config.patch_size, model.config.embed_dim
    grid = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()
    frequencies = 1.5 * 30 ** -(torch.arange(dim // 4) / (dim // 4))
    angles = grid[:, :, None] * frequencies
    encoder.pos_embed.zero_()
    encoder.pos_embed[0, 1:] = _POSITION_SCALE * torch.cat((angles.sin(), angles.cos()), dim=-1).flatten(1)
    for block in (*aggregator.frame_blocks, *aggregator.global_blocks):
        query, key, _ = block.get_submodule("attn.qkv").get_parameter("weight").chunk(3)
        key.copy_(_KEY_LIKE_QUERY * query + (1 - _KEY_LIKE_QUERY**2) ** 0.5 * key)


class Pretraining(nn.Module):
    """A VGGT with what its auxiliary losses look at: points of every patch, and attention across frames.

    Args:
        model (VGGT): trained in place.
        blocks (tuple[int, ...]): global blocks whose first head is taught to match.
    """

    def __init__(self, model: VGGT, blocks: tuple[int, ...] = (1, 2, 3)) -> None:
        super().__init__()
        self.model, self.blocks = model, blocks
        dim = 2 * model.config.embed_dim
        last = nn.Linear(dim, 3 * POINTS_PER_SIDE**2)
        nn.init.normal_(last.weight, std=0.01)
        self.points = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), last)
        self._seen: dict[int, tuple] = {}
        self.run_depth_head(True)
        for index in blocks:
            self._attention(index).register_forward_pre_hook(partial(self._see, index))
        model.camera_head.register_forward_pre_hook(partial(self._see, -1))

    def run_depth_head(self, enabled: bool) -> None:
        """Train with the depth head, as at first, or without it, at half the cost of a step."""
        self.depth = enabled
        self.model.depth_head.requires_grad_(enabled)

    def _attention(self, index: int) -> Attention:
        attention = self.model.aggregator.global_blocks[index].get_submodule("attn")
        assert isinstance(attention, Attention)
        return attention

    def _see(self, key: int, module: nn.Module, inputs: tuple) -> None:
        self._seen[key] = inputs

    def forward(self, images: Tensor) -> dict[str, Any]:
        """What the model predicts, ``patch_points`` [B, S, rows, columns, 3] and ``match_logits``.

        ``match_logits`` has [B, S, S, P, P] for each of ``blocks``; element [b, i, j, p, q] says how much patch p of
        frame i looks at patch q of frame j.
        """
        self._seen.clear()
        if self.depth:
            predictions = self.model(images)
        else:
            last = self.model.config.depth - 1
            tokens = self.model.aggregator(images, frozenset((last,)))[last]
            predictions = {"pose_enc_list": self.model.camera_head(tokens)}
        patch = self.model.config.patch_size
        rows, columns = images.shape[-2] // patch, images.shape[-1] // patch
        patches = self._seen[-1][0][:, :, self.model.aggregator.patch_start :]
        side = POINTS_PER_SIDE
        points = self.points(patches).unflatten(-1, (side, side, 3)).unflatten(2, (rows, columns))
        points = points.transpose(3, 4).flatten(4, 5).flatten(2, 3)
        logits = [self._match_logits(index, images.shape[1]) for index in self.blocks]
        return {**predictions, "patch_points": points, "match_logits": logits}

    def _match_logits(self, index: int, frames: int) -> Tensor:
        """``q k^T / sqrt(d)`` of the first head between the patches of all frames, as the block itself computes it."""
        tokens, rotation = self._seen[index]
        attention = self._attention(index)
        weight, bias = attention.qkv.weight, attention.qkv.bias
        dim = weight.shape[1]
        size = dim // attention.num_heads
        query = _heads(tokens, weight[:size], bias[:size], attention.q_norm, rotation)
        key = _heads(tokens, weight[dim : dim + size], bias[dim : dim + size], attention.k_norm, rotation)
        start = self.model.aggregator.patch_start
        query, key = (x.unflatten(1, (frames, -1))[:, :, start:] for x in (query, key))
        return torch.einsum("bipd,bjqd->bijpq", query, key) / size**0.5

    def objective(self, predictions: dict, batch: dict, camera_weight: float, counts: LossCounts) -> dict[str, Tensor]:
        """``multitask + points + 0.3 match``; without the depth head ``camera_weight camera`` in place of the first.

        Takes the place of `multitask_loss`: of a part of a step, the additions are the part's means times its share of
        the step's images, all of which have cameras.
        """
        if self.depth:
            terms = multitask_loss(predictions, batch, camera_weight, counts)
        else:
            terms = camera_loss(predictions["pose_enc_list"], batch, counts=counts)
            terms["loss"] = camera_weight * terms["camera"]
        world_points = unproject(batch["depths"], batch["extrinsics"], batch["intrinsics"])
        points = points_loss(predictions["patch_points"], world_points, batch["point_masks"])
        target, visible = match_targets(batch, world_points, self.model.config.patch_size)
        match = torch.stack([matching_loss(logits, target, visible) for logits in predictions["match_logits"]]).mean()
        share = batch["images"].shape[:2].numel() / counts.cameras
        points, match = share * points, share * match
        loss = terms["loss"] + points + MATCH_WEIGHT * match
        return {**terms, "loss": loss, "points": points.detach(), "match": match.detach()}


def points_loss(points: Tensor, world_points: Tensor, mask: Tensor) -> Tensor:
    """Mean distance ``||X - X*||`` over the valid ones of regularly spaced pixels.

    Args:
        points (Tensor): predicted at the middles of rows x columns equal parts of the image,
            ``[B, S, rows, columns, 3]``.
        world_points (Tensor): true points of all pixels in the first camera's frame, ``[B, S, H, W, 3]``.
        mask (Tensor): valid pixels, ``[B, S, H, W]``, bool.
    """
    rows, columns = (
        ((torch.arange(parts, device=mask.device) + 0.5) * pixels / parts).long()
        for parts, pixels in zip(points.shape[2:4], mask.shape[2:])
    )
    target, valid = (x[:, :, rows[:, None], columns] for x in (world_points, mask))
    return ((points - target).norm(dim=-1) * valid).sum() / valid.sum().clamp(min=1)


def match_targets(batch: dict, world_points: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """Where the middles of the patches of frame i are in frame j, as bilinear weights over the patches of frame j.

    Args:
        batch (dict): ``depths [B, S, H, W]``, ``point_masks`` alike, ``extrinsics [B, S, 3, 4]``, ``intrinsics
            [B, S, 3, 3]``.
        world_points (Tensor): ``[B, S, H, W, 3]`` in the frame of ``extrinsics``.
        patch (int): side of a patch in pixels.

    Returns:
        (weights ``[N, P]`` that add up to 1 over the last axis, one row for each of the N true elements of visible,
        visible ``[B, S, S, P]`` bool). A patch is visible in another frame if its middle has a depth, falls into that
        frame's image, and the depth there is the same within 5 %; never in its own.
    """
    depths, mask, extrinsics = batch["depths"], batch["point_masks"], batch["extrinsics"]
    scenes, frames, height, width = depths.shape
    middle = slice(patch // 2, None, patch)
    points = world_points[:, :, middle, middle].flatten(2, 3)
    valid = mask[:, :, middle, middle].flatten(2, 3)
    camera = torch.einsum("bjxy,bipy->bijpx", extrinsics[..., :3], points) + extrinsics[:, None, :, None, :, 3]
    projected = torch.einsum("bjxy,bijpy->bijpx", batch["intrinsics"], camera)
    z = camera[..., 2]
    position = projected[..., :2] / z.clamp(min=1e-6)[..., None]
    size = position.new_tensor((width, height))
    inside = (z > 0) & ((position >= 0) & (position < size)).all(-1)
    pixel = torch.where(inside[..., None], position, 0.0).long()
    there = depths[:, None].expand(scenes, frames, frames, height, width).flatten(3)
    there = there.gather(3, pixel[..., 1] * width + pixel[..., 0])
    visible = inside & valid[:, :, None] & ((there - z).abs() < SAME_SURFACE * z)
    visible &= ~torch.eye(frames, dtype=torch.bool, device=z.device)[:, :, None]

    place = position[visible] / patch - 0.5
    across, down = (_between(place[:, axis], pixels // patch) for axis, pixels in enumerate((width, height)))
    return (down[:, :, None] * across[:, None, :]).flatten(1), visible


def _between(place: Tensor, patches: int) -> Tensor:
    """Linear weights [N, patches] of the two patches that each place [N], in patches, lies between."""
    numbers = torch.arange(patches, device=place.device)
    return (1 - (place.clamp(0, patches - 1)[:, None] - numbers).abs()).clamp(min=0)


def matching_loss(logits: Tensor, target: Tensor, visible: Tensor) -> Tensor:
    """Mean cross-entropy ``-sum_q target_q log softmax(logits)_q`` over the visible patches; see `match_targets`."""
    entropy = -(target * logits[visible].float().log_softmax(-1)).sum()
    return entropy / visible.sum().clamp(min=1)


def _heads(tokens: Tensor, weight: Tensor, bias: Tensor, norm: nn.Module, rotation: Rotation) -> Tensor:
    return rotate(norm(F.linear(tokens, weight, bias)), rotation)
