"""The whole pipeline from the command line on every wrapped backbone, with small networks in their packages' place."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from training.plane_scenes import plane_views, write_plane_scenes

from subspace3d.backbones.build import build_backbone
from subspace3d.backbones.protocol import Prediction, backbone_of, find_backbone
from subspace3d.cli import main
from subspace3d.commands.fit import DOES_NOT_FIT
from subspace3d.formats.adapter import read_adapter
from subspace3d.formats.basis import load_authors
from subspace3d.formats.subspace import load_subspace
from subspace3d.training.tuned import load_tuned

pytestmark = pytest.mark.usefixtures("other_packages")

BACKBONES = ("pi3", "pi3x", "vggt-omega", "mapanything-apache")


# half a minute each on a busy core: one of them always, the others with --slow
@pytest.fixture(params=["pi3", *(pytest.param(each, marks=pytest.mark.slow) for each in BACKBONES[1:])])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def _train(size: int, steps: int) -> list[str]:
    return (
        f"--train.steps {steps} --train.frames 2 3 --train.images-per-step 6 --train.image-size {size} "
        "--train.lr 1e-2 --train.device cpu --train.no-augment --train.save-every 100"
    ).split()


def _weights(name: str, folder: Path) -> Path:
    """A file of weights, as a user has it."""
    torch.manual_seed(3)
    folder.mkdir()
    model = build_backbone(name, "random")
    if name.startswith("mapanything"):
        (folder / "config.json").write_text(json.dumps({"dim": 16}))
    # of a tensor with two names safetensors keeps one
    parameters = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    path = folder / "model.safetensors"
    save_file({key: value.detach().clone() for key, value in parameters.items()}, path)
    return path


def _values(prediction: Prediction) -> list[torch.Tensor]:
    return [v for v in (prediction.depth, prediction.extrinsics, *prediction.stages) if v is not None]


def test_the_whole_pipeline(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from peft import PeftModel

    monkeypatch.chdir(tmp_path)
    backbone = find_backbone(name)
    size = 2 * backbone.patch_size
    for index, folder in enumerate("ab"):
        write_plane_scenes(tmp_path / "scenes" / folder, scenes=2, views=3, size=size, seed=index)
    weights = _weights(name, tmp_path / "weights")
    model = ["--backbone", name, "--weights", str(weights)]

    adapt = ["adapt", *model, "--scenes", "scenes", "--rank", "2", *_train(size, 3)]
    main([*adapt, "--out", "adapters/tuned"])
    main([*adapt, "--out", "adapters/gradient", "--gradient-only"])
    for source in ("tuned", "gradient"):
        adapter = read_adapter(tmp_path / "adapters" / source / "a")
        assert adapter.source == source and adapter.base_model.startswith(f"{name}@")
        main(["mine", f"adapters/{source}", "--k", "2", "--out", f"subspaces/{source}.safetensors"])
    subspace = load_subspace(tmp_path / "subspaces/gradient.safetensors")
    assert subspace.header["licence"] == [backbone.licence]
    try:
        main(["fit", *model, "--scenes", "scenes", "--subspaces", "subspaces", "--out", "fit", *_train(size, 1)])
    except SystemExit as end:
        assert end.code == DOES_NOT_FIT
    assert json.loads((tmp_path / "fit/fit.json").read_text())["K"] == 4

    finetune = ["finetune", *model, "--scenes", "scenes", "--subspaces", "subspaces", "--rank", "2", "--out", "run"]
    main([*finetune, *_train(size, 12)])
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])
    record = json.loads((tmp_path / "run/tuned/tuned.json").read_text())
    assert record["backbone"]["name"] == name and record["backbone"]["licence"] == backbone.licence
    assert record["K"] == 4 and set(record["trainable"]) - {"total"} <= set(backbone.parts.values())

    main(["evaluate", "--scenes", "scenes/a", "--tuned", "run", "--out", "evaluation", *model, "--frames", "3"])
    results = json.loads((tmp_path / "evaluation/results.json").read_text())
    assert results["backbone"]["lacks"] == dict(backbone.lacks)
    said = capsys.readouterr().out
    assert "next: subspace3d report" in said

    main(["export", "run"])
    tuned = load_tuned(tmp_path / "run")
    stock = PeftModel.from_pretrained(build_backbone(name, weights), tmp_path / "run/export/lora")
    images = torch.from_numpy(plane_views(9, 3, size)[0]).float().permute(0, 3, 1, 2)[None] / 255
    with torch.no_grad():
        ours, theirs = (backbone_of(each.eval())(each, images) for each in (tuned, stock))
        base = backbone(build_backbone(name, weights).eval(), images)
    for mine, other, untuned in zip(_values(ours), _values(theirs), _values(base)):
        scale = float(mine.abs().max())
        assert float((mine - other).abs().max()) <= 1e-6 * scale
        assert float((mine - untuned).abs().max()) > 1e-4 * scale

    if name.startswith("pi3"):
        main(["export", "run", "--to", "authors", "--out", "theirs.safetensors"])
        basis = load_authors(tmp_path / "theirs.safetensors")
        assert set(basis) == {f"decoder.{n}.{part}" for n in range(4) for part in _PARTS}


_PARTS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def test_random_weights_and_the_count_need_no_file(name: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    size = 2 * find_backbone(name).patch_size
    write_plane_scenes(tmp_path / "scenes", scenes=1, views=2, size=size)
    run = ["finetune", "--backbone", name, "--weights", "random", "--scenes", "scenes", "--method", "psv"]
    main([*run, "--core-size", "3", "--rank", "2", "--out", "run", *_train(size, 1)])
    trained = json.loads((tmp_path / "run/tuned/tuned.json").read_text())["trainable"]["total"]
    capsys.readouterr()
    main(["params", "--backbone", name, "--method", "psv", "--core-size", "3", "--rank", "2"])
    assert capsys.readouterr().out.startswith(f"{trained:,}")
