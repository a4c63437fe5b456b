"""What the pipeline asks of a model: one `Backbone` describes a model class, its network stays what it is.

A backbone is no module: it says how to call a network, which modules of it are adapted, what belongs to which part, and
how its outputs are read. The network keeps its own module names, so adapters fit the user's own copy of it, and PEFT
wraps the network itself. Importing this module loads no torch.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from subspace3d.backbones.own_code import said_of
from subspace3d.backbones.prediction import Kind as Kind
from subspace3d.backbones.prediction import Prediction as Prediction
from subspace3d.backbones.presets import PRESETS
from subspace3d.log import logger

if TYPE_CHECKING:
    from torch import Tensor, nn

    from subspace3d.backbones.losses import LossCounts

Scale = Literal["scene", "metric", "free"]
Frame = Literal["first", "free"]
_ATTRIBUTE = "subspace3d_backbone"


class Backbone:
    """A model class: override `network` and `__call__`, and what of the attributes differs.

    Attributes:
        name: of the preset, or ``package.module:factory``.
        image_size: side in pixels of the square images it is used with where nothing else is asked for.
        patch_size: height and width of images are multiples of it.
        frames: least and most frames in one forward pass; most None: any number.
        scale: unit of its depths and translations. scene: the mean distance of a scene's points from the first camera,
            which is what it learns and is compared in; metric: metres; free: any, each scene in its own.
        frame: its world. first: the first image's camera; free: any.
        targets: preset -> expression that the full names of the modules match. ``cores`` are the Linears that subspace
            and psv put a core on, ``heads`` the modules that get a LoRA beside them, ``all`` both; there may be others.
        parts: prefix of module names -> part, for clipping and counts. What has none is in the part ``other``.
        frozen: prefixes of module names that no method trains, full tuning neither.
        encoder: name of the frozen module that maps ``[N, 3, H, W]`` to ``[N, patches, dim]``, whose results can be
            kept on disk; None: there is none.
        head_width: module whose outputs are as wide as a head module must be, on both sides, for ``head_cores``.
        blocks: expression over the names of the modules that are recomputed in the backward pass on request.
        special_tokens: of every image, beside its patches.
        lacks: what the model does not predict -> where the pipeline takes it from, or ``missing``.
        licence: of the published weights, as their publisher calls it; None: unknown.
        weights_advice: where the published weights are, for the message when none are given.
        weight_prefixes: taken off the names of a weights file where every name has them.
        shipped: file of weights that comes with the package.
        requires: modules that must be importable, beside torch.
        install: the command that brings them.
    """

    name: str = ""
    image_size: int = 518
    patch_size: int = 14
    frames: tuple[int, int | None] = (1, None)
    scale: Scale = "scene"
    frame: Frame = "first"
    targets: Mapping[str, str] = {}
    parts: Mapping[str, str] = {}
    frozen: tuple[str, ...] = ()
    encoder: str | None = None
    head_width: str | None = None
    blocks: str | None = None
    special_tokens: int = 0
    lacks: Mapping[Kind, str] = {}
    licence: str | None = None
    weights_advice: str = ""
    weight_prefixes: tuple[str, ...] = ()
    shipped: Path | None = None
    requires: tuple[str, ...] = ()
    install: str = ""
    _units_checked = False  # once is enough, and costs a wait for the GPU

    def network(self) -> nn.Module:
        """The network with random weights, float32; also called on the meta device, to count parameters."""
        raise NotImplementedError(f"{type(self).__name__} must have a method network")

    def checked_network(self) -> nn.Module:
        """What `network` makes.

        Raises:
            ModuleNotFoundError: see `check_packages`.
            ValueError: it is no module, one that is not float32, or a user's own code raised something.
        """
        self.check_packages()
        with contextlib.nullcontext() if self.name in PRESETS else said_of(self.name):
            model = self.network()
        return self.checked_module("network", model)

    def checked_module(self, method: str, model: object) -> nn.Module:
        """``model``, which ``method`` made.

        Raises:
            ValueError: it is no module, or one of a user's own whose parameters are not float32.
        """
        import torch
        from torch import nn

        if not isinstance(model, nn.Module):
            kind = type(model).__name__
            raise ValueError(f"backbone: {method} of {self.name} must return a torch.nn.Module, got {kind}")
        if self.name in PRESETS:
            return model
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and parameter.dtype != torch.float32:
                raise ValueError(
                    f"backbone: {method} of {self.name} must give float32, {name} is {parameter.dtype}; "
                    "--train.precision bf16 computes in bfloat16"
                )
        names = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
        for attribute, prefixes in (("frozen", self.frozen), ("parts", tuple(self.parts))):
            idle = [each for each in prefixes if not any(f"{name}.".startswith(f"{each}.") for name in names)]
            if idle:
                _warn_of_idle(self.name, attribute, ", ".join(idle))
        return model

    def __call__(self, model: nn.Module, images: Tensor) -> Prediction:
        """Run a network, plain or wrapped (by PEFT, DistributedDataParallel), with its graph.

        Args:
            model: what `build` returned, or a wrapper around it that is called as it is.
            images: ``[B, S, 3, H, W]`` in 0..1.
        """
        raise NotImplementedError(f"{type(self).__name__} must have a method __call__")

    def predict(self, model: nn.Module, images: Tensor) -> Prediction:
        """What `__call__` says, its fields of the kind that `Prediction` has; the z of points without a depth is the
        depth.

        Raises:
            ValueError: `__call__` returned something else; a field of another size, type or device; in its first
                prediction, intrinsics that are not in pixels; or, of a network that is trained, nothing with a graph.
        """
        from subspace3d.backbones.prediction_checks import check_fields, check_graph, check_units

        prediction = self(model, images)
        if not isinstance(prediction, Prediction):
            kind = type(prediction).__name__
            raise ValueError(f"backbone: __call__ of {self.name} must return a subspace3d Prediction, got {kind}")
        check_fields(self.name, prediction, images)
        if not self._units_checked and self.name not in PRESETS:
            self._units_checked = check_units(self.name, prediction, images)
        check_graph(self.name, prediction, model)
        if prediction.depth is None and prediction.points is not None:
            return replace(prediction, depth=prediction.points[..., 2])
        return prediction

    def loss(
        self, prediction: Prediction, batch: dict[str, Any], camera_weight: float, counts: LossCounts
    ) -> dict[str, Tensor]:
        """``camera_weight camera + depth`` of what is predicted, see `subspace3d.backbones.losses.multitask_loss`.

        Args:
            prediction: of ``batch["images"]``.
            batch: scenes in the first camera's frame, in units of the mean distance of their points
                (`subspace3d.training.normalization`); ``scene_scale [B]`` is that distance in the scenes' own unit.
            camera_weight: weight of the cameras beside depth.
            counts: over all scenes of the step, so that the losses of its parts add up.

        Returns:
            scalar ``loss`` with its graph, and every term for the log.
        """
        from subspace3d.backbones.losses import multitask_loss

        return multitask_loss(prediction, batch, camera_weight, counts)

    def load(self, path: Path) -> nn.Module:
        """The network with the weights in a file.

        Raises:
            ValueError: the file does not hold the weights of this network.
        """
        from subspace3d.backbones.weights import load_weights

        model = self.checked_network()
        load_weights(model, path, ignored_parts=(), prefixes=self.weight_prefixes)
        return model

    def download(self) -> Path:
        """The published weights, from where they are published.

        Raises:
            ValueError: there are none to be had this way.
        """
        advice = f": {self.weights_advice}" if self.weights_advice else ""
        raise ValueError(f"weights of {self.name} are not downloaded by the package{advice}")

    def build(self, weights: str | os.PathLike[str] | None = None) -> nn.Module:
        """The network, float32 on the CPU, ready for `backbone_of`.

        Args:
            weights: a file; ``random``; ``hub`` for the published ones, downloaded; None for those shipped.

        Raises:
            ValueError: no weights are shipped, or the file does not fit.
            FileNotFoundError: the file does not exist.
            ModuleNotFoundError: see `check_packages`.
        """
        self.check_packages()
        source = None if weights is None else os.fspath(weights)
        if source == "random":
            return attach(self.checked_network(), self)
        if source is not None:
            path = self.download() if source == "hub" else Path(source)
        elif self.shipped is not None:
            path = self.shipped
        else:
            advice = f": {self.weights_advice}" if self.weights_advice else ""
            raise ValueError(f"weights of {self.name} do not ship with the package{advice}")
        return attach(self.checked_module("load", self.load(path)), self)

    def checkpointing(self, model: nn.Module, enabled: bool) -> None:
        """Recompute the modules that ``blocks`` matches in the backward pass, or stop doing so; as for `__call__`."""
        from subspace3d.backbones.recompute import recompute

        if self.blocks is not None:
            recompute(network_of(model), self.blocks, enabled)

    def checked_size(self, asked: int, frames: tuple[int, int]) -> int:
        """The side of the images: the one asked for, or with 0 the backbone's own.

        Args:
            asked: pixels, or 0.
            frames: least and most in one scene.

        Raises:
            ValueError: it is no multiple of the patch size, or the backbone takes fewer or more frames.
        """
        size = asked or self.image_size
        if size % self.patch_size:
            raise ValueError(f"image_size must be a multiple of {self.patch_size}, a patch of {self.name}, got {size}")
        least, most = self.frames
        if frames[0] < least or (most is not None and frames[1] > most):
            rule = f"at least {least}" if most is None else f"{least} to {most}"
            raise ValueError(f"frames must be {rule} for {self.name}, got {frames[0]} to {frames[1]}")
        return size

    def missing(self) -> list[str]:
        """Modules of ``requires`` that cannot be found here."""
        return [name for name in self.requires if importlib.util.find_spec(name) is None]

    def check_packages(self) -> None:
        """Raises ModuleNotFoundError, with the command that brings it, if a module of ``requires`` cannot be found."""
        missing = self.missing()
        if missing:
            remedy = f": {self.install}" if self.install else ""
            raise ModuleNotFoundError(f"backbone {self.name} needs {', '.join(missing)}{remedy}", name=missing[0])

    def part_of(self, name: str) -> str:
        """The part that a parameter or module belongs to; names that wrappers put before it are skipped."""
        pieces = name.split(".")
        for start in range(len(pieces)):
            rest = ".".join(pieces[start:])
            found = [prefix for prefix in self.parts if rest == prefix or rest.startswith(prefix + ".")]
            if found:
                return self.parts[max(found, key=len)]
        return "other"

    def is_frozen(self, name: str) -> bool:
        """Whether no method trains the parameter ``name`` of the network."""
        return any(name.startswith(prefix + ".") or name == prefix for prefix in self.frozen)


@functools.cache
def _warn_of_idle(backbone: str, attribute: str, prefixes: str) -> None:
    """Once in a process: a network is looked at where it is counted, where it is made and where it is loaded."""
    logger.warning(f"{attribute} of {backbone}: no name in the network begins with {prefixes}")


def attach(model: nn.Module, backbone: Backbone) -> nn.Module:
    """Make `backbone_of` find ``backbone`` in ``model`` and in whatever wraps it; returns ``model``."""
    model.__dict__[_ATTRIBUTE] = backbone
    return model


def attached(model: nn.Module) -> Backbone | None:
    """The backbone that is attached to a network, plain or wrapped; None where there is none."""
    found = network_of(model).__dict__.get(_ATTRIBUTE)
    return found if isinstance(found, Backbone) else None


def network_of(model: nn.Module) -> nn.Module:
    """The network that a backbone is attached to, inside whatever wraps it; ``model`` itself where none is."""
    return next((module for module in model.modules() if _ATTRIBUTE in module.__dict__), model)
