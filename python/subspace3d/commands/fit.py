"""The command fit: does a basis suit a folder of scenes? Seconds of gradients instead of a training."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subspace3d import outputs, records
from subspace3d.jobs.options import ClusterOptions
from subspace3d.log import logger
from subspace3d.settings import require
from subspace3d.training.config import TrainConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

    from subspace3d.backbones.record import BackboneRecord
    from subspace3d.jobs.cluster import Cluster
    from subspace3d.training.few_losses import FewLosses
    from subspace3d.training.interfaces import BatchSource

RECORD = "fit.json"
FIGURE = "fit.png"
DOES_NOT_FIT = 3
"""Exit code where the basis holds no more of the gradient than what needs no mining."""


@dataclass(frozen=True)
class FitConfig(ClusterOptions):
    """Say how much of the loss's gradient on SCENES a basis holds, before anything is trained; exit code 3: too little.

    Too little is no more than the singular vectors of the weights or random directions hold at the same K. Where frames
    have no cameras, the loss is how well the views of a scene agree, as in finetune --few.
    """

    scenes: Path
    """Scenes to tune on later: a folder with scenes anywhere below it, or a YAML file of such folders and shares."""
    subspaces: tuple[Path, ...]
    """Mined subspace files (or folders of them), or one file that holds a combined basis; as in finetune."""
    out: Path
    """Folder for fit.json and fit.png."""
    attributes: tuple[str, ...] = ()
    """Only these of the subspace files, by their names without suffix; none: all."""
    k: int = 0
    """Keep only this many leading directions of each attribute; 0: all."""
    core_size: int = 0
    """Keep only this many leading principal directions of the concatenation; 0: all."""
    head_cores: bool = False
    """Also the head modules that finetune --head-cores puts a core on."""
    backbone: str = "vggt-nano"
    """A preset (doctor lists them), or package.module:factory."""
    weights: Path | None = None
    """Weights of the backbone; none: those shipped with the package (nano only)."""
    batches: int = 8
    """Batches whose gradient is taken, in two halves: directions of one half are measured on the other."""
    gradient_gigabytes: float = 8.0
    """Most host memory for gradients, in 1e9 bytes; less takes more passes over the same batches."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How batches are drawn, the loss, precision and device; steps and rates have no effect."""

    def __post_init__(self) -> None:
        require(len(self.subspaces) > 0, "subspaces", "at least one file or folder", self.subspaces)
        require(self.batches >= 2, "batches", "at least 2, one for each half", self.batches)
        require(self.k >= 0, "k", "at least 0", self.k)
        require(self.core_size >= 0, "core_size", "at least 0", self.core_size)
        require(self.gradient_gigabytes > 0, "gradient_gigabytes", "positive", self.gradient_gigabytes)
        super().__post_init__()

    def reads(self) -> list[tuple[str, Path]]:
        return outputs.named(scenes=self.scenes, weights=self.weights, subspaces=self.subspaces)

    def writes(self) -> list[outputs.Output]:
        return [outputs.Output("out", self.out, outputs.FIT)]


def run(config: FitConfig) -> dict[str, Any]:
    """Measure, write OUT/fit.json and OUT/fit.png, and print the sentence; returns the record.

    Nothing is measured when OUT/fit.json was made from the same files with the same settings.

    Raises:
        ValueError: subspaces that do not fit the backbone, or settings outside their range.
        FileNotFoundError: scenes, subspaces or weights are missing.
        FloatingPointError: a gradient is not finite.
        SystemExit: with 3 if the verdict is not ``fits``; with 1 if a cluster could not take the gradient of a batch.
    """
    from subspace3d.adapters.basis import select_files, warn_of_other_base
    from subspace3d.backbones.find import find_backbone
    from subspace3d.backbones.record import UNKNOWN, record_backbone
    from subspace3d.files import sha256, write_json
    from subspace3d.formats.fit import FORMAT, VERSION, read_fit
    from subspace3d.reporting.fit_figure import draw_fit
    from subspace3d.training.run import run_settings

    config = outputs.check(config)
    files = select_files(config.subspaces, config.attributes)
    find_backbone(config.backbone).checked_size(config.train.image_size, config.train.frames)
    backbone = record_backbone(config.backbone, config.weights, config.train.seed, UNKNOWN)
    warn_of_other_base(files.values(), backbone.identity)
    inputs = run_settings(
        config.train,
        {
            "backbone": backbone.identity,
            "scenes": str(config.scenes),
            "subspaces": {name: sha256(path) for name, path in files.items()},
            "k": config.k,
            "K": config.core_size,
            **{name: getattr(config, name) for name in ("head_cores", "batches")},
        },
    )
    path = config.out / RECORD
    record = read_fit(path)
    if record is None or records.differing(record["inputs"], inputs):
        key = records.digest(inputs)[:16]
        record = {"format": FORMAT, "version": VERSION, "inputs": inputs, **_measure(config, files, backbone, key)}
        outputs.mark(config.out, outputs.FIT)
        draw_fit(record, config.out / FIGURE)
        # written last: whoever sees it finds the figure beside it
        write_json(path, record)
    for line in describe(record):
        logger.info(line)
    logger.info(f"fit -> {path}")
    if record["verdict"] != "fits":
        raise SystemExit(DOES_NOT_FIT)
    logger.info(f"next: subspace3d {shlex.join(_same_basis(config))}{backbone.flags()}")
    return record


