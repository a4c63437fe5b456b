"""VGGT: images of a scene -> cameras and depth maps, module names as in the published checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from subspace3d.backbones.aggregator import Aggregator
from subspace3d.backbones.camera_head import CameraHead
from subspace3d.backbones.config import VGGTConfig, named_config
from subspace3d.backbones.dpt_head import DepthHead
from subspace3d.backbones.weights import HUB_FILE, HUB_REPOSITORY, download_from_hub, load_weights

NANO_WEIGHTS = Path(__file__).with_name("vggt_nano.safetensors")


class VGGT(nn.Module):
    """Aggregator, camera head and depth head; parameters start at random."""

    def __init__(self, config: VGGTConfig) -> None:
        super().__init__()
        self.config = config
        self.aggregator = Aggregator(config)
        self.camera_head = CameraHead(config)
        self.depth_head = DepthHead(config)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew: the start of training from scratch."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        # with torch's own gains ten convolutions in a row let a thousandth of the signal through
        for module in self.depth_head.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            elif isinstance(module, nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and module.bias is not None:
                nn.init.zeros_(module.bias)
        encoder = self.aggregator.patch_embed
        nn.init.trunc_normal_(encoder.pos_embed, std=0.02)
        for tokens in (encoder.cls_token, encoder.register_tokens):
            nn.init.normal_(tokens, std=1e-6)
        for tokens in (self.aggregator.camera_token, self.aggregator.register_token):
            nn.init.normal_(tokens, std=1e-6)
        self._start_at_plain_outputs()

    def _start_at_plain_outputs(self) -> None:
        """Every camera starts as the identity with a field of view of 1 rad, every depth at 1, confidence at 2.

        A field of view that started below zero would stay there: its ReLU has no gradient.
        """
        last = self.camera_head.pose_branch.fc2
        nn.init.trunc_normal_(last.weight, std=0.002)
        last.bias[6:] = 1 / self.camera_head.iterations  # quaternion's real part and both angles, added every iteration
        logits = self.depth_head.get_submodule("scratch.output_conv2.2")
        nn.init.trunc_normal_(logits.get_parameter("weight"), std=0.001)
        nn.init.zeros_(logits.get_parameter("bias"))

    def enable_checkpointing(self, enabled: bool = True) -> None:
        """Recompute activations block by block in the backward pass: less memory, about a third more time.

        Independent of training and evaluation mode, so frozen parts may stay in evaluation mode.
        """
        self.aggregator.checkpointing = enabled
        self.aggregator.patch_embed.checkpointing = enabled
        self.depth_head.checkpointing = enabled

    def forward(self, images: Tensor) -> dict[str, Any]:
        """Cameras and depth maps in the frame and scale of the first image's camera.

        Args:
            images: [B, S, 3, H, W] or [S, 3, H, W] float in 0..1; H and W multiples of the patch size.

        Returns:
            pose_enc [B, S, 9] (see `subspace3d.backbones.pose`), pose_enc_list (one [B, S, 9] for each iteration,
            the last is pose_enc), depth [B, S, H, W, 1] z-depth, depth_conf [B, S, H, W] above 1.

        Raises:
            ValueError: wrong shape or type of ``images``.
        """
        images = self._checked(images)
        height, width = images.shape[-2:]
        taps = self.config.depth_taps
        last = self.config.depth - 1
        tokens = self.aggregator(images, frozenset((*taps, last)))
        # The heads regress exponentials and angles: they run in their weights' own precision even under autocast.
        with torch.autocast(images.device.type, enabled=False):
            dtype = self.camera_head.token_norm.weight.dtype
            encodings = self.camera_head(tokens[last].to(dtype))
            dtype = self.depth_head.norm.weight.dtype
            levels = [tokens[tap].to(dtype) for tap in taps]
            depth, confidence = self.depth_head(levels, self.aggregator.patch_start, height, width)
        return {
            "pose_enc": encodings[-1],
            "pose_enc_list": encodings,
            "depth": depth.unsqueeze(-1),
            "depth_conf": confidence,
        }

    def _checked(self, images: Tensor) -> Tensor:
        shape = tuple(images.shape)
        if images.dim() == 4:
            images = images.unsqueeze(0)
        if images.dim() != 5 or images.shape[2] != 3 or 0 in shape:
            raise ValueError(f"images must be [B, S, 3, H, W] or [S, 3, H, W] and not empty, got {shape}")
        if not images.is_floating_point():
            raise ValueError(f"images must be floating point in 0..1, got {images.dtype}")
        patch = self.config.patch_size
        if shape[-2] % patch or shape[-1] % patch:
            raise ValueError(f"height and width of images must be multiples of {patch}, got {shape[-2]} x {shape[-1]}")
        return images


def build_vggt(name: str, weights: str | os.PathLike[str] | None = None) -> VGGT:
    """Build a VGGT and fill in its weights (float32, CPU, training mode).

    Args:
        name: ``vggt-1b`` or ``vggt-nano``.
        weights: a ``.safetensors`` or ``.pt`` file; ``"random"`` for untrained weights; ``"hub"`` to download those of
            vggt-1b from the Hugging Face hub; None for the ones shipped with the package (vggt-nano only).

    Raises:
        ValueError: unknown ``name``, no shipped weights for it, or a file that does not fit.
        FileNotFoundError: the file does not exist.
    """
    config = named_config(name)
    source = None if weights is None else os.fspath(weights)
    if source == "random":
        return VGGT(config)
    if source == "hub":
        path = download_from_hub(name)
    elif source is not None:
        path = Path(source)
    elif name == "vggt-nano":
        path = NANO_WEIGHTS
        if not path.is_file():
            raise FileNotFoundError(f"the weights of vggt-nano are not at {path}: make them with `make pretrain-nano`")
    else:
        raise ValueError(
            f"weights of {name} do not ship with the package: pass the path of {HUB_FILE} or model.pt from "
            f"https://huggingface.co/{HUB_REPOSITORY} (licence: non-commercial), or weights='hub' to download it"
        )
    # Built without storage, so that the model and the file are never both in memory.
    with torch.device("meta"):
        model = VGGT(config)
    load_weights(model, path)
    model.aggregator.set_normalisation(device="cpu")
    return model
