"""The pipeline on a model of your own: subspace3d finetune --backbone your_own_backbone:YourBackbone, run from here."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subspace3d.backbones.pose import decode_pose
from subspace3d.backbones.protocol import Backbone, Kind, Prediction

PATCH, WIDTH, CORES = 14, 48, r"blocks.+(qkv|proj)"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        y: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + y


class Network(nn.Module):
    """Stands for yours: [B, S, 3, H, W] in -1..1 -> depth; translation, quaternion, field of view of cam-to-world."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.blocks = nn.Sequential(Block(), Block())
        self.depth, self.camera = nn.Linear(WIDTH, PATCH * PATCH), nn.Linear(WIDTH, 9)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        scenes, frames, _, height, width = images.shape
        x = self.embed(images.flatten(0, 1)).flatten(2).transpose(1, 2).reshape(scenes, -1, WIDTH)
        x = self.blocks(x).unflatten(1, (frames, -1))
        depth = F.fold(self.depth(x).flatten(0, 1).mT, (height, width), PATCH, stride=PATCH).exp()
        return depth.view(scenes, frames, height, width), self.camera(x.mean(2)) + x.new_tensor([0] * 6 + [1] * 3)


class YourBackbone(Backbone):
    image_size, patch_size = 112, PATCH
    targets: Mapping[str, str] = {"cores": CORES, "heads": "depth|camera", "all": f"{CORES}|depth|camera"}
    parts: Mapping[str, str] = {"blocks": "blocks", "depth": "depth_head", "camera": "camera_head"}
    frozen, blocks = ("embed",), r"blocks\.\d+"
    lacks: Mapping[Kind, str] = {"confidence": "missing"}

    def network(self) -> nn.Module:
        return Network()

    def __call__(self, model: nn.Module, images: Tensor) -> Prediction:
        depth, camera = model(2 * images - 1)
        to_world, intrinsics = decode_pose(camera, (images.shape[-2], images.shape[-1]))
        turned = to_world[..., :3].mT
        extrinsics = torch.cat((turned, -turned @ to_world[..., 3:]), dim=-1)
        return Prediction(depth, extrinsics=extrinsics, intrinsics=intrinsics)
