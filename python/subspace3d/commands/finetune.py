"""One backbone, one method, one folder of scenes."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from subspace3d import __version__, outputs, records, settings
from subspace3d.choices import CORE_METHODS, Heads, Method
from subspace3d.files import sha256
from subspace3d.log import logger
from subspace3d.settings import require
from subspace3d.training.config import TrainConfig, cache_target, check_cache
from subspace3d.training.rates import usual_rate

if TYPE_CHECKING:
    from torch import nn

    from subspace3d.datasets.multiview import MultiViewDataset
    from subspace3d.formats.basis import Basis
    from subspace3d.training.device import Processes
    from subspace3d.training.few import FewResult, FewScene
    from subspace3d.training.fit_start import Start
    from subspace3d.training.run import TrainResult

# Methods whose checkpoints hold the adapter as PEFT writes it: those for which that is a small file of its own.
SNAPSHOTS = ("lora", "adalora")
# what runs did whose records do not say it
_WITHOUT_A_CHOICE = {"heads": "lora", "start": "zero", "few": False}


@dataclass(frozen=True)
class FinetuneConfig:
    """Tune a backbone on scenes by one method."""

    RENAMED: ClassVar[dict[str, str]] = {"K": "core_size"}

    scenes: Path
    """Training scenes: a folder with scenes anywhere below it, or a YAML file of such folders and their shares."""
    out: Path
    """Run folder."""
    method: Method = "subspace"
    """none: only writes the run folder, so that it can be evaluated as the base."""
    backbone: str = "vggt-nano"
    """A preset (doctor lists them), or package.module:factory."""
    weights: Path | None = None
    """File of weights, random, or hub (published, downloaded); none: those shipped with the package (nano only)."""
    licence: str = ""
    """Of the weights, written beside what is made of them; none: as the file, its model card or the backbone says."""
    subspaces: tuple[Path, ...] = ()
    """subspace: mined subspace files (or folders of them), whose concatenation is the frozen basis; or one file that
    holds a combined basis, of this project or in the layout of the authors' release."""
    attributes: tuple[str, ...] = ()
    """subspace: only these of the subspace files, by their names without suffix; none: all."""
    k: int = 0
    """subspace: keep only this many leading directions of each attribute; 0: all."""
    core_size: int = 0
    """subspace: K, keep only this many leading principal directions of the concatenation; 0: all. psv: leading singular
    vectors of each weight."""
    head_cores: bool = False
    """subspace and psv: also a core on every head module as wide as the depth head's features, beside its LoRA."""
    heads: Heads = "lora"
    """subspace and psv: lora: LoRA of rank r on both heads, as in the paper. frozen: only the cores are trained."""
    head_lr: float = 0.0
    """subspace and psv: peak rate of that LoRA, where --train.lr is that of the cores. 0: the same as --train.lr, or
    the usual one of lora where none is given either."""
    start: Literal["zero", "fit"] = "zero"
    """subspace and psv: where the cores start. fit: one step down the projected gradient, its length by line search."""
    rank: int = 16
    """LoRA rank: of the whole adapter for lora, pissa, adalora; of the adapters on the heads for psv and subspace."""
    targets: str = "all"
    """lora, pissa, adalora: target preset (cores, heads, all), or an expression that full module names match."""
    few: bool = False
    """A preset for 1 to 30 images in all: cores alone and started by fit, at most 100 steps, no decay, stopped by
    held-out views, before and after side by side. Images without depth or cameras teach by how well views agree. Other
    values of --train.steps and --train.weight-decay than the defaults stay."""
    generic: Path | None = None
    """few: other scenes with depth, on which what was forgotten is measured."""
    resume: Literal["auto", "never"] = "auto"
    """auto: continue from the newest checkpoint in OUT, if there is one. never: start over, deleting the run that is
    in OUT and nothing else."""
    cache_tokens: Path | None = None
    """Folder for the frozen image encoder's tokens: each image is encoded once. Not with augmentation."""
    cache_gigabytes: float = 20.0
    """Most that is kept there, in 1e9 bytes."""
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        require(self.rank >= 1, "rank", "at least 1", self.rank)
        require(self.k >= 0, "k", "at least 0", self.k)
        require(self.core_size >= 0, "core_size", "at least 0", self.core_size)
        with_cores = self.method in CORE_METHODS
        require(self.head_lr >= 0, "head_lr", "at least 0", self.head_lr)
        require(
            self.lora_on_heads or not self.head_lr, "head_lr", "0 without cores and LoRA on the heads", self.head_lr
        )
        require(self.start == "zero" or with_cores, "start", "zero for a method without cores", self.start)
        require(
            self.method != "psv" or self.core_size >= 1, "core_size", "at least 1 for the method psv", self.core_size
        )
        require(self.few or self.generic is None, "generic", "none without --few", self.generic)
        require(not self.few or self.method not in ("none", "adalora"), "method", "another one for --few", self.method)
        require(not self.few or self.cache_tokens is None, "cache_tokens", "none with --few", self.cache_tokens)
        check_cache(self.cache_tokens, self.cache_gigabytes, self.train)

    @property
    def lora_on_heads(self) -> bool:
        """Whether there is LoRA on the heads beside cores."""
        return self.method in CORE_METHODS and self.heads == "lora" and not self.few

    def reads(self) -> list[tuple[str, Path]]:
        return outputs.named(scenes=self.scenes, weights=self.weights, subspaces=self.subspaces, generic=self.generic)

    def writes(self) -> list[outputs.Output]:
        tuned = dataclasses.replace(outputs.TUNED, content=None) if self.resume == "auto" else outputs.TUNED
        run = outputs.Output("out", self.out, outputs.RUN)
        return [run, outputs.Output("out", self.out / "tuned", tuned), *cache_target(self.cache_tokens)]


