"""Losses of the camera and the depth head.

Values that are not finite are passed on, not replaced: the loop skips such a step and counts it.
"""

from __future__ import annotations

import torch

from subspace3d.backbones.pose import encode_pose

CAMERA_WEIGHT = 5.0
DEPTH_WEIGHT = 1.0
_LARGEST_ERROR = 100.0
_LEAST_POINTS = 100
_LEAST_FILTERED = 1000


def camera_loss(pose_enc_list: list[torch.Tensor], batch: dict, gamma: float = 0.6) -> dict[str, torch.Tensor]:
    """1/n sum_i gamma^(n-1-i) (mean |T_i - T*| + mean |q_i - q*| + 0.5 mean |fov_i - fov*|) over the n stages.

    |T_i - T*| is clamped at 100. A scene counts only if its first frame has more than 100 valid points, because the
    first camera sets the scene's frame and scale; with no such scene the loss is zero.

    Args:
        pose_enc_list (list[Tensor]): encoding after every refinement stage, each ``[B, S, 9]``: translation (3) and
            xyzw quaternion (4) of camera-from-world, vertical and horizontal field of view in radians.
        batch (dict): normalised; ``extrinsics [B, S, 3, 4]``, ``intrinsics [B, S, 3, 3]``,
            ``point_masks [B, S, H, W]`` bool.

    Returns:
        dict: scalars ``camera`` and, of the last stage alone, ``translation``, ``rotation``, ``fov`` (detached).
    """
    masks = batch["point_masks"]
    target = encode_pose(batch["extrinsics"], batch["intrinsics"], (masks.shape[-2], masks.shape[-1]))
    counted = masks[:, 0].sum(dim=(1, 2)) > _LEAST_POINTS
    if not bool(counted.any()):
        zero = sum((encoding.sum() * 0.0 for encoding in pose_enc_list), start=target.new_zeros(()))
        return {"camera": zero, "translation": zero.detach(), "rotation": zero.detach(), "fov": zero.detach()}
    target = target[counted]
    total = target.new_zeros(())
    terms: dict[str, torch.Tensor] = {}
    stages = len(pose_enc_list)
    for stage, encoding in enumerate(pose_enc_list):
        error = (encoding[counted].float() - target).abs()
        translation = error[..., :3].clamp(max=_LARGEST_ERROR).mean()
        rotation, fov = error[..., 3:7].mean(), error[..., 7:].mean()
        total = total + gamma ** (stages - 1 - stage) * (translation + rotation + 0.5 * fov)
        terms = {"translation": translation.detach(), "rotation": rotation.detach(), "fov": fov.detach()}
    return {"camera": total / stages, **terms}


def depth_loss(
    depth: torch.Tensor, confidence: torch.Tensor, batch: dict, gamma: float = 1.0, alpha: float = 0.2
) -> dict[str, torch.Tensor]:
    """mean e + mean (gamma e c - alpha log c) + gradient loss,  e = |d - d*| over valid pixels.

    From each of the two means the values at or above their own 98 % quantile are left out (see `drop_outliers`).
    With fewer than 100 valid pixels in the batch the loss is zero. The confidence term makes the total negative
    when the errors are small; that is no fault.

    Args:
        depth (Tensor): predicted z-depth in normalised units, ``[B, S, H, W, 1]``.
        confidence (Tensor): ``c``, at least 1, ``[B, S, H, W]``.
        batch (dict): normalised; ``depths [B, S, H, W]``, ``point_masks [B, S, H, W]`` bool.
        gamma (float): weight of the confidence-weighted error.
        alpha (float): reward for confidence.

    Returns:
        dict: scalars ``depth`` and, detached, ``depth_error``, ``depth_confidence``, ``depth_gradient``.
    """
    target, mask = batch["depths"], batch["point_masks"]
    predicted, confidence = depth.squeeze(-1).float(), confidence.float().clamp(min=1e-6)
    if int(mask.sum()) < _LEAST_POINTS:
        zero = (predicted.sum() + confidence.sum()) * 0.0
        return dict.fromkeys(("depth", "depth_error", "depth_confidence", "depth_gradient"), zero)
    valid_confidence = confidence[mask]
    error = (predicted[mask] - target[mask]).abs()
    regression = drop_outliers(error).mean()
    weighted = drop_outliers(gamma * error * valid_confidence - alpha * valid_confidence.log()).mean()
    gradient = gradient_loss(predicted.flatten(0, 1), target.flatten(0, 1), mask.flatten(0, 1))
    return {
        "depth": regression + weighted + gradient,
        "depth_error": regression.detach(),
        "depth_confidence": weighted.detach(),
        "depth_gradient": gradient.detach(),
    }


def gradient_loss(predicted: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, scales: int = 4) -> torch.Tensor:
    """1/n sum_k (sum |dx r_k| + sum |dy r_k|) / count_k,  r = d - d*, r_k every 2^k-th row and column of it.

    A difference counts where both of its pixels are valid and is clamped at 100; count_k is the number of valid
    pixels at that scale.

    Args:
        predicted (Tensor): depth maps, ``[M, H, W]``, float32.
        target (Tensor): true depth maps, ``[M, H, W]``, float32.
        mask (Tensor): valid pixels, ``[M, H, W]``, bool.
        scales (int): n.
    """
    # zero outside the mask first: a NaN there would survive a multiplication by the mask
    residual = torch.where(mask, predicted - target, 0.0)
    total = residual.new_zeros(())
    for scale in range(scales):
        step = 2**scale
        part, valid = residual[:, ::step, ::step], mask[:, ::step, ::step]
        across = (part[:, :, 1:] - part[:, :, :-1]).abs().clamp(max=_LARGEST_ERROR)
        down = (part[:, 1:] - part[:, :-1]).abs().clamp(max=_LARGEST_ERROR)
        summed = (across * (valid[:, :, 1:] & valid[:, :, :-1])).sum() + (down * (valid[:, 1:] & valid[:, :-1])).sum()
        total = total + summed / valid.sum().clamp(min=1)
    return total / scales


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
    return values[kept] if int(kept.sum()) > _LEAST_FILTERED else values


def multitask_loss(predictions: dict, batch: dict, camera_weight: float = CAMERA_WEIGHT) -> dict[str, torch.Tensor]:
    """camera_weight camera + depth.

    Args:
        predictions (dict): of the model: ``pose_enc_list``, ``depth [B, S, H, W, 1]``, ``depth_conf [B, S, H, W]``.
        batch (dict): normalised by `subspace3d.training.normalization.normalize_scenes`.
        camera_weight (float): weight of the camera loss.

    Returns:
        dict: scalar ``loss`` with its graph, and every term for the log.
    """
    camera = camera_loss(predictions["pose_enc_list"], batch)
    depth = depth_loss(predictions["depth"], predictions["depth_conf"], batch)
    loss = camera_weight * camera["camera"] + DEPTH_WEIGHT * depth["depth"]
    return {"loss": loss, **camera, **depth}
