"""Nothing of the user's is lost: what every command does with targets that are not its own."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch

import experiments.directions.run
import experiments.few
import experiments.run
from experiments.directions.settings import DirectionsConfig
from experiments.few import FewExperiment
from experiments.settings import ExperimentsConfig
from subspace3d import cli, locks, outputs, settings
from subspace3d.bench.config import BenchConfig
from subspace3d.bench.harness import append_rows
from subspace3d.commands.adapt import AdaptConfig
from subspace3d.commands.analyze import AnalyzeConfig
from subspace3d.commands.convert import ConvertConfig
from subspace3d.commands.demo import DemoConfig
from subspace3d.commands.evaluate import EvaluateConfig
from subspace3d.commands.export import ExportConfig
from subspace3d.commands.finetune import FinetuneConfig
from subspace3d.commands.fit import FitConfig
from subspace3d.commands.generate import GenerateConfig
from subspace3d.commands.mine import MineConfig
from subspace3d.commands.report import ReportConfig
from subspace3d.files import atomic_folder, atomic_path, open_to_append, save_tensors
from subspace3d.formats.basis import save_authors, save_basis
from subspace3d.formats.scene import Frame, write_frames
from subspace3d.formats.subspace import ModuleSubspace, save_subspace
from subspace3d.outputs import rule
from subspace3d.training import checkpoints
from subspace3d.training.config import TrainConfig
from subspace3d.training.run import remove_run

PRECIOUS = b"years of work"
PAIR = (torch.ones(3, 1), torch.ones(2, 1))
MODULE = ModuleSubspace(*PAIR, torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
TRAIN = TrainConfig(steps=1)


@dataclasses.dataclass(frozen=True)
class Case:
    """A command: what it reads below the working folder, and its settings for a target."""

    inputs: tuple[str, ...]
    make: Callable[[Path], Any]
    writes_file: bool = False
    entry: str = ""
    """What it adds to a folder that may hold other things, the inputs among them; empty: the folder is all its own."""
    flag: str = "out"
    """The setting that is the target."""


RUNS = {
    **dict(map(cli.load, cli.COMMANDS)),
    ExperimentsConfig: experiments.run.run,
    DirectionsConfig: experiments.directions.run.run,
    FewExperiment: experiments.few.run,
}
CASES = {
    "generate": Case(
        ("maps",),
        lambda out: GenerateConfig(out=out, textures=Path("maps"), scenes=1, datasets=1),
        entry="texture_00/scene",
    ),
    "generate --preview": Case(
        ("maps",),
        lambda out: GenerateConfig(out=out, textures=Path("maps"), preview=True),
        entry="preview/paper-object-wide/camera.jpg",
    ),
    "generate --task": Case(
        ("pictures",),
        lambda out: GenerateConfig(out=out, task="faces", pictures=Path("pictures")),
        entry="faces_train/scene",
    ),
    "convert": Case(
        ("data/rgbd",),
        lambda out: ConvertConfig(out=out, from_="rgbd", root=Path("data/rgbd")),
        entry="rgbd/scene",
    ),
    "adapt": Case(
        ("scenes", "weights"),
        lambda out: AdaptConfig(scenes=Path("scenes"), out=out, weights=Path("weights")),
        entry="config.yaml",
    ),
    "adapt --cache-tokens": Case(
        ("scenes",),
        lambda out: AdaptConfig(scenes=Path("scenes"), out=Path("adapted"), cache_tokens=out),
        flag="cache_tokens",
    ),
    "mine": Case(("adapters",), lambda out: MineConfig(adapters=Path("adapters"), out=out), writes_file=True),
    "mine --join": Case(
        ("adapters", "gradients"),
        lambda out: MineConfig(adapters=Path("adapters"), join=Path("gradients"), out=out),
        writes_file=True,
    ),
    "fit": Case(
        ("scenes", "subspaces", "weights"),
        lambda out: FitConfig(Path("scenes"), (Path("subspaces"),), out, weights=Path("weights")),
    ),
    "analyze": Case(
        ("subspaces", "adapters"), lambda out: AnalyzeConfig(out, (Path("subspaces"),), (Path("adapters"),))
    ),
    "analyze --compare": Case(
        ("subspaces", "run/tuned"), lambda out: AnalyzeConfig(out, compare=(Path("subspaces"), Path("run/tuned")))
    ),
    "finetune": Case(
        ("scenes", "subspaces", "weights"),
        lambda out: FinetuneConfig(
            scenes=Path("scenes"), out=out, subspaces=(Path("subspaces"),), weights=Path("weights")
        ),
    ),
    "finetune --few": Case(
        ("scenes", "generic"),
        lambda out: FinetuneConfig(
            scenes=Path("scenes"), out=out, method="psv", core_size=2, few=True, generic=Path("generic")
        ),
    ),
    "finetune --cache-tokens": Case(
        ("scenes",),
        lambda out: FinetuneConfig(scenes=Path("scenes"), out=Path("tuned"), method="none", cache_tokens=out),
        flag="cache_tokens",
    ),
    "finetune --resume never": Case(
        ("scenes",), lambda out: FinetuneConfig(scenes=Path("scenes"), out=out, method="none", resume="never")
    ),
    "export": Case(("run/tuned",), lambda out: ExportConfig(run=Path("run"), out=out)),
    "export --to authors": Case(
        ("run/tuned",), lambda out: ExportConfig(run=Path("run"), to="authors", out=out), writes_file=True
    ),
    "evaluate": Case(
        ("scenes", "run/tuned", "weights"),
        lambda out: EvaluateConfig(scenes=Path("scenes"), out=out, tuned=(Path("run"),), weights=Path("weights")),
    ),
    "report": Case(("run/tuned",), lambda out: ReportConfig(run=Path("run"), out=out), writes_file=True),
    "bench": Case((), lambda out: BenchConfig(out=out), entry="cpu.jsonl"),
    "demo": Case((), lambda out: DemoConfig(out=out)),
    **{
        name: Case(
            ("weights", "measured.jsonl"),
            lambda out, make=make: make(out=out, weights=Path("weights"), measured=Path("measured.jsonl")),
        )
        for name, make in (("experiments", ExperimentsConfig), ("experiments.directions", DirectionsConfig))
    },
    "experiments.few": Case((), lambda out: FewExperiment(out=out)),
}
WRITE_NOTHING = {"doctor", "validate", "view", "params"}
OF_A_CHECKOUT = {"publish"}
"""Settings that name a checkout of this project, whose pages are brought up to date; tests/experiments tries them."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the inputs of all commands, and folders and files of somebody else's."""
    monkeypatch.chdir(tmp_path)
    for name in (
        "maps",
        "pictures",
        "weights",
        "generic",
        "gradients",
        "data/rgbd",
        "scenes/one",
        "adapters/one",
        "subspaces",
        "run/tuned",
        "mydocs/tuned",
    ):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "precious.txt").write_bytes(PRECIOUS)
    for name in ("thesis.txt", "measured.jsonl"):
        (tmp_path / name).write_bytes(PRECIOUS)
    return tmp_path


