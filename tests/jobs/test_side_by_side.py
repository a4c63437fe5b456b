"""Commands side by side: what each prints, and what is said when one fails."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from subspace3d.jobs.side_by_side import Call, run_side_by_side
from subspace3d.log import logger


@dataclass(frozen=True)
class Settings:
    out: Path
    fails: bool = False


def write_threads(settings: Settings) -> None:
    import torch

    logger.info(f"writing {settings.out.name}")
    if settings.fails:
        raise ValueError("rank must be at least 1, got 0")
    settings.out.write_text(f"{torch.get_num_threads()} {os.environ['OMP_NUM_THREADS']} {os.getpid()}")


def test_each_has_a_process_with_one_thread_and_a_log(tmp_path: Path) -> None:
    calls = {name: Call(write_threads, Settings(tmp_path / name), tmp_path / f"logs/{name}.txt") for name in "ab"}
    run_side_by_side("finetune", calls, tmp_path)
    found = [(tmp_path / name).read_text().split() for name in "ab"]
    assert [entry[:2] for entry in found] == [["1", "1"]] * 2
    assert os.getpid() not in {int(entry[2]) for entry in found}
    assert [(tmp_path / f"logs/{name}.txt").read_text() for name in "ab"] == ["writing a\n", "writing b\n"]


def test_one_that_fails_is_named_and_the_others_are_done(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    calls = {
        name: Call(write_threads, Settings(tmp_path / name, name == "b"), tmp_path / f"{name}.txt") for name in "abc"
    }
    with pytest.raises(SystemExit) as end:
        run_side_by_side("finetune", calls, tmp_path)
    assert end.value.code == 1
    assert "b: rank must be at least 1, got 0" in caplog.text and "1 of 3 runs failed" in caplog.text
    assert (tmp_path / "a").exists() and (tmp_path / "c").exists()
