"""SIGKILL at random moments of every stage: the same command then ends as if nothing had happened."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from faults.stages import COMMANDS, Reference, Server, check_whole, stages

SEED = 20260
FAST_KILLS, SLOW_KILLS = 2, 8  # per stage


def kill_and_finish(server: Server, reference: Reference, verb: str, kills: int, folder: Path, seed: int) -> int:
    """Start ``verb`` again and again until ``kills`` kills have met it alive, then to its end; returns their number.

    Half of the kills come after a random share of the time it takes, half at a random one of its file operations,
    where a fault does the most harm.
    """
    draw = random.Random(f"{seed} {verb}")
    usual = reference.outcome(verb)
    reference.start(verb, folder)
    moments, met = [], 0
    for number in range(8 * kills):
        if met == kills:
            break
        if number % 2:
            how = {"kill_at": draw.randint(1, usual.operations)}
        else:
            how = {"kill_after": draw.uniform(0, usual.seconds)}
        moments.append(how)
        outcome = server.run(verb, folder, **how)
        where = f"{verb}, seed {seed}, kills {moments}: {outcome.text}"
        assert outcome.code in (0, -9), where
        met += outcome.code == -9
        try:
            check_whole(folder)
        except Exception as error:
            raise AssertionError(f"partial file after {where}") from error
        if outcome.code == 0:
            # it was done before its time came
            reference.check(verb, folder)
            folder = reference.start(verb, folder.with_name(f"{folder.name}-{number}"))
    outcome = server.run(verb, folder)
    assert outcome.code == 0, f"{verb}, seed {seed}, kills {moments}: {outcome.text}"
    reference.check(verb, folder)
    return met


@pytest.mark.parametrize("verb", stages("mine", "finetune"))
def test_a_killed_stage_ends_as_an_undisturbed_one(
    server: Server, reference: Reference, verb: str, tmp_path: Path
) -> None:
    kill_and_finish(server, reference, verb, FAST_KILLS, tmp_path / "run", SEED)


@pytest.mark.slow  # minutes: 8 kills for each stage
def test_a_hundred_kills_and_more(
    server: Server, reference: Reference, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    met = {
        verb: kill_and_finish(server, reference, verb, SLOW_KILLS, tmp_path / verb, SEED + 1 + attempt)
        for attempt, verb in enumerate(COMMANDS)
    }
    with capsys.disabled():
        print(f"\nkills that met a stage at work: {met}, {sum(met.values())} in all")
    assert sum(met.values()) >= 100
