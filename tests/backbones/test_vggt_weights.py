"""Weights on disk: round trips, published checkpoints with more parts, and files that do not fit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from subspace3d.backbones import build_vggt, vggt
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
