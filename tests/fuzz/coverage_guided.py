"""Coverage-guided fuzzing of one reader with atheris: python tests/fuzz/coverage_guided.py READER SECONDS.

Without READER: lists them. Needs ``pip install atheris``. A case that breaks the rule is printed and left as crash-*.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import warnings
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))
with atheris.instrument_imports(include=["subspace3d"]):
    from fuzz.readers import READERS


def main() -> None:
    if len(sys.argv) < 3 or sys.argv[1] not in READERS:
        print("\n".join(READERS))
        sys.exit(2)
    reader = READERS[sys.argv[1]]
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)) / "input"
    folder.mkdir()
    reader.make(folder)
    target = folder / reader.target
    seeds = Path(tempfile.mkdtemp())
    (seeds / "valid").write_bytes(target.read_bytes())
    warnings.simplefilter("ignore")

    def attack(content: bytes) -> None:
        target.unlink()
        target.write_bytes(content)
        with contextlib.suppress(ValueError, FileNotFoundError):
            reader.read(folder)

    os.chdir(tempfile.mkdtemp())
    atheris.Setup([sys.argv[0], str(seeds), f"-max_total_time={sys.argv[2]}", "-rss_limit_mb=8192"], attack)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