def run(config: FinetuneConfig) -> dict[str, Any]:
    """Tune and write OUT/tuned; returns tuned.json. A finished run is not done again, a cut-off one is continued.

    Under torchrun every process calls it; the first of them writes.

    Raises:
        ValueError: OUT holds a run with other settings or anything else, or settings that do not fit the backbone or
            the subspaces.
        FileNotFoundError: scenes, weights or subspaces are missing.
    """
    from subspace3d.training.device import choose_device, joined_processes

    config = with_usual_rate(with_few(outputs.check(config)))
    with joined_processes(choose_device(config.train.device)) as processes:
        return _run(config, processes)


def with_few(config: FinetuneConfig) -> FinetuneConfig:
    """The settings of the preset ``few`` in place of those that are at their defaults."""
    if not config.few:
        return config
    defaults, train = TrainConfig(), config.train
    if train.steps == defaults.steps:
        train = dataclasses.replace(train, steps=100)
    if train.weight_decay == defaults.weight_decay:
        train = dataclasses.replace(train, weight_decay=0.0)
    with_cores = config.method in CORE_METHODS
    return dataclasses.replace(
        config,
        heads="frozen" if with_cores else config.heads,
        start="fit" if with_cores else config.start,
        train=train,
    )


def with_usual_rate(config: FinetuneConfig) -> FinetuneConfig:
    """The settings with the rates of the method on the backbone where none are given."""
    if config.method != "none" and not config.train.lr:
        rate = usual_rate(config.backbone, config.method)
        logger.info(f"train.lr {rate:g}, the usual one for {config.method} on {config.backbone}")
        if config.lora_on_heads and not config.head_lr:
            head_rate = usual_rate(config.backbone, "lora")
            logger.info(f"head_lr {head_rate:g}, the usual one for lora")
            config = dataclasses.replace(config, head_lr=head_rate)
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, lr=rate))
    if config.lora_on_heads and not config.head_lr:
        config = dataclasses.replace(config, head_lr=config.train.lr)
    return config


