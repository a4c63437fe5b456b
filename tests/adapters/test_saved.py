"""A tuned adapter is loaded through a configuration made here: the file's is checked, no hub is asked."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz.readers import READERS

from subspace3d.files import sha256
from subspace3d.formats.run import read_tuned

KINDS = ("lora", "adalora", "subspace")


def _make(folder: Path, kind: str) -> Path:
    READERS[f"tuned {kind}, configuration"].make(folder)
    return folder / "adapter/adapter_config.json"


def _attach(folder: Path, kind: str) -> torch.nn.Module:
    return READERS[f"tuned {kind}, configuration"].read(folder)  # type: ignore[return-value]


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_saved_is_attached_without_a_network(tmp_path, monkeypatch, kind):
    path = _make(tmp_path, kind)
    weights = READERS["tuned lora, weights"]
    assert weights.target == "adapter/adapter_model.safetensors"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "socket", None)  # nothing can be connected to
    model = _attach(Path(), kind)
    stored = json.loads(path.read_text())
    config = model.peft_config["default"]
    assert config.peft_type == stored["peft_type"] and config.lora_alpha == stored["lora_alpha"]
    assert not any(parameter.requires_grad for parameter in model.parameters())
    (tmp_path / "adapter/adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        _attach(Path(), kind)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("lora", {"peft_type": "ADALORA"}, "peft_type must be 'LORA', got 'ADALORA'"),
        ("lora", {"lora_alpha": 40_000}, "lora_alpha must be 4 for lora, got 40000"),
        ("lora", {"lora_alpha": float("nan")}, "lora_alpha must be a positive number, got nan"),
        ("lora", {"r": 3}, "lora_alpha must be 6"),
        ("lora", {"r": 10**9}, "r must be"),
        ("lora", {"target_modules": "(f|fc|fc)*(?=x)"}, "target_modules must be a regular expression"),
        ("lora", {"target_modules": "(c|f|fc)*" * 30 + "x"}, "target_modules must match at least one full module name"),
        ("lora", {"target_modules": ["absent"]}, "target_modules must be modules of the backbone"),
        ("lora", {"rank_pattern": {"fc": 1}}, "rank_pattern and alpha_pattern must be empty"),
        ("lora", {"use_dora": True}, "use_dora must be False or off, got True"),
        ("lora", {"modules_to_save": ["fc"]}, "modules_to_save must be None or off"),
        ("lora", {"tomorrow": 1}, "tomorrow must be None or off"),
        ("lora", {"init_lora_weights": "pissa"}, "init_lora_weights must be True or off"),
        ("adalora", {"target_r": 1}, "lora_alpha must be 2"),
        ("adalora", {"rank_pattern": {"fc": [True]}}, r"rank_pattern must hold lists of 3"),
        ("subspace", {"scale": 2e4}, "scale must be 2.0"),
        ("subspace", {"basis_sha256": "0" * 64}, "must have the hash 0000"),
        ("subspace", {"plan": "x"}, "plan"),
        ("subspace", {"modules_to_save": ["heads"]}, "modules_to_save must be None or off"),
    ],
)
def test_configurations_that_no_method_writes_are_refused(tmp_path, kind, change: dict[str, Any], message):
    path = _make(tmp_path, kind)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        _attach(tmp_path, kind)


def test_a_basis_named_elsewhere_is_not_read(tmp_path):
    path = _make(tmp_path, "subspace")
    path.write_text(json.dumps({**json.loads(path.read_text()), "basis": "/dev/zero"}))
    assert _attach(tmp_path, "subspace").peft_config["default"].basis == str(tmp_path / "basis.safetensors")


def test_records_name_the_configuration_and_old_ones_need_not(tmp_path):
    path = _make(tmp_path, "lora")
    backbone = {"name": "vggt-nano", "weights": "shipped", "sha256": "", "seed": 0}
    weights = "adapter/adapter_model.safetensors"
    record = {"format": "subspace3d-tuned", "version": 2, "method": "lora", "backbone": backbone, "settings": {}}
    old = {**record, "files": {weights: sha256(tmp_path / weights)}}
    (tmp_path / "tuned.json").write_text(json.dumps(old))
    read_tuned(tmp_path)
    new = {**old, "files": {**old["files"], "adapter/adapter_config.json": sha256(path)}}
    (tmp_path / "tuned.json").write_text(json.dumps(new))
    read_tuned(tmp_path)
    path.write_text(path.read_text().replace('"lora_alpha": 4', '"lora_alpha": 5'))
    with pytest.raises(ValueError, match=r"adapter_config\.json must have the sha256 in tuned\.json"):
        read_tuned(tmp_path)
    (tmp_path / "tuned.json").write_text(json.dumps({**record, "files": {}}))
    with pytest.raises(ValueError, match=r"files must name adapter/adapter_model\.safetensors"):
        read_tuned(tmp_path)
    (tmp_path / "tuned.json").write_text(json.dumps({**old, "backbone": {**backbone, "weights": "../w.safetensors"}}))
    with pytest.raises(ValueError, match=r"backbone\.weights must be random, shipped or an absolute path"):
        read_tuned(tmp_path)
