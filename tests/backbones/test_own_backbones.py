"""What of a user's own backbone can be seen to be wrong is refused by name, or warned about."""

from __future__ import annotations

import dataclasses
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from subspace3d.backbones.find import find_backbone
from subspace3d.backbones.protocol import Backbone, Prediction
from subspace3d.backbones.record import UNKNOWN, BackboneRecord, load_backbone, record_backbone
from subspace3d.evaluation.evaluate import _licences, _warn_of_inverted_poses
from subspace3d.evaluation.scene_metrics import Views
from subspace3d.files import save_tensors, write_json
from subspace3d.formats.run import FORMAT, VERSION

SOURCE = """
    import torch
    from torch import nn
    from subspace3d.backbones.protocol import Backbone

    made = []

    class Good(Backbone):
        targets = {"cores": "0", "heads": "1", "all": "0|1"}
        frozen = ("1",)
        parts = {"0": "body"}

        def __init__(self):
            made.append(self)

        def network(self):
            return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

    class Expression(Good):
        targets = {**Good.targets, "all": "("}

    class Blocks(Good):
        blocks = "[0"

    class Frozen(Good):
        frozen = "encoder"

    class Scale(Good):
        scale = "metres"

    class Frame(Good):
        frame = "second"

    class Lacks(Good):
        lacks = {"poses": "missing"}

    class Size(Good):
        image_size = 28.0

    class Frames(Good):
        frames = 2

    class Idle(Good):
        frozen = ("1", "encoder", "1.weights")
        parts = {"0": "body", "body": "body"}

    class Half(Good):
        def network(self):
            return Good.network(self).bfloat16()

    class Sets(Good):
        def network(self):
            torch.set_grad_enabled(False)
            torch.set_default_dtype(torch.float64)
            return Good.network(self).float()

    class Nothing(Good):
        def load(self, path):
            return None
"""
MODULE = "backbones_to_be_checked"


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"{MODULE}.py").write_text(textwrap.dedent(SOURCE), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, MODULE, raising=False)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Expression", r"targets\['all'\] of .* must be a regular expression, '\('"),
        ("Blocks", r"blocks of .* must be a regular expression"),
        ("Frozen", r"frozen of .* must be a tuple of names, got 'encoder'"),
        ("Scale", r"scale of .* must be one of scene, metric, free, got 'metres'"),
        ("Frame", r"frame of .* must be one of first, free, got 'second'"),
        ("Lacks", r"lacks of .* must name some of depth, .*, got 'poses'"),
        ("Size", r"image_size of .* must be a positive whole number, got 28\.0"),
        ("Frames", r"frames of .* must be the least and the most, \(1, None\), got 2"),
    ],
)
def test_attributes_of_another_kind_are_named(own: None, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_backbone(f"{MODULE}:{name}")


def test_a_factory_is_called_once(own: None) -> None:
    import importlib

    for _ in range(3):
        find_backbone(f"{MODULE}:Good").build("random")
    assert len(importlib.import_module(MODULE).made) == 1


def test_names_that_the_network_does_not_have_are_told(own: None, caplog: pytest.LogCaptureFixture) -> None:
    find_backbone(f"{MODULE}:Good").build("random")
    assert not caplog.text
    find_backbone(f"{MODULE}:Idle").build("random")
    assert "no name in the network begins with encoder, 1.weights" in caplog.text
    assert f"parts of {MODULE}:Idle: no name in the network begins with body" in caplog.text
    find_backbone(f"{MODULE}:Idle").build("random")
    assert caplog.text.count("begins with body") == 1


def test_a_network_is_float32_and_a_module(own: None, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"network of .*:Half must give float32, 0\.weight is torch\.bfloat16"):
        find_backbone(f"{MODULE}:Half").build("random")
    with pytest.raises(ValueError, match=r"load of .*:Nothing must return a torch\.nn\.Module, got NoneType"):
        find_backbone(f"{MODULE}:Nothing").build(tmp_path / "any")


def test_what_is_set_for_the_whole_process_is_taken_back(own: None, caplog: pytest.LogCaptureFixture) -> None:
    find_backbone(f"{MODULE}:Sets").build("random")
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
    assert "Sets set gradients off and the default type torch.float64 for the whole process" in caplog.text


class Said(Backbone):
    """Says what it is given, of whatever network."""

    name = "own:Said"

    def __init__(self, **fields: torch.Tensor) -> None:
        self.fields = fields

    def __call__(self, model: nn.Module, images: torch.Tensor) -> Prediction:
        return Prediction(**self.fields)  # type: ignore[arg-type]


def _intrinsics(width: float, height: float) -> torch.Tensor:
    return torch.tensor([[width, 0, width / 2], [0, height, height / 2], [0, 0, 1]]).expand(1, 2, 3, 3)


def test_types_and_devices_of_fields() -> None:
    images, depth = torch.zeros(1, 2, 3, 4, 6), torch.ones(1, 2, 4, 6)
    for wrong, got in (
        (depth.long(), r"torch\.int64 on cpu"),
        (depth.bool(), r"torch\.bool on cpu"),
        (depth.to("meta"), r"torch\.float32 on meta"),
    ):
        with pytest.raises(ValueError, match=rf"depth of .* must be floating and on cpu, .* got {got}"):
            Said(depth=wrong).predict(nn.Identity(), images)
    with pytest.raises(ValueError, match=r"depth of .* must be a tensor .* got ndarray"):
        Said(depth=depth.numpy()).predict(nn.Identity(), images)  # type: ignore[arg-type]
    for kind in (torch.float16, torch.float64):
        assert Said(depth=depth.to(kind)).predict(nn.Identity(), images).depth is not None


def test_intrinsics_are_in_pixels() -> None:
    images = torch.zeros(1, 2, 3, 28, 42)
    pixels = _intrinsics(42, 28)
    assert Said(intrinsics=pixels).predict(nn.Identity(), images).intrinsics is pixels
    for wrong in (_intrinsics(1, 1), _intrinsics(2, 2), pixels * torch.tensor([1.0, 1, 0])):
        with pytest.raises(ValueError, match=r"intrinsics of .* must be in pixels .* if they are normalised"):
            Said(intrinsics=wrong).predict(nn.Identity(), images)
    # a traced step has no values to look at
    with FakeTensorMode() as fake:
        traced = Said(intrinsics=fake.from_tensor(_intrinsics(1, 1)))
        assert traced.predict(nn.Identity(), fake.from_tensor(images)).intrinsics is not None
    # looking waits for the device: it ends with the first prediction that is right
    said = Said(intrinsics=_intrinsics(1, 1))
    for _ in range(2):
        with pytest.raises(ValueError, match="must be in pixels"):
            said.predict(nn.Identity(), images)
    said.fields = {"intrinsics": pixels}
    said.predict(nn.Identity(), images)
    said.fields = {"intrinsics": _intrinsics(1, 1)}
    said.predict(nn.Identity(), images)


def test_a_network_that_is_trained_keeps_its_graph() -> None:
    images, depth, network = torch.zeros(1, 2, 3, 4, 6), torch.ones(1, 2, 4, 6), nn.Linear(1, 1)
    with pytest.raises(ValueError, match="__call__ of own:Said must keep the graph of what it predicts"):
        Said(depth=depth).predict(network, images)
    graph = depth.clone().requires_grad_()
    assert Said(depth=depth, confidence=graph).predict(network, images).confidence is graph
    with torch.no_grad():
        Said(depth=depth).predict(network, images)
    Said(depth=depth).predict(network.requires_grad_(False), images)


def test_poses_from_camera_to_world_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """Three cameras, 20 degrees apart about the vertical."""
    poses = np.zeros((3, 3, 4))
    for index, angle in enumerate(np.radians([0, 20, 40])):
        cos, sin = np.cos(angle), np.sin(angle)
        poses[index, :, :3] = [[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]]
    true = Views(np.ones((3, 2, 2)), None, poses)
    _warn_of_inverted_poses("own:Said", "room", true, true)
    _warn_of_inverted_poses("own:Said", "room", dataclasses.replace(true, extrinsics=None), true)
    assert not caplog.text
    inverted = np.concatenate([poses[..., :3].swapaxes(1, 2), poses[..., 3:]], -1)
    _warn_of_inverted_poses("own:Said", "room", dataclasses.replace(true, extrinsics=inverted), true)
    # pairs are 20, 40 and 20 degrees apart, and as far the other way
    assert "rotations of own:Said are 53 degrees off in room, inverted ones 0: extrinsics must be" in caplog.text


def test_the_licence_is_asked_for_where_it_is_written_and_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, name = tmp_path / "model.safetensors", "backbones.unlicensed:Unlicensed"
    save_tensors(file, {"w": torch.zeros(1)})
    assert record_backbone(name, file, licence=UNKNOWN).licence == UNKNOWN and not caplog.text
    for weights in (file, None):
        caplog.clear()
        record = record_backbone(name, weights)
        assert record.licence == UNKNOWN and caplog.text.count("--licence names it") == 1
        with pytest.raises(ValueError):
            load_backbone(record)  # there is no network; the licence is not asked for again
        assert caplog.text.count("--licence names it") == 1
    # an evaluation takes that of the runs it measures
    caplog.clear()
    digest = record_backbone(name, file, licence=UNKNOWN).sha256
    for run, licence in (("a", "our-terms"), ("b", UNKNOWN)):
        tuned = {"format": FORMAT, "version": VERSION, "method": "none", "settings": {}, "files": {}}
        backbone = BackboneRecord(name, str(file), digest, licence=licence).to_dict()
        write_json(tmp_path / run / "tuned/tuned.json", {**tuned, "backbone": backbone})
    licences = _licences({"base": None, "a": tmp_path / "a", "b": tmp_path / "b"})
    assert licences == {digest: "our-terms"}
    assert record_backbone(name, file, licences=licences).licence == "our-terms" and not caplog.text
    assert record_backbone(name, file, licence="given", licences=licences).licence == "given"
