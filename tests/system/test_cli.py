"""The console script: help, errors, config files."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from subspace3d import cli, settings
from subspace3d.commands.finetune import FinetuneConfig
from subspace3d.commands.generate import GenerateConfig
from subspace3d.training.config import TrainConfig

SCRIPT = Path(sys.executable).with_name("subspace3d")


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


def test_help_answers_within_a_second_and_names_every_command():
    times = []
    for _ in range(3):
        # processor time of child processes, which does not depend on what else runs
        before = os.times()
        answer = call("--help")
        after = os.times()
        times.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert answer.returncode == 0
    assert all(f"  {command} " in answer.stdout for command in cli.COMMANDS)
    assert min(times) < 1.0


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_each_command_states_units_and_defaults(command):
    answer = call(command, "--help")
    assert answer.returncode == 0
    assert "(default:" in answer.stdout or "(required)" in answer.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train"], ["command must be one of", "'train'"]),
        (["generate", "--out", "x", "--views", "0"], ["views", "at least 1", "0"]),
        (["mine", "--config", "/nonexistent.yaml"], ["config", "/nonexistent.yaml"]),
        (["report", "--run", "/nonexistent"], ["/nonexistent"]),
        (["doctor", "--foo"], ["subspace3d doctor: error: Unrecognized options: --foo (see"]),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(arguments, words):
    answer = call(*arguments)
    assert answer.returncode == 2
    assert len(answer.stderr.strip().splitlines()) == 1, answer.stderr
    assert all(word in answer.stderr for word in words)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--method", "psv"], "core_size must be at least 1 for the method psv, got 0"),
        (["--train.steps", "-3"], "train: steps must be at least 1, got -3"),
        (["--method", "lara"], "invalid choice 'lara' for argument '--method'. Expected one of ('none',"),
        (["--train.steps", "x"], "--train.steps: invalid literal for int() with base 10: 'x'; --train.steps INT"),
    ],
)
def test_a_wrong_setting_is_told_without_the_words_of_the_parser(arguments, line, capsys):
    with pytest.raises(SystemExit):
        cli.main(["finetune", "--scenes", "x", "--out", "y", *arguments])
    assert capsys.readouterr().err.startswith(f"subspace3d finetune: error: {line}")


def test_settings_round_trip_through_yaml(tmp_path):
    config = FinetuneConfig(
        scenes=Path("a"), out=Path("b"), subspaces=(Path("x"), Path("y")), train=TrainConfig(steps=7, lr=3e-4)
    )
    settings.save(tmp_path / "run.yaml", config, seed=3)
    assert cli.parse("finetune", FinetuneConfig, ["--config", str(tmp_path / "run.yaml")]) == config


def test_flags_override_the_config_file(tmp_path):
    (tmp_path / "run.toml").write_text('out = "scenes"\nviews = 5\nspp = 8\n')
    config = cli.parse("generate", GenerateConfig, ["--views", "9", f"--config={tmp_path / 'run.toml'}"])
    assert (config.out, config.views, config.spp) == (Path("scenes"), 9, 8)


@pytest.mark.parametrize(
    ("text", "words"),
    [("outt: x\n", "unknown keys ['outt']"), ("- 1\n", "must hold a table"), ("a: [\n", "cannot be read")],
)
def test_a_wrong_config_file_is_named(tmp_path, text, words):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"run\.yaml") as error:
        settings.flags(path, GenerateConfig)
    assert words in str(error.value)


def test_doctor_says_what_this_machine_has():
    answer = call("doctor")
    assert answer.returncode == 0, answer.stderr
    assert all(word in answer.stdout for word in ("torch", "native kernels", "rendering", "cores"))


def test_the_table_says_what_the_settings_say():
    for name, command in cli.COMMANDS.items():
        settings_class, run = cli.load(name)
        assert settings_class.__doc__ and callable(run), name
        assert not command.bare or command.bare in settings_class.__dataclass_fields__, name


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (["--from", "rgbd", "--root", "x", "--out", "y"], ("convert", ["--from", "rgbd", "--root", "x", "--out", "y"])),
        (["--validate", "x", "--json"], ("validate", ["--scenes", "x", "--json"])),
        (["--validate=x"], ("validate", ["--scenes=x"])),
        (["--out", "x"], ("generate", ["--out", "x"])),
    ],
)
def test_flags_that_became_commands_still_work_with_a_warning(before, now, capsys):
    assert cli._renamed("generate", before) == now
    assert ("is now the command" in capsys.readouterr().err) == (now[0] != "generate")


def test_a_reader_that_has_seen_enough_is_no_error():
    command = f"{SCRIPT} --help | head -1; {SCRIPT} doctor | head -1"
    answer = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert answer.returncode == 0 and not answer.stderr, answer.stderr


def test_quiet_leaves_warnings_only(tmp_path):
    answer = call("params", "-q")
    assert answer.returncode == 0 and answer.stdout.strip(), "what was asked for is printed all the same"
    before = call("-q", "--quiet", "params")
    assert (before.returncode, before.stdout) == (0, answer.stdout)
    assert call("-q").stdout == call("--help").stdout
