"""What the pipeline asks of a model: one `Backbone` describes a model class, its network stays what it is.

A backbone is no module: it says how to call a network, which modules of it are adapted, what belongs to which part, and
how its outputs are read. The network keeps its own module names, so adapters fit the user's own copy of it, and PEFT
wraps the network itself. Importing this module loads no torch.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor, nn

    from subspace3d.backbones.losses import LossCounts

PRESETS: dict[str, str] = {
    "vggt-nano": "subspace3d.backbones.vggt_preset",
    "vggt-1b": "subspace3d.backbones.vggt_preset",
    "da3-small": "subspace3d.backbones.depth_anything_3",
    "da3-base": "subspace3d.backbones.depth_anything_3",
    "da3-large": "subspace3d.backbones.depth_anything_3",
    "vggt-omega": "subspace3d.backbones.omega",
    "pi3": "subspace3d.backbones.pi3",
    "pi3x": "subspace3d.backbones.pi3",
    "mapanything": "subspace3d.backbones.mapanything",
    "mapanything-apache": "subspace3d.backbones.mapanything",
}
"""Name -> module with a function ``preset(name)`` that returns the backbone."""
Kind = Literal["depth", "confidence", "extrinsics", "intrinsics"]
Scale = Literal["scene", "metric", "free"]
Frame = Literal["first", "free"]
_ATTRIBUTE = "subspace3d_backbone"


@dataclass(frozen=True)
class Prediction:
    """What a backbone says of B scenes of S images; None is what it does not say.

    Cameras are OpenCV ones (x right, y down, z forward); the centre of the top-left pixel is at (0.5, 0.5). They come
    as ``extrinsics`` and ``intrinsics``, or as the encodings of `subspace3d.backbones.pose` in ``stages``.

    Attributes:
        depth: z-depth ``[B, S, H, W]``, in the unit of the translations.
        confidence: ``[B, S, H, W]``, positive, the weight of an error in the loss.
        extrinsics: camera-from-world ``[B, S, 3, 4]``.
        intrinsics: ``[B, S, 3, 3]`` in pixels of the images given.
        points: ``[B, S, H, W, 3]`` in each camera and the unit of ``depth``, which is their z; of a model without
            intrinsics.
        stages: camera encodings ``[B, S, 9]`` after every refinement, the last one is the result.
        outputs: what the network returned, for a loss of the backbone's own.
    """

    depth: Tensor | None = None
    confidence: Tensor | None = None
    extrinsics: Tensor | None = None
    intrinsics: Tensor | None = None
    points: Tensor | None = None
    stages: tuple[Tensor, ...] = ()
    outputs: Any = field(default=None, repr=False)

    @classmethod
    def from_vggt(cls, outputs: Mapping[str, Any]) -> Prediction:
        """Of ``pose_enc_list`` or ``pose_enc``, ``depth [B, S, H, W, 1]`` and ``depth_conf``, as VGGT returns them."""
        stages = outputs.get("pose_enc_list")
        if stages is None and "pose_enc" in outputs:
            stages = [outputs["pose_enc"]]
        depth = outputs.get("depth")
        return cls(
            depth=None if depth is None else depth.squeeze(-1),
            confidence=outputs.get("depth_conf"),
            stages=tuple(stages or ()),
            outputs=outputs,
        )


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

    def network(self) -> nn.Module:
        """The network with random weights, float32; also called on the meta device, to count parameters."""
        raise NotImplementedError(f"{type(self).__name__} must have a method network")

    def checked_network(self) -> nn.Module:
        """What `network` makes.

        Raises:
            ModuleNotFoundError: see `check_packages`.
            ValueError: it is no module, one that is not float32, or a user's own code raised something.
        """
        from subspace3d.backbones.checks import check_network

        self.check_packages()
        with contextlib.nullcontext() if self.name in PRESETS else said_of(self.name):
            model = self.network()
        return check_network(self, "network", model)

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
            ValueError: `__call__` returned something else, a field of another size, type or device, or, of a network
                that is trained, nothing with a graph; names it.
        """
        from subspace3d.backbones.checks import check_fields, check_graph

        prediction = self(model, images)
        if not isinstance(prediction, Prediction):
            kind = type(prediction).__name__
            raise ValueError(f"backbone: __call__ of {self.name} must return a subspace3d Prediction, got {kind}")
        check_fields(self.name, prediction, images)
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
        from subspace3d.backbones.checks import check_network

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
        return attach(check_network(self, "load", self.load(path)), self)

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
    from subspace3d.backbones.checks import torch_defaults

    try:
        with torch_defaults(name):
            factory = getattr(_import(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"backbone must be importable, got {name!r}: {error}") from error
    if not callable(factory):
        raise ValueError(f"backbone: {name} must be a function or a class, got {type(factory).__name__}")
    return _made_by(name, factory)


@functools.cache
def _made_by(name: str, factory: Callable[..., object]) -> Backbone:
    """Of a factory once in a process: a command looks its backbone up many times, and making it may take long."""
    from subspace3d.backbones.checks import check_description

    if "weights" in inspect.signature(factory).parameters:
        from subspace3d.backbones.vggt_preset import VGGTFromFactory

        found: Any = VGGTFromFactory(name, factory)
    else:
        with said_of(name):
            found = factory()
    if not isinstance(found, Backbone):
        raise ValueError(f"backbone: {name} must return a subspace3d Backbone, got {type(found).__name__}")
    check_description(name, found)
    found.name = name
    return found


@contextlib.contextmanager
def said_of(name: str) -> Iterator[None]:
    """Whatever a user's own code raises within is told as the fault of the backbone ``name``, with its place.

    A missing package is told as what it is, and `torch_defaults` are kept.

    Raises:
        ValueError: in the place of any other exception than a ModuleNotFoundError.
    """
    from subspace3d.backbones.checks import torch_defaults

    try:
        with torch_defaults(name):
            yield
    except ModuleNotFoundError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if frame.filename != __file__ and "site-packages" not in frame.filename]
        place = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
        raise ValueError(f"backbone: {name} raised {type(error).__name__}: {error}{place}") from error


def _import(module: str) -> Any:
    """Installed modules first, then those in the working folder, which a console script does not look into."""
    folder = os.getcwd()
    added = folder not in sys.path
    if added:
        sys.path.append(folder)
    try:
        return importlib.import_module(module)
    finally:
        if added:
            sys.path.remove(folder)


def attach(model: nn.Module, backbone: Backbone) -> nn.Module:
    """Make `backbone_of` find ``backbone`` in ``model`` and in whatever wraps it; returns ``model``."""
    model.__dict__[_ATTRIBUTE] = backbone
    return model


def backbone_of(model: nn.Module) -> Backbone:
    """The backbone of a network, plain or wrapped; one without any is taken for a VGGT."""
    found = network_of(model).__dict__.get(_ATTRIBUTE)
    if isinstance(found, Backbone):
        return found
    from subspace3d.backbones.vggt_preset import describe

    return describe(model)


def network_of(model: nn.Module) -> nn.Module:
    """The network that a backbone is attached to, inside whatever wraps it; ``model`` itself where none is."""
    return next((module for module in model.modules() if _ATTRIBUTE in module.__dict__), model)