def everything(folder: Path) -> dict[str, Any]:
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


def refuse(here: Path, case: Case, out: Path, words: str = "") -> str:
    """The command is refused, by the Python function and on the command line, and nothing is changed."""
    before = everything(here)
    config, words = case.make(out), words or f"{case.flag} must"
    with pytest.raises(ValueError, match=words) as error:
        RUNS[type(config)](config)
    assert everything(here) == before
    with pytest.raises(ValueError, match=words):
        outputs.check(config)
    assert everything(here) == before
    return str(error.value)


def both(check: Callable[[Path], object], here: Path, target: str) -> None:
    """Try a target by its name and by a link to it."""
    check(Path(target))
    Path("link").symlink_to(here / target)
    check(Path("link"))


def paths_of(settings_class: type) -> list[str]:
    """Its settings that are paths."""

    def parts(hint: Any) -> Iterator[Any]:
        yield hint
        for inner in get_args(hint):
            yield from parts(inner)

    hints = get_type_hints(settings_class)
    names = [field.name for field in dataclasses.fields(settings_class)]
    for name in names:
        nested = hints[name]
        assert not dataclasses.is_dataclass(nested) or not paths_of(nested), f"{name} has paths of its own"
    return [name for name in names if Path in parts(hints[name])]


def test_every_command_that_writes_is_tried() -> None:
    """A command or a setting that is new cannot be forgotten: its class says what it writes."""
    writing = {name for name in cli.COMMANDS if hasattr(cli.load(name)[0], "writes")}
    assert writing == cli.COMMANDS.keys() - WRITE_NOTHING
    tried = {type(case.make(Path("new"))) for case in CASES.values()}
    assert {cli.load(name)[0] for name in writing} <= tried
    targets = {
        (type(config), output.argument)
        for config in (case.make(Path("new")) for case in CASES.values())
        for output in config.writes()
    }
    assert targets == {(type(case.make(Path("new"))), case.flag) for case in CASES.values()}


