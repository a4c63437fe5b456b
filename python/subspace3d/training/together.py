"""Several adapters trained in one process: one forward and backward pass of the frozen network for all of them."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from subspace3d import outputs
from subspace3d.adapters.multi_lora import joined
from subspace3d.adapters.parameters import trainable_parameters
from subspace3d.backbones.find import backbone_of
from subspace3d.backbones.prediction import Prediction
from subspace3d.backbones.protocol import Backbone
from subspace3d.locks import exclusive
from subspace3d.log import logger
from subspace3d.progress import Progress
from subspace3d.training.config import TrainConfig
from subspace3d.training.device import Processes, choose_device
from subspace3d.training.interfaces import BatchSource
from subspace3d.training.run import Run, TrainResult, new_optimizer, prepare, random_state, set_random_state
from subspace3d.training.step import StepData, draw_step, moved, set_modes
from subspace3d.training.stop import stop_requests
from subspace3d.training.trackers import open_trackers

Terms = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Member:
    """One adapter of several.

    Attributes:
        name: for messages.
        model: a PeftModel around a copy of the network that shares its weights, see `multi_lora.share_weights`.
        dataset: source of its batches.
        out: its run folder.
        settings, snapshot: as for `loop.train`.
        random: the state of torch's generators with which its own run would begin, see `run.random_state`.
    """

    name: str
    model: nn.Module
    dataset: BatchSource
    out: Path
    settings: Mapping[str, Any]
    snapshot: Callable[[Path], object]
    random: dict[str, torch.Tensor]


def train_together(
    network: nn.Module, members: Sequence[Member], config: TrainConfig, label: str, quiet: bool = False
) -> tuple[dict[str, TrainResult], dict[str, Exception]]:
    """`loop.train` for every member at a time, on one frozen forward pass over the batches of all.

    Every member keeps its own loss, gradient clipping, optimiser, skipped steps, checkpoints and records, in a folder
    like that of its own run, so that it may be continued alone and the other way round; what comes out is what its own
    run gives, up to the rounding of products over a larger batch. Those that lag behind, because they were cut off
    earlier, go first. ``config.max_images`` bounds the images of all in one pass. A member that fails is left behind;
    the others go on.

    Args:
        network (nn.Module): the plain network, on its device; as it was afterwards.
        members (Sequence[Member]): of one rank.
        config (TrainConfig): of every member.
        label (str): name in the progress display.
        quiet (bool): no progress display.

    Returns:
        dict: what each member did that came to its end, by name; and what kept the others from it.

    Raises:
        ValueError: ``max_images`` is less than one scene of every member, a batch has another shape than the others',
            or the network mixes scenes, draws random numbers or gives outputs that cannot be told apart by scene.
        SystemExit: stopped by a signal; every member has a checkpoint.
    """
    config = _share_of(config, len(members))
    failures: dict[str, Exception] = {}
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_requests())
        pool = stack.enter_context(ThreadPoolExecutor(1, "batch"))
        going = _Going(members, config, stack, failures, pool, stop)
        chosen = stack.enter_context(joined(network, [member.model for member in members]))
        set_modes(network)
        progress = None if quiet else stack.enter_context(Progress(label, config.steps, initial=going.step))
        step = JointStep(network, members, config, chosen)
        if going.step < config.steps:
            images = f"{config.images_per_step} images of each of {len(going.runs)} data sets"
            logger.info(f"{label}: step {going.step + 1} of {config.steps} begins, {images}")
        while going.step < config.steps:
            note = going.advance(step)
            if progress is not None:
                progress.advance(going.step - progress.done, note=note)
            if going.stopping:
                logger.warning(f"\nstopped after step {going.step}; the same command continues")
                raise SystemExit(128 + stop[0])
        return {members[i].name: run.result() for i, run in going.runs.items()}, failures


def _share_of(config: TrainConfig, count: int) -> TrainConfig:
    share = config.max_images // count
    if config.max_images and share < config.frames[1]:
        raise ValueError(
            f"max_images must be 0 or at least {count * config.frames[1]}, one scene of {config.frames[1]} frames for "
            f"each of {count} adapters, got {config.max_images}"
        )
    return dataclasses.replace(config, max_images=share)


class _Going:
    """The runs that have not failed, and the batches drawn ahead for them."""

    def __init__(
        self,
        members: Sequence[Member],
        config: TrainConfig,
        stack: contextlib.ExitStack,
        failures: dict[str, Exception],
        pool: ThreadPoolExecutor,
        stop: list[signal.Signals],
    ) -> None:
        self.members, self.config, self.failures, self.pool, self.stop = members, config, failures, pool, stop
        self.device = choose_device(config.device)
        self.stopping = False
        self.runs: dict[int, Run] = {}
        self._random = [member.random for member in members]
        self._drawn: dict[int, Future[StepData]] = {}
        self._open = [stack.enter_context(contextlib.ExitStack()) for _ in members]
        for index in range(len(members)):
            with self._left_behind(index):
                self._begin(index)

    @property
    def step(self) -> int:
        """The least number of steps that a run has done; the length of the run where none is left."""
        return min((run.step for run in self.runs.values()), default=self.config.steps)

    def advance(self, step: JointStep) -> str:
        """One step of the runs that have done the fewest; returns the note for the progress display."""
        data: dict[int, StepData] = {}
        least = self.step
        for index in [index for index, run in self.runs.items() if run.step == least]:
            with self._left_behind(index):
                data[index] = self._take(index)
        if not data:
            return ""
        terms = step.gradients(data)
        # one that comes later waits for the next step; runs that are ahead are at their checkpoints
        self.stopping = bool(self.stop)
        losses = []
        for index, run in [(index, self.runs[index]) for index in data]:
            with self._left_behind(index):
                losses.append(run.apply(terms[index], data[index].images))
                if run.step % self.config.save_every == 0 or run.step == self.config.steps or self.stopping:
                    with self._random_state(index):
                        run.save()
        if not self.runs:
            return ""
        memory = max(run.memory() for run in self.runs.values()) / 2**30
        speed = sum(run.speed for run in self.runs.values())
        return f"loss {' '.join(losses)}, {speed:.1f} images/s, {memory:.2f} GiB"

    def _begin(self, index: int) -> None:
        member = self.members[index]
        parameters = prepare(member.model, self.config, self.device)
        out = outputs.claim(member.out, outputs.RUN, "out")
        self._open[index].enter_context(exclusive(out))
        run = Run(
            member.model,
            parameters,
            new_optimizer(parameters, self.config),
            self.config,
            out,
            self.device,
            Processes(),
            member.settings,
            snapshot=member.snapshot,
        )
        with self._random_state(index):
            run.start(resume=True)
        run.trackers = open_trackers(self.config.trackers, out, run.step, member.name, run.settings)
        for tracker in run.trackers:
            self._open[index].callback(tracker.close)
        self.runs[index] = run
        self._draw(index)

    def _draw(self, index: int) -> None:
        step = self.runs[index].step + (index in self._drawn)
        self._drawn.pop(index, None)
        if step < self.config.steps:
            dataset = self.members[index].dataset
            self._drawn[index] = self.pool.submit(draw_step, dataset, self.config, step, Processes())

    def _take(self, index: int) -> StepData:
        data = self._drawn[index].result()
        self._draw(index)
        return data

    @contextlib.contextmanager
    def _random_state(self, index: int) -> Iterator[None]:
        """The generator as it would be in a run of this member's own."""
        before = random_state(self.device)
        set_random_state(self._random[index], self.device)
        try:
            yield
        finally:
            self._random[index] = random_state(self.device)
            set_random_state(before, self.device)

    @contextlib.contextmanager
    def _left_behind(self, index: int) -> Iterator[None]:
        """An exception in it ends this run alone."""
        try:
            yield
        except Exception as error:
            self.failures[self.members[index].name] = error
            self.runs.pop(index, None)
            self._drawn.pop(index, None)
            self._open[index].close()


