"""Write the figures of docs/model_card.md from the header of the weights that ship.

python -m experiments.pretraining.model_card [--check]

--check changes nothing and fails where the page is not what the header gives. Run it after the weights were replaced.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from pathlib import Path

from subspace3d.backbones.vggt import NANO_WEIGHTS
from subspace3d.files import load_tensors, sha256

PAGE = Path(__file__).resolve().parents[2] / "docs/model_card.md"
NAMES = {
    "scenes": "number",
    "frames": "views",
    "abs_rel": "Abs Rel",
    "abs_rel_constant": "of the best constant",
    "times_better": "times better",
    "rotation_error_median_deg": "rotation error, median",
    "rotation_error_mean_deg": "mean",
    "translation_error_median_deg": "translation direction, median",
    "translation_error_mean_deg": "mean",
    "edge_recall": "edges found",
    "edge_precision": "of those predicted, true",
}

# What a small model that sees should reach; edges are better higher, everything else lower.
GOALS = {
    ("heldout", "abs_rel"): 0.035,
    ("circles", "abs_rel"): 0.035,
    ("heldout", "rotation_error_median_deg"): 2.0,
    ("heldout", "rotation_error_mean_deg"): 5.0,
    ("circles", "rotation_error_median_deg"): 2.0,
    ("circles", "rotation_error_mean_deg"): 5.0,
    ("heldout", "translation_error_median_deg"): 5.0,
    ("circles", "translation_error_median_deg"): 5.0,
    ("heldout", "edge_recall"): 0.5,
    ("circles", "edge_recall"): 0.5,
    ("bodies", "rotation_error_median_deg"): 15.0,
}
GOAL_NAMES = {
    "abs_rel": "Abs Rel",
    "rotation_error_median_deg": "rotation error, median",
    "rotation_error_mean_deg": "rotation error, mean",
    "translation_error_median_deg": "translation direction, median",
    "edge_recall": "depth edges found within 2 pixels",
}


def shown(name: str, value: float) -> str:
    """A figure as the table has it."""
    if name.endswith("_deg"):
        return f"{value:.1f}°"
    if name.startswith("edge"):
        return f"{100 * value:.0f} %"
    return f"{value:.3f}" if name.startswith("abs_rel") else f"{value:.2f}" if name == "times_better" else f"{value}"


def table(names: list[str], rows: list[list[str]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def content(path: Path) -> str:
    tensors, header = load_tensors(path)
    data, rows = header["data"], header["held_out"]
    parameters = sum(math.prod(tensor.shape) for tensor in tensors.values())
    training = [
        [name, f"{record['steps']:,}", f"{recipe['images_per_step']}", " to ".join(map(str, recipe["frames"])),
         f"{recipe['lr']:g}", f"{recipe['camera_weight']:g}", f"{record['seconds'] / 60:.0f} min"]
        for name, stage in header["stages"].items()
        for recipe, record in [(stage["recipe"], stage["training"])]
    ]  # fmt: skip
    evaluation = [[kind, *(shown(name, row[name]) for name in NAMES)] for kind, row in rows.items()]
    goals = [
        [f"{GOAL_NAMES[name]}, {kind}", shown(name, rows[kind][name]), shown(name, goal)]
        for (kind, name), goal in GOALS.items()
        if name in rows.get(kind, {})
    ]
    return "\n\n".join(
        [
            f"{parameters:,} numbers in {len(tensors)} tensors, float16, {path.stat().st_size / 1e6:.1f} MB; sha256 "
            f"`{sha256(path)}`.",
            f"Trained on {data['scenes']:,} scenes of {data['views']} views:",
            table(["stage", "steps", "images a step", "frames", "peak rate", "camera weight", "time"], training),
            "Measured on scenes it has not seen:",
            table(["scenes", *NAMES.values()], evaluation),
            "Beside what a small model that sees should reach:",
            table(["", "these weights", "goal"], goals),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail where the page is out of date")
    check = parser.parse_args().check
    before = PAGE.read_text(encoding="utf-8")
    written = content(NANO_WEIGHTS)
    after = re.sub(
        r"(<!-- figures -->\n).*?(<!-- /figures -->)",
        lambda found: f"{found[1]}{written}\n{found[2]}",
        before,
        flags=re.DOTALL,
    )
    if check:
        sys.exit(f"{PAGE} is out of date: python -m experiments.pretraining.model_card" if after != before else 0)
    PAGE.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