@pytest.mark.parametrize("settings_class", dict.fromkeys(type(case.make(Path("new"))) for case in CASES.values()))
def test_every_path_in_the_settings_is_read_or_written(here: Path, settings_class: type) -> None:
    """So that the rule is asked about it, whatever the setting is called."""
    configs = [config for case in CASES.values() if type(config := case.make(Path("new"))) is settings_class]
    for name in paths_of(settings_class):
        if name in OF_A_CHECKOUT:
            continue
        given = [value for config in configs for value in _several(getattr(config, name))]
        assert given, f"no case of {settings_class.__name__} gives {name}"
        for config in configs:
            found, read = rule.declared(config)
            known = [*(output.path for output in found), *(path for _, path in read)]
            for path in _several(getattr(config, name)):
                assert any(path in (each, *each.parents) for each in known), f"{name} {path} is neither"


def _several(value: Any) -> list[Path]:
    return [path for path in (value if isinstance(value, tuple) else (value,)) if path is not None]


def test_commands_that_write_nothing(here: Path) -> None:
    scene(here / "valid/scene")
    before = everything(here)
    assert {name for name in WRITE_NOTHING if paths_of(cli.load(name)[0])} == {"validate", "view"}
    cli.main(["validate", "valid"])
    assert everything(here) == before
    with pytest.raises(SystemExit):
        cli.main(["view", "valid", "--weights", "nowhere"])
    assert everything(here) == before


@pytest.mark.parametrize("verb", CASES)
def test_the_target_is_an_input(here: Path, verb: str) -> None:
    case = CASES[verb]
    for source in case.inputs:
        both(lambda out: refuse(here, case, out), here, source)
        Path("link").unlink()


@pytest.mark.parametrize("verb", CASES)
def test_the_target_lies_in_an_input(here: Path, verb: str) -> None:
    case = CASES[verb]
    for source in case.inputs:
        refuse(here, case, Path(source) / "new")
        Path("link").symlink_to(here / source)
        refuse(here, case, Path("link/new"))
        Path("link").unlink()


@pytest.mark.parametrize("verb", [verb for verb, case in CASES.items() if not case.entry])
def test_the_target_holds_an_input(here: Path, verb: str) -> None:
    case = CASES[verb]
    for source in case.inputs:
        for out in {Path(source).parent, Path(os.path.relpath(here))}:
            refuse(here, case, out)


@pytest.mark.parametrize("verb", CASES)
def test_a_foreign_folder(here: Path, verb: str) -> None:
    case = CASES[verb]
    if case.entry:
        (here / "mydocs" / case.entry).parent.mkdir(parents=True, exist_ok=True)
        (here / "mydocs" / case.entry).write_bytes(PRECIOUS)
    if verb == "bench":
        with pytest.raises(ValueError, match="out must be a new file or rows of a benchmark"):
            append_rows(here / "mydocs", [{"device": "cpu"}])
        assert (here / "mydocs/cpu.jsonl").read_bytes() == PRECIOUS
        return
    both(lambda out: refuse(here, case, out), here, "mydocs")


@pytest.mark.parametrize("verb", CASES)
def test_a_foreign_file(here: Path, verb: str) -> None:
    both(lambda out: refuse(here, CASES[verb], out), here, "thesis.txt")
    refuse(here, CASES[verb], Path("thesis.txt/new"))