class JointStep:
    """Gradients of one step of several runs; the first one also shows that the network keeps them apart."""

    def __init__(self, network: nn.Module, members: Sequence[Member], config: TrainConfig, chosen: list[int]) -> None:
        self.network, self.members, self.config, self.chosen = network, members, config, chosen
        self.device, self.backbone = choose_device(config.device), backbone_of(network)
        self._trained = [list(trainable_parameters(member.model).values()) for member in members]
        self._shown = len(members) == 1

    def gradients(self, data: Mapping[int, StepData]) -> dict[int, dict[str, float]]:
        """Leave the gradients of their own loss in the parameters of these members; returns the terms, summed.

        Raises:
            ValueError: see `train_together`.
        """
        self._check_shapes(data)
        self.chosen[:] = list(data)
        totals: dict[int, Terms] = {index: {} for index in data}
        for index in data:
            for parameter in self._trained[index]:
                parameter.grad = None
        for parts in zip(*(each.parts for each in data.values()), strict=True):
            terms = self._terms(dict(zip(data, parts)), data)
            if not self._shown:
                self._check_apart(terms)
            torch.stack([each["loss"] for each in terms.values()]).sum().backward()
            for index, each in terms.items():
                for name, term in each.items():
                    totals[index][name] = totals[index].get(name, 0.0) + term.detach().double()
        return {index: dict(zip(each, torch.stack(list(each.values())).tolist())) for index, each in totals.items()}

    def _check_shapes(self, data: Mapping[int, StepData]) -> None:
        shapes = {index: [tuple(part["images"].shape) for part in each.parts] for index, each in data.items()}
        if any(found != next(iter(shapes.values())) for found in shapes.values()):
            different = ", ".join(f"{self.members[index].name} {found}" for index, found in shapes.items())
            raise ValueError(f"together must be 1 for data sets whose batches differ in shape, got {different}")

    def _terms(self, parts: Mapping[int, dict], data: Mapping[int, StepData]) -> dict[int, Terms]:
        batches = {index: moved(part, self.device) for index, part in parts.items()}
        before = random_state(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            predicted = self.backbone.predict(self.network, torch.cat([batch["images"] for batch in batches.values()]))
        if not all(torch.equal(state, before[name]) for name, state in random_state(self.device).items()):
            raise ValueError(f"together must be 1 on {self.backbone.name}: its forward pass draws random numbers")
        shares = _shares(predicted, len(batches), self.backbone)
        weight = self.config.camera_weight
        return {
            index: self.backbone.loss(mine, batch, weight, data[index].counts)
            for (index, batch), mine in zip(batches.items(), shares, strict=True)
        }

    def _check_apart(self, terms: Mapping[int, Terms]) -> None:
        """The first loss must have no gradient by the factors of the other members."""
        if len(terms) < 2 or not all(torch.isfinite(each["loss"]) for each in terms.values()):
            return
        first, *others = terms
        # lora_A has none while lora_B is zero
        watched = [parameter for index in others for parameter in self._trained[index]]
        found = torch.autograd.grad(terms[first]["loss"], watched, retain_graph=True, allow_unused=True)
        if any(gradient is not None and gradient.any() for gradient in found):
            raise ValueError(
                f"together must be 1 on {self.backbone.name}: it does not keep the scenes of a batch one after the "
                "other, so that a scene passes through the adapter of another data set"
            )
        self._shown = True


def _shares(prediction: Prediction, count: int, backbone: Backbone) -> list[Prediction]:
    """The prediction of each of ``count`` equal shares of the scenes."""

    def split(tensor: torch.Tensor | None) -> Sequence[Any]:
        return [None] * count if tensor is None else tensor.unflatten(0, (count, -1)).unbind()

    stages = [split(stage) for stage in prediction.stages]
    names = [field.name for field in dataclasses.fields(Prediction) if field.name not in ("stages", "outputs")]
    parts = {name: split(getattr(prediction, name)) for name in names}
    shares = [
        Prediction(**{name: parts[name][i] for name in names}, stages=tuple(stage[i] for stage in stages))
        for i in range(count)
    ]
    if type(backbone).loss is Backbone.loss:
        return shares
    tensors = (*(getattr(prediction, name) for name in names), *prediction.stages)
    scenes = next(len(tensor) for tensor in tensors if tensor is not None)

    def share_of(leaf: Any, index: int) -> Any:
        if not torch.is_tensor(leaf):
            return leaf
        if leaf.ndim == 0 or len(leaf) != scenes:
            raise ValueError(
                f"together must be 1 on {backbone.name}: its loss looks at outputs of shape {tuple(leaf.shape)}, whose "
                f"first axis is not that of the {scenes} scenes"
            )
        return split(leaf)[index]

    return [
        dataclasses.replace(share, outputs=tree_map(lambda leaf, i=i: share_of(leaf, i), prediction.outputs))
        for i, share in enumerate(shares)
    ]
