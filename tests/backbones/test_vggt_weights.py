"""Weights on disk: round trips, published checkpoints with more parts, and files that do not fit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from subspace3d.backbones import build_vggt, vggt
from subspace3d.backbones.record import record_backbone
from subspace3d.backbones.torch_weights import read_state_dict
from subspace3d.backbones.vggt import VGGT
from subspace3d.backbones.weights import load_weights, save_weights


def same_weights(first: VGGT, second: VGGT) -> bool:
    other = second.state_dict()
    return all(torch.equal(tensor, other[name]) for name, tensor in first.state_dict().items())


def test_safetensors_round_trip(tiny: VGGT, tmp_path: Path) -> None:
    path = tmp_path / "tiny.safetensors"
    save_weights(tiny, path)
    other = VGGT(tiny.config)
    assert not same_weights(tiny, other)
    summary = load_weights(other, path)
    assert (summary.loaded, summary.ignored) == (len(tiny.state_dict()), {})
    assert same_weights(tiny, other)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_point_and_track_heads_are_left_aside(tiny: VGGT, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    extra = {f"point_head.{index}": torch.zeros(1) for index in range(3)} | {"track_head.tracker.weight": torch.ones(2)}
    state = {name: tensor.clone() for name, tensor in tiny.state_dict().items()} | extra
    if suffix == ".pt":
        torch.save(state, path)
    else:
        save_file(state, path)
    other = VGGT(tiny.config)
    assert load_weights(other, path).ignored == {"point_head": 3, "track_head": 1}
    assert same_weights(tiny, other)


def test_model_without_storage_gets_its_own(tiny: VGGT, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(tiny.state_dict(), path)
    with torch.device("meta"):
        other = VGGT(tiny.config)
    load_weights(other, path)
    assert same_weights(tiny, other)
    trained = {name for name, parameter in other.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in tiny.named_parameters() if parameter.requires_grad}
    before = path.read_bytes()
    with torch.no_grad():
        other.camera_head.embed_pose.weight.add_(1)
    assert path.read_bytes() == before


def test_half_precision_file_loads_into_float32(tmp_path: Path) -> None:
    nano = build_vggt("vggt-nano", weights="random")
    path = tmp_path / "nano.safetensors"
    save_weights(nano, path, torch.float16)
    assert path.stat().st_size < 20e6
    loaded = build_vggt("vggt-nano", weights=path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    expected = nano.get_parameter("camera_head.embed_pose.weight").half().float()
    assert torch.equal(loaded.get_parameter("camera_head.embed_pose.weight"), expected)
    images = torch.rand(1, 1, 3, 56, 56)
    torch.testing.assert_close(loaded(images)["depth"], nano(images)["depth"], rtol=1e-2, atol=0)


def test_weights_that_overflow_are_not_written(tiny: VGGT, tmp_path: Path) -> None:
    with torch.no_grad():
        tiny.camera_head.embed_pose.bias[0] = 1e5
    with pytest.raises(ValueError, match=r"finite as torch.float16, camera_head.embed_pose.bias"):
        save_weights(tiny, tmp_path / "tiny.safetensors", torch.float16)
    assert list(tmp_path.iterdir()) == []


def test_names_and_shapes_must_fit(tiny: VGGT, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    state = tiny.state_dict()
    state["decoder.weight"] = torch.zeros(1)
    del state["camera_head.token_norm.bias"]
    state["depth_head.norm.weight"] = torch.zeros(3)
    torch.save(state, path)
    other = VGGT(tiny.config)
    before = other.aggregator.camera_token.clone()
    with pytest.raises(ValueError) as error:
        load_weights(other, path)
    for part in (
        str(path),
        "1 missing (camera_head.token_norm.bias)",
        "1 unexpected (decoder.weight)",
        "depth_head.norm.weight (3,) instead of (64,)",
    ):
        assert part in str(error.value)
    assert torch.equal(other.aggregator.camera_token, before)


def test_long_lists_of_names_are_cut(tiny: VGGT, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"missing \([^)]*, \.\.\.\)"):
        load_weights(tiny, path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_truncated_and_foreign_files_are_refused(tiny: VGGT, tmp_path: Path, suffix: str) -> None:
    whole = tmp_path / f"whole{suffix}"
    if suffix == ".pt":
        torch.save(tiny.state_dict(), whole)
    else:
        save_weights(tiny, whole)
    content = whole.read_bytes()
    for name, damaged in {"cut": content[: len(content) // 2], "text": b"not weights", "empty": b""}.items():
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=path.name):
            load_weights(tiny, path)


def test_code_in_a_file_is_not_run(tiny: VGGT, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"weight": Path("anything")}, path)
    with pytest.raises(ValueError, match=r"model\.pt"):
        load_weights(tiny, path)
    torch.save([torch.zeros(1)], path)
    with pytest.raises(ValueError, match="plain state dict"):
        load_weights(tiny, path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_taken_off_with_a_word(tiny: VGGT, tmp_path: Path, capsys, suffix, prefix) -> None:
    state = {f"{prefix}{name}": tensor.clone() for name, tensor in tiny.state_dict().items()}
    path = tmp_path / f"w{suffix}"
    torch.save(state, path) if suffix == ".pt" else save_file(state, path)
    other = VGGT(tiny.config)
    load_weights(other, path)
    assert all(torch.equal(value, tiny.state_dict()[name]) for name, value in other.state_dict().items())
    assert capsys.readouterr().out.count("was taken off every name") == prefix.count(".")


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict"])
def test_a_state_dict_beside_other_things_is_found_with_a_word(tiny: VGGT, tmp_path: Path, capsys, key: str) -> None:
    torch.save({key: tiny.state_dict(), "epoch": 3, "losses": [1.0]}, tmp_path / "w.pt")
    other = VGGT(tiny.config)
    load_weights(other, tmp_path / "w.pt")
    assert all(torch.equal(value, tiny.state_dict()[name]) for name, value in other.state_dict().items())
    assert f"the weights are those under {key!r}; beside them: epoch, losses" in capsys.readouterr().out
    torch.save({"weights of mine": tiny.state_dict()}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"alone or under model or state_dict.*'weights of mine' is a dict"):
        load_weights(other, tmp_path / "w.pt")


def test_a_checkpoint_of_the_reference_trainer_is_read(tiny: VGGT, tmp_path: Path, capsys) -> None:
    """What its save_checkpoint writes under DDP, optimizer and scaler included."""
    small = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(small.parameters(), lr=1e-4)
    small(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    checkpoint = {
        "prev_epoch": 3,
        "steps": {"train": 7, "val": 0},
        "time_elapsed": 12.5,
        "optimizer": [optimizer.state_dict()],
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
        "model": {f"module.{name}": tensor for name, tensor in tiny.state_dict().items()},
    }
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    other = VGGT(tiny.config)
    load_weights(other, tmp_path / "checkpoint.pt")
    assert all(torch.equal(value, tiny.state_dict()[name]) for name, value in other.state_dict().items())
    said = capsys.readouterr().out
    assert "the weights are those under 'model'; beside them: optimizer, prev_epoch, scaler, steps" in said
    assert "the wrapper's prefix 'module.' was taken off every name" in said


def test_a_compiled_part_is_unwrapped_and_two_tensors_of_one_name_are_refused(tiny, tmp_path: Path, capsys) -> None:
    part = "aggregator."
    state = {name.replace(part, part + "_orig_mod.", 1): tensor.clone() for name, tensor in tiny.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    other = VGGT(tiny.config)
    load_weights(other, tmp_path / "w.safetensors")
    assert all(torch.equal(value, tiny.state_dict()[name]) for name, value in other.state_dict().items())
    wrapped = sum("_orig_mod" in name for name in state)
    assert f"prefix '_orig_mod.' was taken off {wrapped} of {len(state)} names" in capsys.readouterr().out
    name = "aggregator.camera_token"
    save_file({**state, name: tiny.state_dict()[name].clone()}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"names differ in the wrapper's prefix '_orig_mod\.' alone"):
        load_weights(other, tmp_path / "w.safetensors")


def test_views_shared_storages_and_types_are_read_exactly(tmp_path: Path) -> None:
    base = torch.arange(24.0)
    state = {
        "view": base[3:15].view(3, 4).T,
        "shared": base,
        "half": torch.ones(3, dtype=torch.bfloat16),
        "long": torch.tensor(7),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    torch.save(state, tmp_path / "w.pt")
    read = read_state_dict(tmp_path / "w.pt")
    assert list(read) == list(state)
    for name, tensor in state.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name


def test_weights_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "hub.safetensors")
    monkeypatch.setattr("subspace3d.backbones.vggt_preset.download_from_hub", lambda name: tmp_path / "hub.safetensors")
    record = record_backbone("vggt-1b", Path("hub"))
    assert record.weights == str(tmp_path / "hub.safetensors") and len(record.sha256) == 64
    assert record_backbone("vggt-1b", Path("random")).weights == "random"
    with pytest.raises(FileNotFoundError, match="no such file: absent; random and hub are taken too"):
        record_backbone("vggt-1b", Path("absent"))
    with pytest.raises(ValueError, match="must be a regular file, it is a device"):
        record_backbone("vggt-1b", Path("/dev/zero"))


def test_the_configuration_answers_as_a_dict_does(tiny: VGGT) -> None:
    """PEFT before 0.18 asks a model's config so."""
    assert tiny.config.get("name") == tiny.config.name and tiny.config.get("tie_word_embeddings", False) is False


def test_missing_files(tiny: VGGT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt"):
        load_weights(tiny, tmp_path / "nowhere.pt")
    with pytest.raises(ValueError, match=r"notes\.txt"):
        (tmp_path / "notes.txt").write_text("")
        load_weights(tiny, tmp_path / "notes.txt")
    monkeypatch.setattr(vggt, "NANO_WEIGHTS", tmp_path / "vggt_nano.safetensors")
    with pytest.raises(FileNotFoundError, match="make pretrain-nano"):
        build_vggt("vggt-nano")
    with pytest.raises(ValueError, match=r"huggingface.co/facebook/VGGT-1B.*non-commercial"):
        build_vggt("vggt-1b")
    with pytest.raises(ValueError, match="vggt-1b only"):
        build_vggt("vggt-nano", weights="hub")
