"""Write the tables of benchmarks/README.md from results/*.jsonl, the newest row of every case.

python benchmarks/table.py [--check]

--check changes nothing and fails where the README is not what the results give.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import roofline

from subspace3d.bench.harness import one_device, read_rows
from subspace3d.bench.peers import label

FOLDER = Path(__file__).parent
README = FOLDER / "README.md"
Row = dict[str, Any]

CASE_KEYS = (
    "benchmark", "peer", "shape", "views", "K", "r", "precision", "checkpointing", "backbone", "layers", "N", "k",
    "iterations", "varies", "clock", "threads", "model", "spectrum",
)  # fmt: skip


def newest(rows: Iterable[Row]) -> list[Row]:
    """The last row of every case, in the order of the cases' first appearance."""
    found: dict[tuple, Row] = {}
    for row in rows:
        found[tuple(row.get(key) for key in CASE_KEYS)] = row
    return list(found.values())


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(line) + " |" for line in (header, *rows)]
    lines.insert(1, "|---" * len(header) + "|")
    return "\n".join(lines)


def groups(rows: list[Row], *keys: str) -> list[list[Row]]:
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    return list(found.values())


def time_of(row: Row) -> str:
    return f"{row['clock']} time, {row['threads']} thread{'s' if row['threads'] > 1 else ''}"


def ratio(row: Row, prefix: str = "") -> str:
    return f"{row[f'{prefix}ratio']:.2f} ({row[f'{prefix}ratio_10']:.2f}-{row[f'{prefix}ratio_90']:.2f})"


def linear_tables(rows: list[Row]) -> Iterable[str]:
    for case in groups(rows, "views", "K", "r", "precision", "clock", "threads"):
        first = case[0]
        shapes = list(dict.fromkeys(row["shape"] for row in case))
        floor = sum(row["seconds"] for row in case if row["peer"] == "frozen")
        lines = []
        for of_peer in groups(case, "peer"):
            timed = [row for row in of_peer if "seconds" in row]
            if len(timed) < len(shapes):
                continue
            total = sum(row["seconds"] for row in timed)
            cost = timed[0].get("python_us")
            lines.append(
                [
                    label(timed[0]["peer"], first["K"], first["r"]),
                    *(ratio(row) for row in timed),
                    f"{total / floor:.2f}",
                    f"{1e3 * total:.1f}",
                    f"{sum(row['saved_bytes_per_token'] for row in timed):.0f}",
                    f"{sum(row['trained'] for row in timed):,}",
                    "" if cost is None else f"{cost:.0f} / {timed[0]['python_kept_us']:.0f}",
                ]
            )
        header = ["", *shapes, "all", "ms", "saved B/token", "trained", "Python us, fresh / kept fold"]
        case_name = f"{first['views']} views ({first['tokens']:,} tokens), {first['precision']}, {time_of(first)}"
        meaning = "forward and backward, ratio to the frozen linear of the same round (10-90 %)"
        yield f"**linear**, {case_name}: {meaning}\n\n{markdown(header, lines)}"
        excluded = sorted(
            {f"{label(row['peer'], row['K'], row['r'])}: {row['excluded']}" for row in case if "excluded" in row}
        )
        if excluded:
            yield "Not timed: " + "; ".join(excluded) + "."


def model_tables(rows: list[Row], what: str, names: Callable[[Row], str]) -> Iterable[str]:
    for case in groups(rows, "views", "K", "r", "precision", "backbone", "clock", "threads"):
        first = case[0]
        lines = []
        for row in case:
            if "seconds" not in row:
                continue
            lora = next(
                (other for other in case if other["peer"] == "lora" and other["checkpointing"] == row["checkpointing"]),
                row,
            )
            lines.append(
                [
                    names(row) + (", checkpointed" if row["checkpointing"] else ""),
                    f"{1e3 * row['seconds']:.0f}",
                    ratio(row),
                    f"{row['seconds'] / lora['seconds']:.2f}",
                    f"{row['saved_bytes'] / 2**20:.1f}",
                    f"{row['saved_bytes'] / lora['saved_bytes']:.2f}",
                    f"{row['trained']:,}",
                ]
            )
        header = ["", "ms", "/ without adapters (10-90 %)", "/ PEFT", "saved MiB", "/ PEFT", "trained"]
        backbone = f" of {first['backbone']}" if "backbone" in first else ""
        case_name = f"{first['views']} views, {first['precision']}, {time_of(first)}"
        yield f"**{what}**{backbone}, {case_name}\n\n{markdown(header, lines)}"


