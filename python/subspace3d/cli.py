"""The console script ``subspace3d``: the table of its commands, whose flags are generated from their settings.

Nothing heavy is imported before a command is known, so that ``subspace3d --help`` answers at once.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from subspace3d import log, outputs

_QUIET = {"-q", "--quiet"}
"""Anywhere on the line, before the command too."""


@dataclass(frozen=True)
class Command:
    """A command: `subspace3d.commands.<name>` has its settings, ``<Name>Config``, and its run.

    Attributes:
        summary: a line about it.
        bare: the setting that an argument without a flag is: `report RUN`.
    """

    summary: str
    bare: str = ""


COMMANDS: dict[str, Command] = {
    "doctor": Command("Say what this machine has and what is missing."),
    "generate": Command("Render multi-view scenes in which one attribute varies, or the data of a task."),
    "convert": Command("Turn a data set on disk into scenes."),
    "validate": Command("Check scenes: do cameras, depth and images fit?", "scenes"),
    "adapt": Command("Tune one stock PEFT LoRA per data set."),
    "mine": Command("Mine the subspace that a folder of adapters shares.", "adapters"),
    "fit": Command("Say before tuning how well a basis suits scenes."),
    "analyze": Command("Spectra, disentanglement and stability of subspaces."),
    "finetune": Command("Tune a backbone on scenes by one method."),
    "export": Command("Write a tuned run in a format that other software loads.", "run"),
    "evaluate": Command("Measure a backbone and tuned runs of it on scenes."),
    "report": Command("Write one self-contained HTML page about a run.", "run"),
    "view": Command("Show points and cameras in a browser, live.", "path"),
    "params": Command("Count the trainable parameters of a method."),
    "bench": Command("Time the fused layer or the mining beside its peers.", "benchmark"),
    "demo": Command("Run the whole method at nano scale."),
}


def load(name: str) -> tuple[type, Callable[[Any], Any]]:
    """The settings and the run of a command."""
    module = importlib.import_module(f"subspace3d.commands.{name}")
    return getattr(module, f"{name.title()}Config"), module.run


def usage() -> str:
    lines = ["usage: subspace3d COMMAND [--config FILE] [-q] [flags]", "       subspace3d COMMAND --help", ""]
    lines += [f"  {name:<11} {command.summary}" for name, command in COMMANDS.items()]
    lines += [
        "",
        "  --version    print the version",
        "  --config     YAML or TOML file of the command's settings; flags override",
        "  -q, --quiet  print warnings and errors only",
    ]
    return "\n".join(lines)


def parse(prog: str, settings_class: type, arguments: list[str], bare: str = "") -> Any:
    """Settings from a file (``--config``) and flags, which override it.

    Args:
        prog (str): name of the program in messages.
        settings_class (type): a dataclass.
        arguments (list[str]): flags.
        bare (str): the setting that a first argument without a flag is.

    Raises:
        ValueError: a settings file that cannot be used.
        SystemExit: 0 after ``--help``, 2 after a wrong flag and one line about it.
    """
    import tyro

    arguments = [_current(argument, settings_class) for argument in arguments]
    if bare and arguments and not arguments[0].startswith("-"):
        arguments.insert(0, f"--{bare}")
    from_file: list[str] = []
    for index, argument in enumerate(arguments):
        if argument == "--config" or argument.startswith("--config="):
            from subspace3d import settings

            value = argument.partition("=")[2] if "=" in argument else "".join(arguments[index + 1 : index + 2])
            if not value:
                raise ValueError("config: --config needs a file")
            del arguments[index : index + (1 if "=" in argument else 2)]
            from_file = settings.flags(Path(value), settings_class)
            break
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(settings_class, prog=prog, args=[*from_file, *arguments])
    except SystemExit as end:
        if end.code in (None, 0):
            raise
        _fail(prog, _one_line(complaint.getvalue(), settings_class))


def _one_line(complaint: str, settings_class: type) -> str:
    """What tyro draws in a box, as the one line that an error is here, whatever its source."""
    # a title and rules around what it says, of hyphens where the terminal's encoding has nothing better
    rows = [re.sub("[╭╮╰╯│]", " ", row).strip(" ─") for row in complaint.splitlines()]
    title, *said = [row for row in rows if row.strip("-")] or [complaint]
    line = " ".join(f"{title}: {' '.join(said)}".split())
    line, _, help_command = re.sub(r" For full helptext, (?:see|run):? ", "\n", line).partition("\n")
    # a rule of the settings themselves, which names argument, rule and value
    rule = re.fullmatch(r"Value error: Error parsing (\w+): (.*)", line)
    if rule:
        return rule[2] if rule[1] == settings_class.__name__ else f"{rule[1]}: {rule[2]}"
    line = re.sub(r"^(Invalid choice|Value error: Error parsing):? ", "", line).replace(" Argument helptext: ", "; ")
    line = re.sub(r"^([^:]+: )\1", r"\1", line)  # the title again
    return f"{line} (see {help_command})" if help_command else line


def execute(prog: str, settings_class: type, run: Callable[[Any], Any], arguments: list[str], bare: str = "") -> None:
    """Parse and run one command; exits with 2 after a one-line error, with 130 when interrupted."""
    log.show(quiet=bool(_QUIET & set(arguments)))
    try:
        config = parse(prog, settings_class, [argument for argument in arguments if argument not in _QUIET], bare)
        # asked before the lock, which is made nowhere where nothing else may be
        config = outputs.check(config)
        with _exclusive(config):
            run(config)
    except KeyboardInterrupt:
        print(f"\n{prog}: interrupted; the same command continues it", file=sys.stderr)
        sys.exit(130)
    except ModuleNotFoundError as error:
        from subspace3d.extras import install_line

        library = (error.name or "").partition(".")[0]
        install = install_line(library)
        if install is not None:
            _fail(prog, f"{library} is not installed: {install}")
        # Python's own words name no remedy; those of a backbone do
        if str(error).startswith("No module named"):
            raise
        _fail(prog, str(error))
    except BrokenPipeError:
        raise
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        _fail(prog, str(error))
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        _fail(prog, f"out of memory; what was finished is kept: {' '.join(str(error).split())[:200]}")


def _exclusive(config: Any) -> contextlib.AbstractContextManager:
    """What the command writes, held for this process; of processes that torchrun started together, for the first.

    A module of settings says with ``lock`` what is held where that is not the folder ``out``.
    """
    from subspace3d.locks import exclusive

    if os.environ.get("RANK", "0") != "0":
        return contextlib.nullcontext()
    lock = getattr(config, "lock", None)
    if lock is not None:
        return exclusive(*lock())
    out: Path | None = getattr(config, "out", None)
    return contextlib.nullcontext() if out is None else exclusive(out)


def _is_out_of_memory(error: Exception) -> bool:
    """Python's own, that of torch's CPU allocator, or that of a GPU."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def _current(argument: str, settings_class: type) -> str:
    """The flag that one of an earlier version is called now, with a warning."""
    flag, equals, value = argument.partition("=")
    renamed = getattr(settings_class, "RENAMED", {})
    name = flag[2:].replace("-", "_") if flag.startswith("--") else ""
    if name not in renamed:
        return argument
    now = "--" + renamed[name].replace("_", "-")
    log.logger.warning(f"{flag} is now {now}; the old name goes with the next version")
    return now + equals + value


