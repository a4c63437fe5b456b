"""The console script ``subspace3d``: one verb per stage, flags generated from the dataclasses in `configs`.

Nothing heavy is imported before a verb is known, so that ``subspace3d --help`` answers at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import os
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

from subspace3d import configs
from subspace3d.commands import fit

# verb -> (settings, module whose run() does the work)
VERBS: dict[str, tuple[type, str]] = {
    "doctor": (configs.DoctorConfig, "subspace3d.doctor"),
    "generate": (configs.GenerateConfig, "subspace3d.scenes.generate"),
    "adapt": (configs.AdaptConfig, "subspace3d.training.adapt"),
    "mine": (configs.MineConfig, "subspace3d.mining.mine"),
    "fit": (fit.FitConfig, "subspace3d.commands.fit"),
    "analyze": (configs.AnalyzeConfig, "subspace3d.mining.analyze"),
    "finetune": (configs.FinetuneConfig, "subspace3d.training.finetune"),
    "export": (configs.ExportConfig, "subspace3d.training.export"),
    "evaluate": (configs.EvaluateConfig, "subspace3d.evaluation.evaluate"),
    "report": (configs.ReportConfig, "subspace3d.reporting.report"),
    "view": (configs.ViewConfig, "subspace3d.reporting.viewer"),
    "params": (configs.ParamsConfig, "subspace3d.training.params"),
    "bench": (configs.BenchConfig, "subspace3d.bench.run"),
    "demo": (configs.DemoConfig, "subspace3d.pipeline"),
}

# import name -> extra that brings it, for the advice given when an import fails
EXTRA_OF = {
    "mitsuba": "render", "drjit": "render", "peft": "tune", "open3d": "eval", "scipy": "eval", "matplotlib": "eval",
    "tyro": "tune", "yaml": "tune", "safetensors": "tune", "tqdm": "tune", "PIL": "tune", "huggingface_hub": "tune",
    "tensorboard": "track", "wandb": "track", "viser": "view", "ray": "cluster",
}  # fmt: skip


def usage() -> str:
    lines = ["usage: subspace3d VERB [--config FILE] [flags]", "       subspace3d VERB --help", ""]
    for verb, (config_class, _) in VERBS.items():
        summary = (config_class.__doc__ or "").strip().splitlines()[0]
        lines.append(f"  {verb:<11} {summary}")
    lines += [
        "",
        "  --version    print the version",
        "  --config     YAML or TOML file of the verb's settings; flags override",
    ]
    return "\n".join(lines)


def _parse(verb: str, arguments: list[str]) -> Any:
    config_class = VERBS[verb][0]
    try:
        import tyro
    except ImportError:
        # the base install carries no command-line parser, but must be able to say what is missing
        if verb == "doctor" and not set(arguments) - {"--json"}:
            return configs.DoctorConfig(json="--json" in arguments)
        raise
    arguments = list(arguments)
    if arguments and not arguments[0].startswith("-"):
        # a bare argument is the verb's first setting: `export RUN`, `report RUN`
        arguments.insert(0, "--" + dataclasses.fields(config_class)[0].name)
    from_file: list[str] = []
    for index, argument in enumerate(arguments):
        if argument == "--config" or argument.startswith("--config="):
            from subspace3d import settings

            value = argument.partition("=")[2] if "=" in argument else "".join(arguments[index + 1 : index + 2])
            if not value:
                raise ValueError("config: --config needs a file")
            del arguments[index : index + (1 if "=" in argument else 2)]
            from_file = settings.flags(Path(value), config_class)
            break
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(config_class, prog=f"subspace3d {verb}", args=[*from_file, *arguments])
    except SystemExit as end:
        if end.code in (None, 0):
            raise
        # tyro draws a box; an error here is one line, whatever its source
        words = re.sub(r"[╭╮╰╯│─]+", " ", complaint.getvalue().replace(" ─", ":", 1)).split()
        _fail(f"subspace3d {verb}", " ".join(words))


def _exclusive(config: Any) -> contextlib.AbstractContextManager:
    """What the verb writes, held for this process; of processes that torchrun started together, for the first."""
    from subspace3d.locks import exclusive

    out: Path | None = getattr(config, "out", None)
    if os.environ.get("RANK", "0") != "0" or getattr(config, "validate", None) is not None:
        return contextlib.nullcontext()
    if isinstance(config, configs.GenerateConfig):
        # data sets of different names may be made in one folder at a time
        made = config.attribute if config.task == "none" else config.task
        return exclusive(config.out, Path(config.name or config.from_ or made).name)
    if isinstance(config, (configs.ExportConfig, configs.ReportConfig)) and out is None:
        return exclusive(config.run, "export" if isinstance(config, configs.ExportConfig) else "report")
    if isinstance(config, (configs.MineConfig, configs.ExportConfig, configs.ReportConfig)) and out is not None:
        return exclusive(out.parent, out.name)
    return contextlib.nullcontext() if out is None else exclusive(out)


def _is_out_of_memory(error: Exception) -> bool:
    """Python's own, that of torch's CPU allocator, or that of a GPU."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def main(arguments: list[str] | None = None) -> None:
    """Run one verb; exits with 0, with 2 after a one-line error, with 130 when interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return
    if arguments[0] == "--version":
        from subspace3d import __version__

        print(__version__)
        return
    verb = arguments[0]
    if verb not in VERBS:
        _fail("subspace3d", f"verb must be one of {', '.join(VERBS)}, got {verb!r}")
    try:
        config = _parse(verb, arguments[1:])
        with _exclusive(config):
            importlib.import_module(VERBS[verb][1]).run(config)
    except KeyboardInterrupt:
        print(f"\nsubspace3d {verb}: interrupted; the same command continues it", file=sys.stderr)
        sys.exit(130)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRA_OF:
            raise
        _fail(f"subspace3d {verb}", f"{package} is not installed: pip install 'subspace3d[{EXTRA_OF[package]}]'")
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        _fail(f"subspace3d {verb}", str(error))
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        _fail(f"subspace3d {verb}", f"out of memory; what was finished is kept: {' '.join(str(error).split())[:200]}")


def _fail(who: str, message: str) -> NoReturn:
    print(f"{who}: error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
