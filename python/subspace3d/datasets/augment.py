"""Augmentation of the views of one scene: colours, and the mirrored world."""

from __future__ import annotations

import math

import torch

_LUMA = (0.299, 0.587, 0.114)


def jitter_colours(
    images: torch.Tensor,
    generator: torch.Generator,
    strength: float = 0.5,
    hue: float = 0.1,
    probability: float = 0.9,
    same: float = 0.7,
    grey: float = 0.05,
) -> torch.Tensor:
    """x' = b c H S x + b (1 - c) m, clipped to [0, 1]: brightness b, contrast c, saturation S, hue H in one affine map.

    m is the mean luma of the image, S = s I + (1 - s) 1 w^T with the luma weights w, and H a rotation of RGB about the
    grey axis. b, c and s are uniform in [1 - strength, 1 + strength], the angle in [-hue, hue] turns. With probability
    ``grey`` only the luma of the result is kept.

    Args:
        images (Tensor): views of one scene, ``[S, 3, H, W]``, in 0..1.
        generator (Generator): source of the factors.
        strength (float): in [0, 1).
        hue (float): in [0, 0.5].
        probability (float): of a jitter at all.
        same (float): probability that all views share their factors; otherwise every view has its own.
        grey (float): probability of grey images.
    """
    shared, jittered, greyed = torch.rand(3, len(images), generator=generator)
    uniform = 2 * torch.rand(4, len(images), generator=generator) - 1
    if float(shared[0]) < same:
        jittered, greyed, uniform = (value[..., :1].expand_as(value).clone() for value in (jittered, greyed, uniform))
    uniform = torch.where(jittered < probability, uniform, 0.0)
    brightness, contrast, saturation = 1 + strength * uniform[:3]
    luma, ones = torch.tensor(_LUMA), torch.ones(3)
    towards_grey = torch.outer(ones, luma)
    matrix = saturation[:, None, None] * torch.eye(3) + (1 - saturation)[:, None, None] * towards_grey
    matrix = _about_grey(2 * math.pi * hue * uniform[3]) @ matrix
    matrix = torch.where((greyed < grey)[:, None, None], towards_grey @ matrix, matrix)
    mean = torch.einsum("schw,c->s", images, luma) / images[0, 0].numel()
    offset = brightness * (1 - contrast) * mean
    mixed = torch.einsum("sdc,schw->sdhw", (brightness * contrast)[:, None, None] * matrix, images)
    return (mixed + offset[:, None, None, None]).clamp_(0, 1)


def mirror_views(sample: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """[R | t] -> [F R F | F t], F = diag(-1, 1, 1), cx -> W - cx: the same cameras in the mirrored world.

    Args:
        sample (dict): ``images [S, 3, H, W]``, ``depths [S, H, W]``, ``extrinsics [S, 3, 4]``,
            ``intrinsics [S, 3, 3]``.
    """
    flip = torch.tensor([-1.0, 1.0, 1.0])
    extrinsics = flip[:, None] * sample["extrinsics"] * torch.tensor([-1.0, 1.0, 1.0, 1.0])
    intrinsics = sample["intrinsics"].clone()
    intrinsics[:, 0, 2] = sample["images"].shape[-1] - intrinsics[:, 0, 2]
    return {
        **sample,
        "images": sample["images"].flip(-1),
        "depths": sample["depths"].flip(-1),
        "extrinsics": extrinsics,
        "intrinsics": intrinsics,
    }


def _about_grey(angle: torch.Tensor) -> torch.Tensor:
    """Rotations [n, 3, 3] by ``angle`` [n] (radians) about (1, 1, 1)."""
    cross = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    return cos * torch.eye(3) + (1 - cos) / 3 * torch.ones(3, 3) + sin * cross