def _run(config: FinetuneConfig, processes: Processes) -> dict[str, Any]:
    import torch

    from subspace3d.adapters.basis import warn_of_other_base
    from subspace3d.adapters.methods import apply_method
    from subspace3d.backbones.find import find_backbone
    from subspace3d.backbones.record import load_backbone, record_backbone
    from subspace3d.formats.run import read_tuned
    from subspace3d.training.device import choose_device
    from subspace3d.training.few import load_few
    from subspace3d.training.run import run_settings
    from subspace3d.training.tuned import save_tuned

    subspaces = _subspaces(config)
    described = find_backbone(config.backbone)
    image_size = described.checked_size(config.train.image_size, config.train.frames)
    backbone = record_backbone(config.backbone, config.weights, config.train.seed, config.licence)
    identity = _identity(config, backbone.identity, subspaces)
    wanted = run_settings(config.train, identity)
    if config.resume == "auto" and (config.out / "tuned" / "tuned.json").is_file():
        return _finished(config, wanted)

    if subspaces:
        warn_of_other_base(subspaces, backbone.identity)
    base = load_backbone(backbone)
    few = load_few(config.scenes, image_size) if config.few else None
    dataset = None if config.few else _dataset(config, image_size, described.patch_size)
    basis = _basis(config, subspaces, base)
    described.checkpointing(base, config.train.checkpointing)
    torch.manual_seed(config.train.seed)
    base.to(choose_device(config.train.device))
    model = apply_method(
        base,
        config.method,
        config.rank,
        config.targets,
        basis,
        backbone.identity,
        steps=config.train.steps,
        heads=config.heads,
    )
    if processes.is_first:
        settings.save(config.out / "config.yaml", config)
    done = _Done()
    if few is not None:
        done = _tune_few(config, model, few, processes)
    elif dataset is not None and config.method != "none":
        done = _train(config, model, base, dataset, image_size, identity, processes)
    if processes.is_first:
        record = _record(config, model, basis, identity["basis"], done)
        save_tuned(config.out, model, config.method, backbone, basis, {**record, "settings": wanted})
        logger.info(f"tuned -> {config.out / 'tuned'}")
        logger.info(f"next: {_next(config, backbone.flags())}")
    processes.wait()
    return dict(read_tuned(config.out))


def _subspaces(config: FinetuneConfig) -> list[Path]:
    from subspace3d.adapters.basis import select_files

    if config.method != "subspace":
        return []
    if not config.subspaces:
        raise ValueError("subspaces must name at least one subspace file or a folder of them, got none")
    return list(select_files(config.subspaces, config.attributes).values())


def _identity(config: FinetuneConfig, backbone: str, subspaces: list[Path]) -> dict[str, Any]:
    """What the result depends on beside the settings of the training."""
    return {
        "method": config.method,
        "backbone": backbone,
        "rank": config.rank,
        "targets": config.targets,
        "K": config.core_size,
        "k": config.k,
        "head_cores": config.head_cores,
        "heads": config.heads,
        "head_lr": config.head_lr or None,
        "start": config.start,
        "few": config.few,
        "basis": [{"path": str(path), "sha256": sha256(path)} for path in subspaces],
        "scenes": str(config.scenes),
    }


def _finished(config: FinetuneConfig, wanted: dict[str, Any]) -> dict[str, Any]:
    """The tuned.json that is there, which other settings must not have made."""
    from subspace3d.formats.run import read_tuned

    record = read_tuned(config.out)
    before = {**_WITHOUT_A_CHOICE, **record["settings"]}
    # one rate for all, as long as there was no choice
    before.setdefault("head_lr", before.get("lr") if config.head_lr else None)
    records.check_same(config.out, before, wanted, "--resume never starts over")
    logger.info(f"{config.out}: already tuned with these settings; more --train.steps need another --out")
    return dict(record)


def _dataset(config: FinetuneConfig, image_size: int, patch_size: int) -> MultiViewDataset:
    from subspace3d.datasets.multiview import MultiViewDataset

    dataset = MultiViewDataset.for_training(config.scenes, image_size, config.train, patch_size)
    return dataset if config.method == "none" else dataset.require_cameras()


@dataclass(frozen=True)
class _Done:
    """What was done to the model, as tuned.json says it."""

    training: TrainResult | None = None
    start: Start | None = None
    few: FewResult | None = None