def _same_basis(config: FitConfig) -> list[str]:
    """The command that tunes on the same scenes in the same basis."""
    words = ["finetune", "--scenes", str(config.scenes), "--out", "RUN", "--subspaces", *map(str, config.subspaces)]
    words += ["--attributes", *config.attributes] if config.attributes else []
    for flag, count in (("--k", config.k), ("--core-size", config.core_size)):
        words += [flag, str(count)] if count else []
    return words + ["--head-cores"] * config.head_cores


def describe(record: Mapping[str, Any]) -> list[str]:
    """The record in a few lines for the terminal, the sentence first."""
    sides = ", ".join(f"{side} {_percent(record['shares']['basis'][side])}" for side in ("core", "U", "V"))
    beside = ", ".join(f"{name} {_percent(record['shares'][name]['core'])}" for name in ("random", "psv", "gradient"))
    lines = [record["sentence"], f"  {sides}; cores at the same K: {beside}"]
    suggested = record["suggested"]
    advice = [f"K = {suggested['K']} keeps nine tenths of it"]
    if suggested["k"] is not None:
        advice.append(f"so does k = {suggested['k']} per attribute")
    if suggested["attributes"] is not None:
        advice.append(f"attributes that help: {', '.join(suggested['attributes']) or 'none'}")
    return [*lines, "  " + "; ".join(advice)]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


@dataclass(frozen=True)
class _Prepared:
    """What gradients are taken of, and by which weights."""

    model: nn.Module
    basis: Mapping[str, tuple[Tensor, Tensor]]
    weights: Mapping[str, nn.Parameter]
    source: BatchSource | FewLosses
    teacher: str


@dataclass(frozen=True)
class _Batches:
    """What the jobs of a cluster share: the gradient of each batch goes to a folder of its number in ``folder``."""

    config: FitConfig
    files: Sequence[Path]
    backbone: BackboneRecord
    folder: Path


def _prepare(config: FitConfig, files: Sequence[Path], backbone: BackboneRecord) -> _Prepared:
    from subspace3d.adapters.basis import basis_for_model
    from subspace3d.backbones.find import backbone_of
    from subspace3d.backbones.record import load_backbone
    from subspace3d.datasets.multiview import MultiViewDataset
    from subspace3d.training.device import choose_device
    from subspace3d.training.few_losses import FewLosses

    model = load_backbone(backbone).to(choose_device(config.train.device))
    described = backbone_of(model)
    described.checkpointing(model, config.train.checkpointing)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    basis = basis_for_model(files, model, config.core_size, config.k, config.head_cores)
    image_size = described.checked_size(config.train.image_size, config.train.frames)
    dataset = MultiViewDataset.for_training(config.scenes, image_size, config.train, described.patch_size)
    losses = FewLosses.where_needed(model, dataset.folders, image_size, config.train)
    shares = not config.scenes.is_dir()
    require(losses is None or not shares, "scenes", "a folder where frames have no cameras", config.scenes)
    weights = {name: model.get_parameter(f"{name}.weight") for name in basis}
    if losses is None:
        return _Prepared(model, basis, weights, dataset, "depth")
    return _Prepared(model, basis, weights, losses, losses.teacher)


