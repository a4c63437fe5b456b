"""Where the live viewer takes its scenes from: what an evaluation kept, or scene folders predicted when opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from subspace3d.evaluation import pictures
from subspace3d.evaluation.alignment import scale_alignment, umeyama
from subspace3d.evaluation.pictures import ShownViews
from subspace3d.evaluation.scene_metrics import Views
from subspace3d.files import read_record
from subspace3d.formats.results import ResultsRecord

if TYPE_CHECKING:
    import torch

    from subspace3d.backbones.record import BackboneRecord


class Source(Protocol):
    """Scenes that can be shown.

    Attributes:
        scenes: names.
        methods: names; not every scene need have all of them.
    """

    scenes: list[str]
    methods: list[str]

    def truth(self, scene: str) -> ShownViews:
        """The images, and the true depths (0 everywhere when they are not known) and cameras."""

    def prediction(self, scene: str, method: str) -> ShownViews | None:
        """None when the method failed on the scene."""


@dataclass(frozen=True)
class Prediction:
    """How scene folders are predicted: the backbone, tuned runs of it, frames per scene, and where it computes."""

    backbone: str = "vggt-nano"
    weights: Path | None = None
    tuned: tuple[Path, ...] = ()
    frames: int = 8
    device: str = "auto"


def open_source(path: Path, how: Prediction) -> Source:
    """The evaluation of a run folder where there is one, else the scenes below the folder.

    Raises:
        FileNotFoundError: the folder, a tuned run or weights are not there.
        ValueError: there is nothing to show; or ``tuned`` is given with a run that has been evaluated.
    """
    for results in (path / "evaluation" / "results.json", path / "results.json"):
        if results.is_file():
            if how.tuned:
                raise ValueError(f"tuned must not be given with an evaluated run, got {how.tuned[0]}; see {results}")
            return Evaluated(results)
    return Predicted(path, how)


class Evaluated:
    """What an evaluation kept of its first scenes.

    Raises:
        ValueError: ``results`` is no results file, or kept no scene.
    """

    def __init__(self, results: Path) -> None:
        record = read_record(results, ResultsRecord)
        self.folder = results.parent
        self._entries: dict[str, Mapping[str, Any]] = {entry["scene"]: entry for entry in record.get("pictures", [])}
        if not self._entries:
            raise ValueError(f"{results} must keep at least one scene; evaluate with --kept-scenes 1 or more")
        self.scenes, self.methods = list(self._entries), list(record["methods"])

    def truth(self, scene: str) -> ShownViews:
        return pictures.load_entry(self.folder, self._entries[scene], ())[0]

    def prediction(self, scene: str, method: str) -> ShownViews | None:
        return pictures.load_entry(self.folder, self._entries[scene], (method,))[1].get(method)


class Predicted:
    """Scene folders; a model is loaded and a scene predicted when it is first asked for."""

    def __init__(self, folder: Path, how: Prediction) -> None:
        from subspace3d.backbones.find import find_backbone
        from subspace3d.backbones.record import UNKNOWN, record_backbone
        from subspace3d.evaluation.evaluate import check_backbones, method_folders, scene_name
        from subspace3d.formats.scene import find_scenes
        from subspace3d.training.device import choose_device

        self._frames = how.frames
        # said here rather than in the page when the first scene is opened
        backbone = find_backbone(how.backbone)
        backbone.check_packages()
        backbone.checked_size(0, (how.frames, how.frames))
        self._backbone: BackboneRecord = record_backbone(how.backbone, how.weights, licence=UNKNOWN)
        self._device = choose_device(how.device)
        self._paths = {scene_name(path, folder): path for path in find_scenes(folder)}
        self._runs = method_folders(how.tuned)
        check_backbones(self._runs, how.backbone)
        self.scenes, self.methods = list(self._paths), list(self._runs)
        self._models: dict[str, torch.nn.Module] = {}
        self._shown: dict[tuple[str, str], ShownViews] = {}

    def truth(self, scene: str) -> ShownViews:
        return pictures.shown_truth(*self._load(scene))

    def prediction(self, scene: str, method: str) -> ShownViews:
        if (scene, method) not in self._shown:
            from subspace3d.evaluation.predict import predict

            images, true = self._load(scene)
            self._shown[scene, method] = align(predict(self._model(method), images, self._device), true)
        return self._shown[scene, method]

    def _load(self, scene: str) -> tuple[Any, Views]:
        from subspace3d.backbones.find import find_backbone
        from subspace3d.evaluation.predict import choose_frames
        from subspace3d.formats.scene import SceneFile, load_scene

        path = self._paths[scene]
        frames = choose_frames(len(SceneFile(path)), self._frames)
        loaded = load_scene(path, image_size=find_backbone(self._backbone.name).image_size, frames=frames)
        return loaded.images, Views.of(loaded)

    def _model(self, method: str) -> torch.nn.Module:
        from subspace3d.backbones.record import load_backbone
        from subspace3d.training.tuned import load_tuned

        if method not in self._models:
            run = self._runs[method]
            if run is None:
                self._models[method] = load_backbone(self._backbone).to(self._device)
            else:
                self._models[method] = load_tuned(run, self._device, self._backbone.name)
        return self._models[method]


def align(pred: Views, true: Views) -> ShownViews:
    """A prediction with the scale of its depths and the Sim(3) of its points, as the metrics fit them, without ICP.

    Where there is no true depth, the prediction stays in its own frame and unit.
    """
    mask = np.isfinite(true.depths) & (true.depths > 0)
    if not mask.any():
        return pictures.shown_prediction(pred, 1.0, pictures.IDENTITY)
    scale, alignment = scale_alignment(pred.depths, true.depths, mask), None
    if true.translation_known:
        try:
            alignment = umeyama(pred.points(mask), true.points(mask))
        except ValueError:
            alignment = None  # too few points, or all on one line
    return pictures.shown_prediction(pred, scale, alignment)