def _tune_few(config: FinetuneConfig, model: nn.Module, few: list[FewScene], processes: Processes) -> _Done:
    from subspace3d.evaluation.scene import abs_rel
    from subspace3d.progress import Progress
    from subspace3d.training.few import format_few, tune_few

    require(processes.count == 1, "few", "off under torchrun", processes.count)
    if config.resume == "never":
        outputs.replace([config.out / "tuned"], outputs.TUNED, "finetune --resume never")
    with Progress(f"few {config.method}", config.train.steps, "step") as progress:
        found = tune_few(
            model,
            few,
            config.train,
            config.generic,
            config.start == "fit",
            lambda step, loss: progress.advance(note=f"loss {loss:.4g}"),
            abs_rel,
        )
    logger.info(format_few(found))
    return _Done(few=found)


def _train(
    config: FinetuneConfig,
    model: nn.Module,
    base: nn.Module,
    dataset: MultiViewDataset,
    image_size: int,
    identity: dict[str, Any],
    processes: Processes,
) -> _Done:
    from subspace3d.adapters.hooks import method_hook
    from subspace3d.adapters.parameters import head_groups
    from subspace3d.training.device import choose_device
    from subspace3d.training.fit_start import start_cores
    from subspace3d.training.gradients import BATCHES
    from subspace3d.training.loop import train
    from subspace3d.training.memory import check_memory
    from subspace3d.training.tuned import save_adapter

    if processes.is_first:
        sharing = 1 if choose_device(config.train.device).type == "cuda" else processes.count
        check_memory(model, config.train, image_size, processes.count, sharing)
        if config.resume == "never":
            # only now, when nothing more keeps the new run from beginning
            outputs.replace([config.out / "tuned"], outputs.TUNED, "finetune --resume never")
    processes.wait()
    start = None
    with _token_cache(config, base):
        if config.start == "fit":
            start = start_cores(model, dataset, config.train, BATCHES, "start of the cores")
        result = train(
            model,
            dataset,
            config.train,
            config.out,
            groups=head_groups(model, config.head_lr / config.train.lr) if config.head_lr else None,
            resume=config.resume == "auto",
            label=config.method,
            settings=identity,
            hook=method_hook(model),
            snapshot=(lambda folder: save_adapter(model, folder)) if config.method in SNAPSHOTS else None,
        )
    return _Done(result, start)


def _record(
    config: FinetuneConfig, model: nn.Module, basis: Basis | None, basis_files: list[dict[str, str]], done: _Done
) -> dict[str, Any]:
    """What tuned.json says of the result, and where it was made."""
    import torch

    from subspace3d.adapters.parameters import count_trainable
    from subspace3d.training.device import device_name

    return {
        "rank": config.rank,
        "K": max((u.shape[1] for u, _ in basis.values()), default=0) if basis else 0,
        "basis": basis_files,
        "trainable": count_trainable(model),
        **dataclasses.asdict(done),
        "environment": {
            "subspace3d": __version__,
            "torch": torch.__version__,
            "device": device_name(config.train.device),
            "finished": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        },
    }


def _next(config: FinetuneConfig, backbone_flags: str) -> str:
    """The commands that take the run further."""
    out = shlex.quote(str(config.out))
    report = f"subspace3d report {out}, " if config.few else ""
    evaluation = shlex.quote(str(config.out / "evaluation"))
    evaluate = f"subspace3d evaluate --scenes TEST_SCENES --tuned {out} --out {evaluation}{backbone_flags}"
    named = f" --backbone {config.backbone}" if ":" in config.backbone else ""
    return f"{report}{evaluate}, or subspace3d export {out}{named}"


def _token_cache(config: FinetuneConfig, base: nn.Module) -> contextlib.AbstractContextManager:
    from subspace3d.training.token_cache import TokenCache

    if config.cache_tokens is None:
        return contextlib.nullcontext()
    return TokenCache.of_backbone(config.cache_tokens, base, config.cache_gigabytes).attached()


def _basis(config: FinetuneConfig, subspaces: list[Path], base: nn.Module) -> Basis | None:
    from subspace3d.adapters.basis import basis_for_model
    from subspace3d.adapters.placement import place
    from subspace3d.adapters.spectral import singular_basis

    if config.method == "subspace":
        return basis_for_model(subspaces, base, config.core_size, config.k, config.head_cores)
    if config.method == "psv":
        return singular_basis(base, place(base, "psv", head_cores=config.head_cores).cores, config.core_size)
    return None
