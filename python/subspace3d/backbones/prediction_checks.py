"""Whether a prediction is what it has to be, as far as that shows in it.

The numbers that come out of a wrong one would not show it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from subspace3d.backbones.prediction import Prediction

_NORMALISED = 1.5  # principal points of normalised intrinsics stay below it, those in pixels lie in the image


def check_fields(name: str, prediction: Prediction, images: Tensor) -> None:
    """Raises ValueError if a field is not of the size, type or device that `Prediction` gives."""
    frames, size = tuple(images.shape[:2]), tuple(images.shape[-2:])
    wanted = {
        "depth": (*frames, *size),
        "points": (*frames, *size, 3),
        "confidence": (*frames, *size),
        "extrinsics": (*frames, 3, 4),
        "intrinsics": (*frames, 3, 3),
    }
    said = {key: getattr(prediction, key) for key in wanted}
    said |= {f"stages[{index}]": stage for index, stage in enumerate(prediction.stages)}
    for key, value in said.items():
        shape = wanted.get(key, (*frames, 9))
        if value is None:
            continue
        is_tensor = isinstance(value, torch.Tensor)
        if not is_tensor or tuple(value.shape) != shape:
            got = list(value.shape) if is_tensor else type(value).__name__
            raise ValueError(
                f"backbone: {key} of the Prediction of {name} must be a tensor {list(shape)}, of "
                f"{list(images.shape)} images, got {got}"
            )
        if not value.is_floating_point() or value.device != images.device:
            raise ValueError(
                f"backbone: {key} of the Prediction of {name} must be floating and on {images.device}, as the images "
                f"are, got {value.dtype} on {value.device}"
            )


def check_units(name: str, prediction: Prediction, images: Tensor) -> bool:
    """Whether there were intrinsics to look at; has to wait for the device they are on.

    Raises:
        ValueError: they cannot be in pixels.
    """
    intrinsics = prediction.intrinsics
    # those of a step that is traced to estimate its memory have no values
    if intrinsics is None or intrinsics.is_meta or isinstance(intrinsics, FakeTensor):
        return False
    corner = float(intrinsics.detach()[..., :2, 2].abs().max())
    if corner <= _NORMALISED < min(images.shape[-2:]):
        raise ValueError(
            f"backbone: intrinsics of the Prediction of {name} must be in pixels of the images given, but no "
            f"principal point lies further than {corner:.3g} pixels from the corner: multiply them by width and "
            "height if they are normalised"
        )
    return True


def check_graph(name: str, prediction: Prediction, model: nn.Module) -> None:
    """Of a network that is trained something that is predicted must have a graph."""
    fields = ("depth", "points", "confidence", "extrinsics", "intrinsics")
    said = [value for key in fields if (value := getattr(prediction, key)) is not None]
    said += prediction.stages
    if not said or not torch.is_grad_enabled() or any(value.requires_grad for value in said):
        return
    if any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"backbone: __call__ of {name} must keep the graph of what it predicts, nothing of its Prediction has one: "
            "no detach, no_grad or inference_mode"
        )
