"""Which backbone a name stands for, and which one a network has."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, get_args

from subspace3d.backbones.own_code import import_from_here, said_of, torch_defaults
from subspace3d.backbones.prediction import Kind
from subspace3d.backbones.presets import PRESETS
from subspace3d.backbones.protocol import Backbone, Frame, Scale, attached

if TYPE_CHECKING:
    from torch import nn


def find_backbone(name: str) -> Backbone:
    """The backbone of a preset, or the one that ``package.module:factory`` gives.

    A factory is a `Backbone` subclass or a function without arguments that returns one; or a function that takes
    ``weights`` and returns a network, which is taken for a VGGT. Modules are also looked for in the working folder.

    Raises:
        ValueError: no such preset, or nothing of that kind.
    """
    if name in PRESETS:
        return importlib.import_module(PRESETS[name]).preset(name)
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(f"backbone must be one of {', '.join(PRESETS)}, or package.module:factory, got {name!r}")
    try:
        with torch_defaults(name):
            factory = getattr(import_from_here(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"backbone must be importable, got {name!r}: {error}") from error
    if not callable(factory):
        raise ValueError(f"backbone: {name} must be a function or a class, got {type(factory).__name__}")
    return _made_by(name, factory)


@functools.cache
def _made_by(name: str, factory: Callable[..., object]) -> Backbone:
    """Of a factory once in a process: a command looks its backbone up many times, and making it may take long."""
    if "weights" in inspect.signature(factory).parameters:
        from subspace3d.backbones.vggt_preset import VGGTFromFactory

        found: Any = VGGTFromFactory(name, factory)
    else:
        with said_of(name):
            found = factory()
    if not isinstance(found, Backbone):
        raise ValueError(f"backbone: {name} must return a subspace3d Backbone, got {type(found).__name__}")
    _check_description(name, found)
    found.name = name
    return found


def backbone_of(model: nn.Module) -> Backbone:
    """The backbone of a network, plain or wrapped; one without any is taken for a VGGT."""
    found = attached(model)
    if found is not None:
        return found
    from subspace3d.backbones.vggt_preset import describe

    return describe(model)


def _check_description(name: str, found: Backbone) -> None:
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
