"""Damaged and hostile files: every reader gives a valid result or a documented error, whatever the file holds."""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path

import pytest
from fuzz.mutations import damaged_bytes, damaged_record
from fuzz.readers import READERS
from hypothesis import HealthCheck, Phase, given, settings

DOCUMENTED = (ValueError, FileNotFoundError)


@pytest.mark.parametrize("name", READERS)
def test_damage_gets_a_result_or_a_documented_error(name: str, fuzz_cases: int, count_case) -> None:
    reader = READERS[name]
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as scratch:
        folder = Path(scratch) / "input"
        folder.mkdir()
        reader.make(folder)
        reader.read(folder)  # what was made is valid
        target = folder / reader.target
        original = target.read_bytes()
        damaged = damaged_bytes(original)
        if reader.is_record:
            damaged = damaged_record(json.loads(original)) | damaged

        @settings(
            max_examples=max(1, round(reader.share * fuzz_cases)),
            derandomize=fuzz_cases <= DEFAULT_CASES,
            database=None,
            deadline=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        @given(damaged)
        def attack(content: bytes) -> None:
            # written anew: what was read before may still be mapped
            target.unlink()
            target.write_bytes(content)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    reader.read(folder)
                except DOCUMENTED as error:
                    assert str(error)
                    count_case("refused by name")
                else:
                    count_case("read")

        attack()


DEFAULT_CASES = 100