@pytest.mark.parametrize("verb", CASES)
def test_a_special_file_and_a_link_in_a_loop(here: Path, verb: str) -> None:
    os.mkfifo("fifo")
    os.symlink("loop", "loop")
    before = sorted(path.name for path in here.rglob("*"))
    for name in ("fifo", "loop"):
        with pytest.raises(ValueError, match=f"{CASES[verb].flag} must"):
            outputs.check(CASES[verb].make(Path(name)))
    assert sorted(path.name for path in here.rglob("*")) == before


@pytest.mark.parametrize("verb", [verb for verb, case in CASES.items() if case.flag == "out"])
@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_a_lock_that_is_none(here: Path, verb: str, kind: str) -> None:
    """The command line refuses it at once; what a link leads to keeps its bytes."""
    config = CASES[verb].make(here / "new.out")
    name = ".new.out.lock" if isinstance(config, (MineConfig, ExportConfig, ReportConfig)) else ""
    if isinstance(config, (GenerateConfig, ConvertConfig)):
        made = config.from_ if isinstance(config, ConvertConfig) else config.prefix
        name = f"new.out/.{made}.lock"
    lock = here / (name or "new.out/.lock")
    lock.parent.mkdir(exist_ok=True)
    lock.symlink_to(here / "thesis.txt") if kind == "link" else os.mkfifo(lock)
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"out: the lock .* must be a regular file"), cli._exclusive(config):
        pass
    assert time.monotonic() - start < 1
    assert lock.is_symlink() or lock.is_fifo()
    assert (here / "thesis.txt").read_bytes() == PRECIOUS