def _name(row: Row) -> str:
    return {
        "frozen": "frozen",
        "off": "adapters off",
        "lora": f"PEFT LoRA r={row['r']}",
        "subspace": f"subspace K={row['K']}",
    }[row["peer"]]


def mining_tables(rows: list[Row]) -> Iterable[str]:
    for case in groups(rows, "layers", "N", "r", "k", "iterations", "clock", "threads", "model", "spectrum"):
        first = case[0]
        lines = [
            [
                f"{row['shape']} {row['out']}x{row['in']}",
                str(row["layers"]),
                f"{row['seconds']:.2f}",
                f"{1e3 * row['seconds'] / row['layers']:.0f}",
                f"{1e3 * row['reference_seconds_a_matrix']:.0f}" if "reference_seconds_a_matrix" in row else "",
                *(
                    [f"{row['dense_scaled_seconds']:,.0f}", f"{row['dense_scaled_seconds'] / row['seconds']:,.0f}",
                     f"{row['error']:.0e}"]
                    if "error" in row
                    else [""] * 3
                ),
            ]
            for row in case
        ]  # fmt: skip
        total, matrices = (sum(row[key] for row in case) for key in ("seconds", "layers"))
        dense = sum(row.get("dense_scaled_seconds", 0.0) for row in case)
        if len(case) > 1:
            compared = [f"{dense:,.0f}", f"{dense / total:,.0f}"] if dense else ["", ""]
            lines.append(["all", str(matrices), f"{total:.2f}", f"{1e3 * total / matrices:.0f}", "", *compared, ""])
        header = ["", "matrices", "s", "ms / matrix", "reference", "dense s, scaled", "times faster", "error"]
        memory = max((row.get("peak_memory_bytes", 0) for row in case), default=0)
        # rows of before there was a choice
        what = f"model {first.get('model', 'mean')}, adapters {first.get('spectrum', 'planted')}"
        yield (
            f"**mining**, {what}, N = {first['N']}, r = {first['r']}, k = {first['k']}, {first['iterations']}"
            f" iterations, {time_of(first)}\n\n{markdown(header, lines)}"
        )
        if memory:
            yield f"Peak memory of the process: {memory / 2**30:.2f} GiB."


def sweep_tables(rows: list[Row]) -> Iterable[str]:
    lines = [
        [
            str(row["layers"]),
            str(row["N"]),
            str(row["r"]),
            f"{row['seconds']:.3f}",
            f"{1e3 * row['seconds'] / row['layers']:.1f}",
        ]
        for row in rows
    ]
    yield "**mining**, growth\n\n" + markdown(["layers", "N", "r", "s", "ms / layer"], lines)


def render(path: Path) -> str:
    """The section of one device.

    Raises:
        ValueError: the rows are of more than one device.
    """
    rows = read_rows(path)
    device = one_device(rows)
    rows = newest(rows)
    by_benchmark = {
        name: [row for row in rows if row["benchmark"] == name]
        for name in dict.fromkeys(row["benchmark"] for row in rows)
    }
    writers: dict[str, Callable[[list[Row]], Iterable[str]]] = {
        "linear": linear_tables,
        "block": lambda chosen: model_tables(chosen, "block", _name),
        "step": lambda chosen: model_tables(chosen, "step", _name),
        "mining": mining_tables,
        "mining-sweep": sweep_tables,
    }
    parts = [f"### {device}"]
    for name, writer in writers.items():
        if name in by_benchmark:
            parts += writer(by_benchmark[name])
            parts.append(_origin(by_benchmark[name]))
    return "\n\n".join(parts)


def _origin(rows: list[Row]) -> str:
    origins = dict.fromkeys(f"`{row['command']}`, commit {row['commit']}, torch {row['torch']}" for row in rows)
    return "; ".join(origins) + "."


def updated(text: str) -> str:
    """The README with what stands between its markers written anew."""
    measured = "\n\n".join(render(path) for path in sorted((FOLDER / "results").glob("*.jsonl"))) or "No results yet."
    for name, content in (("results", measured), ("model", roofline.markdown())):
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", flags=re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"{README} must hold the markers <!-- {name} --> and <!-- /{name} -->")
        text = pattern.sub(lambda found, content=content: f"{found[1]}{content}\n{found[2]}", text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail where the README is out of date")
    check = parser.parse_args().check
    before = README.read_text(encoding="utf-8")
    after = updated(before)
    if check:
        sys.exit(f"{README} is out of date: python benchmarks/table.py" if after != before else 0)
    README.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
