"""Two builds of the package side by side: the same benchmark in turns, to see what a change costs or brings.

python benchmarks/builds.py OLD_PYTHON NEW_PYTHON [--benchmarks linear block step] [--turns 5]

Each PYTHON is the interpreter of an environment that has one of the builds. Prints, for every row that both give, the
least seconds over the turns of each build, their ratio, and the bytes each saves for backward. Further options go to
every benchmark: --options --peers frozen fold.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from subspace3d.bench import harness

# what tells the rows of one benchmark apart
KEY = ("peer", "shape", "views", "tokens", "K", "step", "checkpointing")


def rows_of(python: str, benchmark: str, options: list[str]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="builds-") as folder:
        command = [python, "-m", "subspace3d", "bench", benchmark, "--clock", "process", "--rounds", "1", *options]
        subprocess.run([*command, "--out", folder], check=True, stdout=subprocess.DEVNULL)
        (path,) = Path(folder).glob("*.jsonl")
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", help="interpreter of the environment with the old build")
    parser.add_argument("new", help="interpreter of the environment with the new build")
    parser.add_argument(
        "--benchmarks", nargs="+", choices=["linear", "block", "step"], default=["linear", "block", "step"]
    )
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="further options of every benchmark")
    arguments = parser.parse_args()
    lines = []
    for benchmark in arguments.benchmarks:
        least: dict[tuple, dict[str, dict[str, Any]]] = {}
        for turn in range(arguments.turns):
            for build in ("old", "new"):
                print(f"{benchmark}: turn {turn + 1} of {arguments.turns}, {build}", file=sys.stderr)
                for row in rows_of(getattr(arguments, build), benchmark, arguments.options):
                    if "seconds" not in row:
                        continue
                    found = least.setdefault(tuple(row.get(name) for name in KEY), {})
                    if row["seconds"] < found.get(build, {"seconds": math.inf})["seconds"]:
                        found[build] = row
        for key, found in least.items():
            if len(found) < 2:
                continue
            old, new = found["old"], found["new"]
            case = " ".join(f"{name} {value}" for name, value in zip(KEY, key) if value is not None)
            saved = (harness.mib(row.get("saved_bytes")) for row in (old, new))
            times = (f"{1e3 * row['seconds']:.1f}" for row in (old, new))
            lines.append([benchmark, case, *times, f"{new['seconds'] / old['seconds']:.3f}", *saved])
    print(harness.table(["", "", "old ms", "new ms", "new / old", "old MiB", "new MiB"], lines))


if __name__ == "__main__":
    main()
