"""Whether a backbone is what it has to be: its attributes, its network, and what it says of images.

What of a user's own model can be seen to be wrong is refused by name, since the numbers that come out of it do not show
it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import get_args

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from subspace3d.backbones.protocol import PRESETS, Backbone, Frame, Kind, Prediction, Scale
from subspace3d.log import logger

_NORMALISED = 1.5  # principal points of normalised intrinsics stay below it, those in pixels lie in the image


def check_description(name: str, found: Backbone) -> None:
    """Raises ValueError, naming the attribute, if one of a user's backbone is not of its kind."""
    absent = [preset for preset in ("cores", "heads", "all") if preset not in found.targets]
    if absent:
        raise ValueError(f"backbone: targets of {name} must have cores, heads and all, {', '.join(absent)} is missing")
    expressions = {f"targets[{preset!r}]": text for preset, text in found.targets.items()} | {"blocks": found.blocks}
    for attribute, text in expressions.items():
        try:
            re.compile(text or "")
        except re.error as error:
            raise ValueError(
                f"backbone: {attribute} of {name} must be a regular expression, {text!r}: {error}"
            ) from error
    for attribute in ("frozen", "weight_prefixes", "requires"):
        value = getattr(found, attribute)
        if isinstance(value, str) or not all(isinstance(each, str) for each in value):
            raise ValueError(f"backbone: {attribute} of {name} must be a tuple of names, got {value!r}")
    for attribute, known in (("scale", get_args(Scale)), ("frame", get_args(Frame))):
        if getattr(found, attribute) not in known:
            got = getattr(found, attribute)
            raise ValueError(f"backbone: {attribute} of {name} must be one of {', '.join(known)}, got {got!r}")
    unknown = [kind for kind in found.lacks if kind not in get_args(Kind)]
    if unknown:
        raise ValueError(f"backbone: lacks of {name} must name some of {', '.join(get_args(Kind))}, got {unknown[0]!r}")
    for attribute in ("image_size", "patch_size"):
        value = getattr(found, attribute)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"backbone: {attribute} of {name} must be a positive whole number, got {value!r}")
    if not isinstance(found.frames, (tuple, list)) or len(found.frames) != 2:
        raise ValueError(f"backbone: frames of {name} must be the least and the most, (1, None), got {found.frames!r}")


def check_network(backbone: Backbone, method: str, model: object) -> nn.Module:
    """``model``, which ``method`` of ``backbone`` made.

    Raises:
        ValueError: it is no module, or one of a user's own whose parameters are not float32.
    """
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise ValueError(f"backbone: {method} of {backbone.name} must return a torch.nn.Module, got {kind}")
    if backbone.name in PRESETS:
        return model
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise ValueError(
                f"backbone: {method} of {backbone.name} must give float32, {name} is {parameter.dtype}; "
                "--train.precision bf16 computes in bfloat16"
            )
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    for attribute, prefixes in (("frozen", backbone.frozen), ("parts", tuple(backbone.parts))):
        idle = [each for each in prefixes if not any(f"{name}.".startswith(f"{each}.") for name in names)]
        if idle:
            logger.warning(f"{attribute} of {backbone.name}: no name in the network begins with {', '.join(idle)}")
    return model


def check_fields(name: str, prediction: Prediction, images: Tensor) -> None:
    """Raises ValueError if a field is not of the size, type, device or, as far as it shows, unit of `Prediction`."""
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
    if prediction.intrinsics is not None and name not in PRESETS and _has_values(prediction.intrinsics):
        corner = float(prediction.intrinsics.detach()[..., :2, 2].abs().max())
        if corner <= _NORMALISED < min(size):
            raise ValueError(
                f"backbone: intrinsics of the Prediction of {name} must be in pixels of the images given, but no "
                f"principal point lies further than {corner:.3g} pixels from the corner: multiply them by width and "
                "height if they are normalised"
            )


def _has_values(tensor: Tensor) -> bool:
    """Not so while a step is traced to estimate its memory."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


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


@contextlib.contextmanager
def torch_defaults(name: str) -> Iterator[None]:
    """Take back what a user's own code sets in torch for the whole process, which would stop or change the training."""
    gradients, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    try:
        yield
    finally:
        changed = []
        if torch.is_grad_enabled() != gradients:
            torch.set_grad_enabled(gradients)
            changed.append("gradients off")
        if torch.get_default_dtype() != dtype:
            changed.append(f"the default type {torch.get_default_dtype()}")
            torch.set_default_dtype(dtype)
        if changed:
            logger.warning(f"backbone: {name} set {' and '.join(changed)} for the whole process, which is taken back")