# flags of 0.1.0 that have become commands of their own
_FORMER = {"--from": "convert", "--validate": "validate"}


def _renamed(name: str, arguments: list[str]) -> tuple[str, list[str]]:
    """The command and arguments that an invocation of 0.1.0 means now, with a warning where they differ."""
    if name != "generate":
        return name, arguments
    for index, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag in _FORMER:
            now = _FORMER[flag]
            log.logger.warning(f"generate {flag} is now the command {now}; the old form goes with the next version")
            if now == "validate":
                arguments = [*arguments[:index], "--scenes" + equals + value, *arguments[index + 1 :]]
            return now, arguments
    return name, arguments


def main(arguments: list[str] | None = None) -> None:
    """Run one command; exits with 0, with 2 after a one-line error, with 130 when interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        _main(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # who reads has seen enough (`| head`); nothing more can be said there, also not at the end of the process
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _main(arguments: list[str]) -> None:
    before = list(itertools.takewhile(_QUIET.__contains__, arguments))
    arguments = [*arguments[len(before) :], *before]
    if len(arguments) == len(before) or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return
    if arguments[0] == "--version":
        from subspace3d import __version__

        print(__version__)
        return
    log.show()
    name, arguments = _renamed(arguments[0], arguments[1:])
    if name not in COMMANDS:
        _fail("subspace3d", f"command must be one of {', '.join(COMMANDS)}, got {name!r}")
    execute(f"subspace3d {name}", *load(name), arguments, COMMANDS[name].bare)


def _fail(who: str, message: str) -> NoReturn:
    print(f"{who}: error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