def _measure(config: FitConfig, files: Mapping[str, Path], backbone: BackboneRecord, key: str) -> dict[str, Any]:
    from subspace3d.adapters.basis import read_pairs
    from subspace3d.files import discard
    from subspace3d.jobs.cluster import joined_cluster
    from subspace3d.mining.fit import Measured, measure_module, record, stable_rank
    from subspace3d.training.gradients import count_passes, summed_gradients

    halves = [range(half, config.batches, 2) for half in range(2)]
    batches = _Batches(config, list(files.values()), backbone, config.out / ".gradients" / key)
    prepared = _prepare(config, batches.files, backbone)
    weights, basis = prepared.weights, prepared.basis
    with joined_cluster(config, on_cpu=config.train.device == "cpu") as cluster:
        if cluster is not None:
            _take_on_cluster(batches, cluster)
    loaded = {name: read_pairs(path) for name, path in files.items()}
    modules: dict[str, Measured] = {}
    ranks: dict[str, float | None] = {}
    if config.ray:
        sums = _sum_taken(weights, halves, batches.folder)
    else:
        sums = summed_gradients(
            prepared.model, weights, prepared.source, config.train, halves, "gradient", config.gradient_gigabytes
        )
    with contextlib.closing(sums):
        for name, parts in sums:
            gradients = parts.flatten(2).to(weights[name].device)
            attributes = {
                attribute: (pairs[name][0][:, : config.k or None], pairs[name][1][:, : config.k or None])
                for attribute, (pairs, combined) in loaded.items()
                if not combined
            }
            modules[name] = measure_module(gradients, weights[name].detach().flatten(1), basis[name], attributes)
            ranks[name] = stable_rank(gradients)
    passes = count_passes(weights, 1 if config.ray else len(halves), config.gradient_gigabytes)
    if batches.folder.parent.is_dir():
        discard(batches.folder.parent)
    return {"passes": passes, **record(modules, ranks, str(config.scenes), prepared.teacher)}


# ---- on a cluster: every batch a job ---------------------------------------------------------------------------------


def _take_on_cluster(batches: _Batches, cluster: Cluster) -> None:
    """Leave the gradient of every batch in its folder.

    Raises:
        SystemExit: with 1 if some could not be taken; the others stand.
    """
    from subspace3d.jobs.cluster import absolute
    from subspace3d.jobs.pool import run_jobs
    from subspace3d.jobs.work import exit_on_failures
    from subspace3d.progress import Progress

    config = absolute(batches.config, "scenes")
    device = cluster.device if config.train.device == "auto" else config.train.device
    train = dataclasses.replace(config.train, device=device, threads=config.train.threads or cluster.cpus)
    batches = dataclasses.replace(
        batches,
        config=dataclasses.replace(config, train=train),
        files=[path.resolve() for path in batches.files],
        folder=batches.folder.resolve(),
    )
    outputs.mark(config.out, outputs.FIT)
    with Progress("gradient", config.batches) as progress:
        names = [str(step) for step in range(config.batches)]
        failures = run_jobs(names, _set_up, batches, 1, lambda name: progress.advance(), cluster=cluster)
    exit_on_failures("fit", "batches", failures, config.batches, batches.folder)


def _set_up(batches: _Batches, worker: int) -> Callable[[str], object]:
    from subspace3d.files import atomic_folder, save_tensors
    from subspace3d.training.gradients import summed_gradients

    prepared, config = _prepare(batches.config, batches.files, batches.backbone), batches.config

    def work(step: str) -> None:
        folder = batches.folder / step
        if folder.is_dir():
            return  # by a process that died before it could say so, or a run that was cut off
        folder.parent.mkdir(parents=True, exist_ok=True)
        sums = summed_gradients(
            prepared.model,
            prepared.weights,
            prepared.source,
            config.train,
            [[int(step)]],
            gigabytes=config.gradient_gigabytes,
        )
        with atomic_folder(folder) as temporary, contextlib.closing(sums):
            for name, gradient in sums:
                save_tensors(temporary / f"{name}.safetensors", {"gradient": gradient[0]})

    return work


def _sum_taken(
    weights: Mapping[str, Tensor], parts: Sequence[Sequence[int]], folder: Path
) -> Generator[tuple[str, Tensor], None, None]:
    """`summed_gradients` of batches whose gradients are there, in the same order of summation."""
    import torch

    from subspace3d.files import load_tensors

    for name, weight in weights.items():
        sums = torch.zeros(len(parts), *weight.shape)
        for part, steps in enumerate(parts):
            for step in steps:
                sums[part] += load_tensors(folder / str(step) / f"{name}.safetensors")[0]["gradient"]
        yield name, sums
