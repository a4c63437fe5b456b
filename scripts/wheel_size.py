"""Write what a wheel takes, part by part, into docs/wheels.md; with SUBSPACE_CUDA=OFF, without kernels, only print it.

python scripts/wheel_size.py dist/subspace3d-*.whl
"""

from __future__ import annotations

import os
import re
import sys
import zipfile
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs/wheels.md"
LARGEST = 25_000_000
PARTS = (
    ("weights of vggt-nano", r"\.safetensors$"),
    ("native module with its CUDA kernels", r"^subspace_ext/_C\..*\.so$"),
    ("Python code", r"\.pyi?$"),
    ("licences, metadata and the rest", r""),
)


def table(wheel: Path) -> str:
    """Megabytes (1e6 bytes) of every part, as downloaded and as installed."""
    sizes = {name: [0, 0] for name, _ in PARTS}
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            part = next(name for name, pattern in PARTS if re.search(pattern, entry.filename))
            sizes[part][0] += entry.compress_size
            sizes[part][1] += entry.file_size
    sizes["the wheel"] = [wheel.stat().st_size, sum(size[1] for size in sizes.values())]
    rows = "\n".join(f"| {name} | {small / 1e6:.2f} | {large / 1e6:.2f} |" for name, (small, large) in sizes.items())
    return f"`{wheel.name}`:\n\n| | MB to download | MB installed |\n|---|---|---|\n{rows}"


def main() -> None:
    (wheel,) = map(Path, sys.argv[1:])
    found = table(wheel)
    print(found)
    if wheel.stat().st_size > LARGEST:
        sys.exit(f"wheel_size: error: {wheel.name} must have at most {LARGEST / 1e6:.0f} MB")
    if os.environ.get("SUBSPACE_CUDA", "").upper() == "OFF":
        return
    before = PAGE.read_text(encoding="utf-8")
    after = re.sub(
        r"(<!-- sizes -->\n).*?(<!-- /sizes -->)",
        lambda markers: f"{markers[1]}{found}\n{markers[2]}",
        before,
        flags=re.DOTALL,
    )
    PAGE.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
