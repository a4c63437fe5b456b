"""Losses of cameras and depth maps.

Every mean is written as a sum over scenes divided by a count that is known before the forward pass (`LossCounts`). So
the loss of a step is the sum of the losses of its parts, however its scenes are divided over forward passes and
processes, and so are its gradients.

Values that are not finite are passed on, not replaced: the loop skips such a step and counts it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from subspace3d.backbones.pose import encode_pose
from subspace3d.backbones.prediction import Prediction

CAMERA_WEIGHT = 5.0
DEPTH_WEIGHT = 1.0
_LARGEST_ERROR = 100.0
_LEAST_POINTS = 100
_LEAST_FILTERED = 1000
_GRADIENT_SCALES = 4


@dataclass(frozen=True)
class LossCounts:
    """What the means of the losses divide by, counted over all scenes of a step.

    Attributes:
        cameras: frames whose rotation and field of view count.
        translations: frames whose translation counts.
        pixels: valid pixels.
        pixels_at_scale: valid pixels in every 2^k-th row and column, k = 0..3.
    """

    cameras: int
    translations: int
    pixels: int
    pixels_at_scale: tuple[int, ...]

    @classmethod
    def of(cls, batch: dict) -> LossCounts:
        """Count in ``point_masks [B, S, H, W]`` bool; see `camera_loss` for what else is looked at."""
        masks = batch["point_masks"]
        scales = (masks[..., :: 2**scale, :: 2**scale] for scale in range(_GRADIENT_SCALES))
        posed, scaled = counted_scenes(batch)
        return cls(
            cameras=int(posed.sum()) * masks.shape[1],
            translations=int(scaled.sum()) * masks.shape[1],
            pixels=int(masks.sum()),
            pixels_at_scale=tuple(int(part.sum()) for part in scales),
        )


def camera_loss(
    pose_enc_list: list[torch.Tensor], batch: dict, gamma: float = 0.6, counts: LossCounts | None = None
) -> dict[str, torch.Tensor]:
    """1/n sum_i gamma^(n-1-i) (mean |T_i - T*| + mean |q_i - q*| + 0.5 mean |fov_i - fov*|) over the n stages.

    |T_i - T*| is clamped at 100. A scene counts only if its first frame has more than 100 valid points, because the
    first camera sets the scene's frame and scale; with no such scene the loss is zero. A scene that has no depth at all
    has no scale but known rotations: it counts in q and fov. Where only rotations are known T does not count.

    Args:
        pose_enc_list (list[Tensor]): encoding after every refinement stage, each ``[B, S, 9]``: translation (3) and
            xyzw quaternion (4) of camera-from-world, vertical and horizontal field of view in radians.
        batch (dict): normalised; ``extrinsics [B, S, 3, 4]``, ``intrinsics [B, S, 3, 3]``,
            ``point_masks [B, S, H, W]`` bool; optionally ``has_depth [B]`` and ``translation_known [B]`` bool, true
            when missing.
        gamma (float): weight of a stage relative to the next.
        counts (LossCounts | None): of the whole step when ``batch`` is a part of it; none: of ``batch``.

    Returns:
        dict: scalars ``camera`` and, of the last stage alone, ``translation``, ``rotation``, ``fov`` (detached).
    """
    masks = batch["point_masks"]
    counts = LossCounts.of(batch) if counts is None else counts
    target = encode_pose(batch["extrinsics"], batch["intrinsics"], (masks.shape[-2], masks.shape[-1]))
    posed, scaled = counted_scenes(batch)
    total = target.new_zeros(())
    terms: dict[str, torch.Tensor] = {}
    stages = len(pose_enc_list)
    for stage, encoding in enumerate(pose_enc_list):
        error = (encoding.float() - target).abs()
        # a sum over no scene is zero and keeps the graph
        translation = error[scaled][..., :3].clamp(max=_LARGEST_ERROR).mean(-1).sum() / max(1, counts.translations)
        rotation = error[posed][..., 3:7].mean(-1).sum() / max(1, counts.cameras)
        fov = error[posed][..., 7:].mean(-1).sum() / max(1, counts.cameras)
        total = total + gamma ** (stages - 1 - stage) * (translation + rotation + 0.5 * fov)
        terms = {"translation": translation.detach(), "rotation": rotation.detach(), "fov": fov.detach()}
    return {"camera": total / stages, **terms}


def depth_loss(
    depth: torch.Tensor,
    confidence: torch.Tensor | None,
    batch: dict,
    gamma: float = 1.0,
    alpha: float = 0.2,
    counts: LossCounts | None = None,
) -> dict[str, torch.Tensor]:
    """sum_b n_b/n (mean e + mean (gamma e c - alpha log c)) + gradient loss,  e = |d - d*| over valid pixels.

    The means run over the n_b valid pixels of scene b; n is the sum of the n_b. From each of the two means the values
    at or above their own 98 % quantile within the scene are left out (see `drop_outliers`). With fewer than 100 valid
    pixels in the step the loss is zero. The confidence term makes the total negative when the errors are small; that
    is no fault.

    Args:
        depth (Tensor): predicted z-depth in normalised units, ``[B, S, H, W, 1]``.
        confidence (Tensor | None): ``c``, positive, ``[B, S, H, W]``; none: the terms with it are left out.
        batch (dict): normalised; ``depths [B, S, H, W]``, ``point_masks [B, S, H, W]`` bool.
        gamma (float): weight of the confidence-weighted error.
        alpha (float): reward for confidence.
        counts (LossCounts | None): of the whole step when ``batch`` is a part of it; none: of ``batch``.

    Returns:
        dict: scalars ``depth`` and, detached, ``depth_error``, ``depth_confidence``, ``depth_gradient``.
    """
    target, mask = batch["depths"], batch["point_masks"]
    counts = LossCounts.of(batch) if counts is None else counts
    predicted = depth.squeeze(-1).float()
    # the sums keep both outputs in the graph, so that every process has the same gradients to exchange
    regression = weighted = predicted[:0].sum() * 0.0
    if confidence is not None:
        confidence = confidence.float().clamp(min=1e-6)
        regression = weighted = (predicted[:0].sum() + confidence[:0].sum()) * 0.0
    if counts.pixels < _LEAST_POINTS:
        zero = regression.detach()
        return {"depth": regression, "depth_error": zero, "depth_confidence": zero, "depth_gradient": zero}
    for scene in range(len(mask)):
        valid = mask[scene]
        share = int(valid.sum()) / counts.pixels
        if not share:
            continue
        # masked_select keeps the mask for the backward pass; indexing would keep three int64 per pixel
        error = (torch.masked_select(predicted[scene], valid) - target[scene][valid]).abs()
        regression = regression + share * drop_outliers(error).mean()
        if confidence is not None:
            c = torch.masked_select(confidence[scene], valid)
            weighted = weighted + share * drop_outliers(gamma * error * c - alpha * c.log()).mean()
    gradient = gradient_loss(predicted.flatten(0, 1), target.flatten(0, 1), mask.flatten(0, 1), counts.pixels_at_scale)
    return {
        "depth": regression + weighted + gradient,
        "depth_error": regression.detach(),
        "depth_confidence": weighted.detach(),
        "depth_gradient": gradient.detach(),
    }


def gradient_loss(
    predicted: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, pixels_at_scale: tuple[int, ...] | None = None
) -> torch.Tensor:
    """1/4 sum_k (sum |dx r_k| + sum |dy r_k|) / count_k,  r = d - d*, r_k every 2^k-th row and column of it, k = 0..3.

    A difference counts where both of its pixels are valid and is clamped at 100; count_k is the number of valid
    pixels at that scale.

    Args:
        predicted (Tensor): depth maps, ``[M, H, W]``, float32.
        target (Tensor): true depth maps, ``[M, H, W]``, float32.
        mask (Tensor): valid pixels, ``[M, H, W]``, bool.
        pixels_at_scale (tuple[int, ...] | None): count_k of the whole step; none: of ``mask``.
    """
    # zero outside the mask first: a NaN there would survive a multiplication by the mask
    residual = torch.where(mask, predicted - target, 0.0)
    total = residual.new_zeros(())
    for scale in range(_GRADIENT_SCALES):
        step = 2**scale
        part, valid = residual[:, ::step, ::step], mask[:, ::step, ::step]
        across = (part[:, :, 1:] - part[:, :, :-1]).abs().clamp(max=_LARGEST_ERROR)
        down = (part[:, 1:] - part[:, :-1]).abs().clamp(max=_LARGEST_ERROR)
        summed = (across * (valid[:, :, 1:] & valid[:, :, :-1])).sum() + (down * (valid[:, 1:] & valid[:, :-1])).sum()
        count = int(valid.sum()) if pixels_at_scale is None else pixels_at_scale[scale]
        total = total + summed / max(1, count)
    return total / _GRADIENT_SCALES


def drop_outliers(values: torch.Tensor, valid_range: float = 0.98) -> torch.Tensor:
    """Values below their ``valid_range`` quantile, after a clamp at 100.

    The quantile is an element of ``values`` (nearest rank). Values are returned unfiltered when there are 1000 or
    fewer of them, or when 1000 or fewer would be left (many equal values).

    Args:
        values (Tensor): ``[n]``, floating.
        valid_range (float): in (0, 1].
    """
    if values.numel() <= _LEAST_FILTERED:
        return values
    values = values.clamp(max=_LARGEST_ERROR)
    rank = round(valid_range * (values.numel() - 1)) + 1
    kept = values < values.detach().kthvalue(rank).values
    return torch.masked_select(values, kept) if int(kept.sum()) > _LEAST_FILTERED else values


def multitask_loss(
    predictions: Prediction | Mapping,
    batch: dict,
    camera_weight: float = CAMERA_WEIGHT,
    counts: LossCounts | None = None,
) -> dict[str, torch.Tensor]:
    """camera_weight camera + depth, each where it is predicted.

    Of poses without intrinsics, and of intrinsics without poses, what is not predicted has no error.

    Args:
        predictions (Prediction | Mapping): of the backbone; or what a VGGT returned: ``pose_enc_list``,
            ``depth [B, S, H, W, 1]``, ``depth_conf [B, S, H, W]``.
        batch (dict): normalised by `subspace3d.training.normalization.normalize_scenes`.
        camera_weight (float): weight of the camera loss.
        counts (LossCounts | None): of the whole step when ``batch`` is a part of it; none: of ``batch``. With the
            step's counts the losses of the parts of a step add up to the loss of the step.

    Returns:
        dict: scalar ``loss`` with its graph, and every term for the log.

    Raises:
        ValueError: nothing of cameras and depth is predicted.
    """
    if not isinstance(predictions, Prediction):
        predictions = Prediction.from_vggt(predictions)
    stages = predictions.stages or _encoded(predictions, batch)
    terms: dict[str, torch.Tensor] = {}
    weighted = []
    if stages:
        terms |= camera_loss(list(stages), batch, counts=counts)
        weighted.append(camera_weight * terms["camera"])
    if predictions.depth is not None:
        terms |= depth_loss(predictions.depth.unsqueeze(-1), predictions.confidence, batch, counts=counts)
        weighted.append(DEPTH_WEIGHT * terms["depth"])
    if not weighted:
        raise ValueError("predictions must have depth, extrinsics, intrinsics or camera encodings, got none")
    return {"loss": weighted[0] if len(weighted) == 1 else weighted[0] + weighted[1], **terms}


def _encoded(predictions: Prediction, batch: dict) -> tuple[torch.Tensor, ...]:
    """The cameras as one encoding, with the truth in the place of what is not predicted of them."""
    extrinsics, intrinsics = predictions.extrinsics, predictions.intrinsics
    if extrinsics is None and intrinsics is None:
        return ()
    extrinsics = batch["extrinsics"] if extrinsics is None else extrinsics
    intrinsics = batch["intrinsics"] if intrinsics is None else intrinsics
    height, width = batch["point_masks"].shape[-2:]
    return (encode_pose(extrinsics.float(), intrinsics.float(), (height, width)),)


def counted_scenes(batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Scenes whose rotations and fields of view count, and scenes whose translations count, each ``[B]``."""
    scaled = batch["point_masks"][:, 0].sum(dim=(1, 2)) > _LEAST_POINTS
    posed = scaled | ~batch["has_depth"] if "has_depth" in batch else scaled
    return posed, scaled & batch["translation_known"] if "translation_known" in batch else scaled