def test_a_lock_with_content_is_held_and_kept(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    lock.write_bytes(PRECIOUS)
    with locks.exclusive(tmp_path), open(lock, "rb") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert lock.read_bytes() == PRECIOUS
    lock.write_bytes(b"")
    with locks.exclusive(tmp_path):
        assert lock.exists()
    assert not lock.exists()


def test_the_command_line_names_argument_and_path_in_one_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (
        "mine --adapters adapters --out thesis.txt",
        "mine --adapters adapters --out .",
        "export run --out mydocs",
        "export run --out .",
        "adapt --scenes scenes --out scenes",
        "convert --from rgbd --root data/rgbd --out data",
        "finetune --scenes scenes --out mydocs --method none --resume never",
    ):
        before = everything(here)
        with pytest.raises(SystemExit) as end:
            cli.main(command.split())
        text = capsys.readouterr().err
        assert end.value.code == 2 and len(text.strip().splitlines()) == 1, text
        assert "error: out must" in text
        assert everything(here) == before


def test_a_source_beside_its_scenes_may_be_converted(here: Path) -> None:
    """data/rgbd -> data/captures_...: the folder of both is shared."""
    outputs.check(ConvertConfig(out=Path("data"), from_="rgbd", root=Path("data/rgbd"), name="captures"))
    outputs.check(ConvertConfig(out=Path("data"), from_="thuman", root=Path("data/rgbd")))


def tuned(run: Path, **more: Any) -> None:
    (run / "tuned/adapter").mkdir(parents=True)
    save_tensors(run / "tuned/basis.safetensors", {"a": torch.ones(1)})
    record = {"format": "subspace3d-tuned", "version": 2, "files": {"basis.safetensors": ""}, **more}
    (run / "tuned/tuned.json").write_text(json.dumps(record))


def test_starting_over_keeps_runs_that_lie_below(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """RUN/tuned/<method>, as the demo lays them out, is no result of RUN."""
    tuned(here / "bank/tuned/full")
    case = CASES["finetune --resume never"]
    refuse(here, case, Path("bank"))
    tuned(here / "mixed")
    tuned(here / "mixed/tuned/full")
    refuse(here, case, Path("mixed"), "which also holds full/tuned/")
    tuned(here / "own")
    outputs.check(case.make(Path("own")))
    outputs.replace([Path("own/tuned")], outputs.TUNED, "finetune --resume never")
    assert not (here / "own/tuned").exists()
    assert capsys.readouterr().err == "finetune --resume never replaces own/tuned\n"


def test_starting_over_deletes_what_the_run_made_and_nothing_else(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    for step in (1, 2):
        checkpoints.save(tmp_path / "checkpoints", step, {"p": parameter}, torch.optim.AdamW([parameter]), {})
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard/events.out.tfevents.1").write_bytes(b"")
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "notes.txt").write_bytes(PRECIOUS)
    (tmp_path / "checkpoints/best").mkdir()
    before = everything(tmp_path)
    with pytest.raises(ValueError, match=r"out: .*checkpoints must hold nothing but checkpoints .*best"):
        remove_run(tmp_path)
    assert everything(tmp_path) == before
    (tmp_path / "checkpoints/best").rmdir()
    (tmp_path / "tensorboard/notes.txt").write_bytes(PRECIOUS)
    with pytest.raises(ValueError, match=r"out: .*tensorboard must hold nothing but event files .*notes\.txt"):
        remove_run(tmp_path)
    (tmp_path / "tensorboard/notes.txt").unlink()
    remove_run(tmp_path)
    assert everything(tmp_path) == {"notes.txt": PRECIOUS}


WRITERS: dict[str, Callable[[Path], object]] = {
    "save_subspace": lambda path: save_subspace(path, {"m": MODULE}, {}),
    "save_basis": lambda path: save_basis(path, {"m": PAIR}),
    "save_authors": lambda path: save_authors(path, {"aggregator.frame_blocks.0.attn.qkv": PAIR}),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_the_functions_that_write_files_ask_the_same_rule(here: Path, writer: str) -> None:
    write = WRITERS[writer]
    foreign = here / "weights.safetensors"
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, foreign)
    (here / "link").symlink_to(here / "thesis.txt")
    for other in WRITERS:
        if other != writer:
            WRITERS[other](here / f"{other}.safetensors")
    os.mkfifo("fifo")
    before = {name: value for name, value in everything(here).items() if name != "fifo"}
    for target in ("thesis.txt", "mydocs", "link", foreign.name, *(f"{o}.safetensors" for o in WRITERS if o != writer)):
        with pytest.raises(ValueError, match="path must"):
            write(Path(target))
    with pytest.raises(ValueError, match="path must be a regular file"):
        write(Path("fifo"))
    assert {name: value for name, value in everything(here).items() if name != "fifo"} == before
    # own results are replaced, through a link too; a truncated one is still known
    (here / "real").mkdir()
    write(here / "real/own.safetensors")
    whole = (here / "real/own.safetensors").read_bytes()
    (here / "real/own.safetensors").write_bytes(whole[: len(whole) // 2])
    (here / "to_own").symlink_to("real/own.safetensors")
    write(here / "to_own")
    assert (here / "to_own").is_symlink()
    assert (here / "real/own.safetensors").read_bytes() == whole


def test_settings_replace_settings_of_the_same_verb_only(here: Path) -> None:
    config = DemoConfig(out=Path("demo"))
    settings.save(here / "config.yaml", config)
    settings.save(here / "config.yaml", dataclasses.replace(config, seed=1))
    (here / "other.yaml").write_text("image: nginx\nports: [80]\n")
    (here / "broken.yaml").write_text("a: [")
    before = everything(here)
    for name in ("other.yaml", "broken.yaml", "thesis.txt", "mydocs"):
        with pytest.raises(ValueError, match="path must"):
            settings.save(here / name, config)
    with pytest.raises(ValueError, match="path must"):
        settings.save(here / "config.yaml", AdaptConfig(scenes=Path("a"), out=Path("b")))
    assert everything(here) == before


def scene(folder: Path) -> None:
    import numpy as np

    intrinsic = np.array([[8.0, 0, 4], [0, 8, 4], [0, 0, 1]])
    write_frames(folder, [Frame(np.zeros((8, 8, 3), np.uint8), intrinsic, np.eye(3, 4), np.ones((8, 8)))], {})


def test_a_scene_replaces_a_scene_only(here: Path) -> None:
    for target in ("mydocs", "scenes/one", "thesis.txt"):
        before = everything(here)
        with pytest.raises(ValueError, match="folder must"):
            scene(Path(target))
        assert everything(here) == before
    scene(here / "s")
    scene(here / "s")
    (here / "s/images/notes.txt").write_bytes(PRECIOUS)
    with pytest.raises(ValueError, match=r"which also holds images/notes\.txt"):
        scene(here / "s")
    assert (here / "s/images/notes.txt").read_bytes() == PRECIOUS


def test_overwrite_replaces_own_data_sets_and_names_them(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = GenerateConfig(out=here / "data", seed=1)
    for dataset in ("texture_00", "texture_07", "other_00"):
        scene(here / "data" / dataset / "scene_0000")
    with pytest.raises(ValueError, match="out must be a new or empty folder or a data set"):
        config.replace_others()
    settings.save(here / "data/config-texture.yaml", config)
    other = dataclasses.replace(config, seed=2)
    other.replace_others()
    with pytest.raises(ValueError, match="--overwrite replaces the data sets"):
        other.targets.check_same(other, ("seed",), "data sets")
    other = dataclasses.replace(other, overwrite=True)
    (here / "data/texture_07/precious.txt").write_bytes(PRECIOUS)
    before = everything(here)
    with pytest.raises(ValueError, match="out must"):
        other.replace_others()
    assert everything(here) == before
    (here / "data/texture_07/precious.txt").unlink()
    other.replace_others()
    replaced = capsys.readouterr().err
    assert [
        name for name in ("texture_00", "texture_07", "config-texture.yaml") if name in replaced
    ] and "other" not in replaced
    assert sorted(path.name for path in (here / "data").iterdir()) == ["other_00", "rgbd"]


def test_settings_that_made_nothing_bind_nothing(here: Path) -> None:
    """All scenes failed, say, or the first was cut off: the same target takes other settings."""
    config = GenerateConfig(out=here / "data", seed=1)
    settings.save(config.targets.record, config)
    (here / "data/texture_00/.scene_0000.s3d-12345678.tmp").mkdir(parents=True)
    config.targets.remove_empty()
    other = dataclasses.replace(config, seed=2)
    other.targets.check_same(other, ("seed",), "data sets")
    scene(here / "data/texture_03/scene_0000")
    with pytest.raises(ValueError, match="seed 1 there, 2 now"):
        other.targets.check_same(other, ("seed",), "data sets")


@pytest.mark.parametrize("name", [".DS_Store", "Thumbs.db"])
def test_what_a_file_browser_leaves_counts_as_nothing(here: Path, name: str) -> None:
    config = GenerateConfig(out=here / "data", seed=1)
    settings.save(config.targets.record, config)
    dataset = here / "data/texture_00"
    dataset.mkdir()
    (dataset / name).write_bytes(b"\0\0\0\1Bud1")
    other = dataclasses.replace(config, seed=2, overwrite=True)
    other.targets.check_same(other, ("seed",), "data sets")
    scene(dataset / "scene_0000")
    with pytest.raises(ValueError, match="seed 1 there, 2 now"):
        other.targets.check_same(other, ("seed",), "data sets")
    # nor is it anybody's that would be lost with the data set
    (dataset / "scene_0000/images" / name).write_bytes(b"\0\0\0\1Bud1")
    other.replace_others()
    assert not dataset.exists()
    (here / "new").mkdir()
    (here / "new" / name).write_bytes(b"\0\0\0\1Bud1")
    for verb in ("finetune", "export", "demo"):
        outputs.check(CASES[verb].make(Path("new")))
    (here / "new" / name).unlink()
    (here / "new" / name).mkdir()
    refuse(here, CASES["finetune"], Path("new"))


def test_a_run_may_begin_beside_what_was_measured_for_it(here: Path) -> None:
    """As after ``mine --out new/subspaces/a.safetensors``, ``analyze --out new/analysis`` and ``report new``."""
    for name, kind in (("analysis", outputs.ANALYSIS), ("fit", outputs.FIT), ("evaluation", outputs.EVALUATION)):
        outputs.mark(here / "new" / name, kind)
    (here / "new/report").mkdir()
    (here / "new/report/index.html").write_text('<!doctype html>\n<meta name="generator" content="subspace3d">')
    save_subspace(here / "new/subspaces/a.safetensors", {"m": MODULE}, {})
    for verb in ("finetune", "finetune --resume never"):
        outputs.check(CASES[verb].make(Path("new")))
    # but no result of another kind
    for verb in ("analyze", "evaluate", "export", "demo"):
        refuse(here, CASES[verb], Path("new"))
    (here / "new/fit/notes.txt").write_bytes(PRECIOUS)
    outputs.check(CASES["finetune"].make(Path("new")))
    for name in ("new/notes.txt", "new/subspaces/notes.txt"):
        (here / name).write_bytes(PRECIOUS)
        refuse(here, CASES["finetune"], Path("new"))
        (here / name).unlink()
    # a folder that has only the name of one
    (here / "papers/analysis").mkdir(parents=True)
    (here / "papers/analysis/precious.txt").write_bytes(PRECIOUS)
    refuse(here, CASES["finetune"], Path("papers"))


def test_results_of_the_first_version_are_known(here: Path) -> None:
    """They carry no marks of their own."""
    (here / "analysis").mkdir()
    (here / "analysis/analysis.json").write_text('{"format": "subspace3d-analysis", "version": 2}')
    (here / "evaluation/methods").mkdir(parents=True)
    (here / "evaluation/methods/base.json").write_text('{"key": {"metrics_version": 1}}')
    tuned(here / "finished")
    (here / "begun").mkdir()
    (here / "begun/metrics.jsonl").write_text(
        '{"step": 1, "loss": 1.0, "lr": 0.1, "skipped": 0, "images": 2, "seconds": 1}\n'
    )
    settings.save(here / "demo/config.yaml", DemoConfig(out=Path("demo")), version="0.1.0")
    (here / "experiments").mkdir()
    (here / "experiments/experiments.json").write_text('{"scale": "nano", "starts": []}')
    (here / "page.html").write_text("<!doctype html>\n<html><head><title>subspace3d: run</title></head></html>")
    settings.save(here / "adapted/config.yaml", AdaptConfig(scenes=Path("scenes"), out=Path("adapted")))
    for verb, out in (
        ("analyze", "analysis"), ("evaluate", "evaluation"), ("finetune", "finished"), ("finetune", "begun"),
        ("demo", "demo"), ("experiments", "experiments"), ("report", "page.html"), ("adapt", "adapted"),
    ):  # fmt: skip
        outputs.check(CASES[verb].make(Path(out)))
    # but not as results of another kind
    for verb, out in (("evaluate", "analysis"), ("finetune", "demo"), ("finetune", "adapted"), ("analyze", "finished")):
        refuse(here, CASES[verb], Path(out))


def test_a_cache_of_tokens_is_added_to_and_holds_nothing_else(here: Path) -> None:
    case = CASES["finetune --cache-tokens"]
    (here / "tokens/0123456789abcdef-cpu-bfloat16/28x28").mkdir(parents=True)
    outputs.check(case.make(Path("tokens")))
    Path("dangling").symlink_to("disk/tokens")
    assert outputs.check(case.make(Path("dangling"))).cache_tokens == here / "disk/tokens"
    for name in ("notes.txt", "0123456789abcdef-cpu-float32"):
        (here / "tokens" / name).write_bytes(PRECIOUS)
        refuse(here, case, Path("tokens"), "cache_tokens must be a new or empty folder or a cache of tokens")
        (here / "tokens" / name).unlink()


def test_a_link_to_an_own_result_is_followed(here: Path) -> None:
    (here / "disk/analysis").mkdir(parents=True)
    outputs.mark(here / "disk/analysis", outputs.ANALYSIS)
    Path("analysis").symlink_to("disk/analysis")
    assert outputs.check(CASES["analyze"].make(Path("analysis"))).out == here / "disk/analysis"
    Path("dangling").symlink_to("disk/new")
    assert outputs.check(CASES["analyze"].make(Path("dangling"))).out == here / "disk/new"
    assert outputs.check(CASES["analyze"].make(Path("plain"))).out == Path("plain")


def test_links_inside_results_are_not_replaced(here: Path) -> None:
    Path("results.json").symlink_to("thesis.txt")
    with (
        pytest.raises(ValueError, match=r"results\.json must be a regular file to be written, it is a link"),
        atomic_path(Path("results.json")),
    ):
        pass
    Path("folder").symlink_to("mydocs")
    with (
        pytest.raises(ValueError, match="folder must be a folder to be written, it is a link"),
        atomic_folder(Path("folder")),
    ):
        pass
    with pytest.raises(ValueError, match="it is a link"):
        open_to_append(Path("results.json"))
    assert Path("results.json").is_symlink() and (here / "thesis.txt").read_bytes() == PRECIOUS
