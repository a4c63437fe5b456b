from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch
from torch import nn

from subspace3d.files import DamagedError
from subspace3d.training import checkpoints


def _stepped(seed: int, steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.full((5, 3), step + 1.0)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def test_round_trip_continues_with_the_same_bits(tmp_path: Path) -> None:
    model, optimizer = _stepped(seed=1, steps=3)
    path = checkpoints.save(tmp_path, 3, dict(model.named_parameters()), optimizer, {"losses": [1.0]})
    other, other_optimizer = _stepped(seed=2, steps=0)
    checkpoints.load(path, dict(other.named_parameters()), other_optimizer)
    for _ in range(2):
        for each, its_optimizer in ((model, optimizer), (other, other_optimizer)):
            its_optimizer.zero_grad()
            each(torch.ones(5, 3)).square().sum().backward()
            its_optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    assert checkpoints.read_state(path) == {"step": 3, "losses": [1.0]}


def test_newest_two_are_kept_by_number(tmp_path: Path) -> None:
    model, optimizer = _stepped(seed=1, steps=1)
    for step in (2, 9, 10, 100):
        checkpoints.save(tmp_path, step, dict(model.named_parameters()), optimizer, {})
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step_10", "step_100"]
    latest = checkpoints.latest(tmp_path)
    assert latest is not None and latest.name == "step_100"
    assert checkpoints.latest(tmp_path / "absent") is None


def test_failed_save_leaves_the_last_one_whole(tmp_path: Path) -> None:
    model, optimizer = _stepped(seed=1, steps=1)
    parameters = dict(model.named_parameters())
    checkpoints.save(tmp_path, 1, parameters, optimizer, {})
    with pytest.raises(ValueError):
        checkpoints.save(tmp_path, 2, parameters, optimizer, {"loss": float("nan")})
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_1"]


def test_other_parameters_are_refused(tmp_path: Path) -> None:
    model, optimizer = _stepped(seed=1, steps=1)
    path = checkpoints.save(tmp_path, 1, dict(model.named_parameters()), optimizer, {})
    with pytest.raises(ValueError, match=r"2 differ, e\.g\. '1\.bias'"):
        checkpoints.load(path, dict(list(model.named_parameters())[:2]), optimizer)
    wider = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    with pytest.raises(ValueError, match=r"0.weight must have shape \(5, 3\), got \(4, 3\)"):
        checkpoints.load(path, dict(wider.named_parameters()), torch.optim.AdamW(wider.parameters()))


def test_file_that_cannot_be_written_leaves_the_last_one_whole(tmp_path: Path) -> None:
    model, optimizer = nn.Linear(200, 200), torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    checkpoints.save(tmp_path, 1, dict(model.named_parameters()), optimizer, {})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        # the kernel refuses the write in the middle of the file, as a full disk does
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        with pytest.raises(OSError, match=r"model\.safetensors could not be written"):
            checkpoints.save(tmp_path, 2, dict(model.named_parameters()), optimizer, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_1"]
    restored = nn.Linear(200, 200)
    checkpoints.load(tmp_path / "step_1", dict(restored.named_parameters()), optimizer)
    assert torch.equal(restored.weight, model.weight)


def test_what_a_kill_left_is_removed(tmp_path: Path) -> None:
    model, optimizer = _stepped(seed=1, steps=1)
    checkpoints.save(tmp_path, 1, dict(model.named_parameters()), optimizer, {})
    (tmp_path / ".step_2.s3d-abcdefgh.tmp").mkdir()
    (tmp_path / ".step_2.s3d-abcdefgh.tmp/model.safetensors").write_bytes(b"half")
    (tmp_path / ".step_of_mine").mkdir()
    checkpoints.remove_unfinished(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".step_of_mine", "step_1"]


def test_only_checkpoints_are_dropped_and_counted(tmp_path: Path) -> None:
    model, optimizer = _stepped(seed=1, steps=1)
    parameters = dict(model.named_parameters())
    (tmp_path / "step_99").mkdir()  # of a checkpoint that an earlier version was killed while dropping
    (tmp_path / "step_99/model.safetensors").write_bytes(b"half")
    checkpoints.save(tmp_path, 1, parameters, optimizer, {})
    (tmp_path / "step_1/notes.txt").write_text("mine")
    for step in (2, 3, 4):
        checkpoints.save(tmp_path, step, parameters, optimizer, {})
    assert [path.name for path in checkpoints.newest_first(tmp_path)] == ["step_4", "step_3", "step_1"]
    assert (tmp_path / "step_1/notes.txt").read_text() == "mine"
    with pytest.raises(ValueError, match=r"must hold nothing but checkpoints .* got .*step_99"):
        checkpoints.remove_all(tmp_path)
    assert (tmp_path / "step_3/state.json").is_file()


def test_what_a_killed_save_left_goes_with_the_checkpoints(tmp_path: Path) -> None:
    model, optimizer = _stepped(seed=1, steps=1)
    folder = tmp_path / "checkpoints"
    checkpoints.save(folder, 1, dict(model.named_parameters()), optimizer, {})
    (folder / ".step_2.s3d-abcdefgh.tmp/step_2").mkdir(parents=True)
    checkpoints.remove_all(folder)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": "3"}, "step must be at least 0"),
        ({"step": 4}, "step must be that of step_3, got 4"),
        ({"losses": [1.0, None]}, r"losses\[1\] must be a number"),
        ({"seconds": -1.0}, "seconds must be at least 0"),
        ({"settings": []}, "settings must be an object"),
        ({"images": 1.5}, "images must be at least 0"),
    ],
)
def test_a_state_of_other_types_is_damage(tmp_path, change, message):
    path = tmp_path / "step_3"
    path.mkdir()
    state = {"step": 3, "settings": {}, "losses": [1.0], "seconds": 2.0, "images": 6}
    (path / "state.json").write_text(json.dumps(state))
    assert checkpoints.read_state(path) == state
    (path / "state.json").write_text(json.dumps(state | change))
    with pytest.raises(DamagedError, match=message):
        checkpoints.read_state(path)
