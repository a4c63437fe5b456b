"""All commands one after the other on a backbone, at the size of unit tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn
from training.plane_scenes import write_plane_scenes

from subspace3d.adapters.methods import apply_method
from subspace3d.backbones.find import backbone_of
from subspace3d.backbones.protocol import Prediction
from subspace3d.backbones.record import BackboneRecord, load_backbone
from subspace3d.cli import main
from subspace3d.commands.fit import DOES_NOT_FIT
from subspace3d.files import read_json
from subspace3d.formats.basis import load_basis
from subspace3d.training.tuned import load_tuned

_TRAIN = {"device": "cpu", "threads": "1", "images-per-step": "2", "warmup": "0", "seed": "3"}
TRAIN = [word for name, value in _TRAIN.items() for word in (f"--train.{name}", value)] + ["--train.frames", "2", "2"]


@dataclass(frozen=True)
class Ran:
    """What the commands left in ``folder``, and the losses of the fine-tuning's steps."""

    folder: Path
    name: str
    losses: list[float]

    def json(self, path: str) -> dict:
        return read_json(self.folder / path)

    def base(self) -> nn.Module:
        return load_backbone(BackboneRecord(**self.json("run/tuned/tuned.json")["backbone"])).eval()


def run_pipeline(
    name: str, folder: Path, weights: Sequence[str] = ("--weights", "random"), train: Sequence[str] = ()
) -> Ran:
    """adapt, adapt --gradient-only, mine, fit, finetune, evaluate and export with ``--backbone name``.

    Args:
        train: further flags of what is trained.
    """
    for index in range(2):
        write_plane_scenes(folder / f"scenes/texture/set_{index}", scenes=1, views=3, seed=index)
    scenes = ["--scenes", str(folder / "scenes/texture/set_0")]
    backbone = ["--backbone", name, *weights]
    tuned = ["--train.lr", "0.003", *TRAIN, *train]
    adapt = ["adapt", "--scenes", str(folder / "scenes"), *backbone, "--rank", "2", "--targets", "cores"]
    main([*adapt, "--out", str(folder / "adapters"), "--train.steps", "2", *tuned])
    main([*adapt, "--out", str(folder / "gradients"), "--gradient-only", "--gradient-steps", "2", *TRAIN])
    for source in ("adapters", "gradients"):
        out = str(folder / f"{source}.safetensors")
        main(["mine", "--adapters", str(folder / source / "texture"), "--out", out, "--k", "2"])
    subspaces = ["--subspaces", str(folder / "gradients.safetensors")]
    try:
        main(["fit", *scenes, *backbone, *subspaces, "--out", str(folder / "fit"), "--batches", "2", *TRAIN])
    except SystemExit as stop:
        assert stop.code == DOES_NOT_FIT
    finetune = ["finetune", *scenes, *backbone, *subspaces, "--rank", "2", "--out", str(folder / "run")]
    main([*finetune, "--train.steps", "12", *tuned])
    lines = (folder / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    evaluate = ["evaluate", *scenes, *backbone, "--tuned", str(folder / "run"), "--out", str(folder / "evaluation")]
    main([*evaluate, "--device", "cpu", "--frames", "2"])
    main(["export", str(folder / "run"), "--backbone", name])
    return Ran(folder, name, [json.loads(line)["loss"] for line in lines])


@torch.no_grad()
def predict(model: nn.Module, seed: int = 1, frames: int = 3) -> Prediction:
    size = 2 * backbone_of(model).patch_size
    images = torch.rand(1, frames, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return backbone_of(model)(model.eval(), images)


def tensors(prediction: Prediction) -> list[Tensor]:
    fields = (prediction.depth, prediction.confidence, prediction.extrinsics, prediction.intrinsics)
    return [each for each in (*fields, *prediction.stages) if each is not None]


def difference(here: Prediction, there: Prediction) -> float:
    """Largest difference of any output, relative to the largest value of that output."""
    pairs = list(zip(tensors(here), tensors(there), strict=True))
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def check_pipeline(ran: Ran, licence: str) -> None:
    """What has to hold whatever the backbone: the loss falls, the start changes nothing, stock PEFT agrees."""
    first, last = sum(ran.losses[:3]), sum(ran.losses[-3:])
    assert last < first, ran.losses
    base, run = ran.base(), ran.folder / "run"
    basis = load_basis(run / "tuned/basis.safetensors")
    cores = apply_method(ran.base(), "subspace", rank=2, basis=basis, heads="frozen")
    assert difference(predict(cores), predict(base)) == 0
    # adding zeros to a convolution's output may change the order it is summed in
    assert difference(predict(apply_method(ran.base(), "subspace", rank=2, basis=basis)), predict(base)) < 1e-6
    tuned = load_tuned(run, backbone=ran.name)
    stock = PeftModel.from_pretrained(ran.base(), run / "export/lora")
    assert difference(predict(stock), predict(tuned)) < 1e-6
    assert difference(predict(tuned), predict(base)) > 1e-4
    # cores and heads were trained, and nothing of the pipeline fell back to VGGT's names
    counts = ran.json("run/tuned/tuned.json")["trainable"]
    assert set(counts) == {*backbone_of(base).parts.values(), "total"}
    for record in (
        ran.json("run/tuned/tuned.json")["backbone"],
        ran.json("adapters/texture/set_0/adapt.json")["backbone"],
        ran.json("gradients/texture/set_1/adapt.json")["backbone"],
        ran.json("evaluation/results.json")["backbone"],
    ):
        assert record["name"] == ran.name and record["licence"] == licence
