"""Where the effective weight beats the plan beside it: the constants behind `choose_effective` of subspace_ext.

python benchmarks/crossover.py [--core 64] [--rounds 5] [--precision fp32] [--shapes qkv proj fc1 fc2] [--clock wall]

Times forward and backward of both plans over growing numbers of tokens, a fresh effective weight in every step, and
reads off the tokens at which the ratio passes one.
"""

from __future__ import annotations

import argparse
import math

import torch

from subspace3d.bench import harness
from subspace3d.bench.linear import training_step
from subspace3d.bench.peers import PEERS, PRECISIONS, make_problem
from subspace3d.bench.shapes import SHAPES

TOKENS = (64, 128, 256, 512, 1024, 2048, 4096)


def crossing(tokens: list[int], ratios: list[float]) -> float:
    """Tokens at which effective / beside falls to one for good, interpolated in log tokens; inf if it never does."""
    last = max((index for index, ratio in enumerate(ratios) if ratio > 1), default=-1)
    if last == -1:
        return float(tokens[0])
    if last == len(tokens) - 1:
        return math.inf
    share = (ratios[last] - 1) / (ratios[last] - ratios[last + 1])
    return math.exp(math.log(tokens[last]) + share * (math.log(tokens[last + 1]) - math.log(tokens[last])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--core", type=int, default=64, help="K")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=PRECISIONS, default=None, help="default: autocast on a GPU, else fp32")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--clock", choices=list(harness.CLOCKS), default="wall", help="process: on a shared machine")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = arguments.precision or ("autocast" if device.type == "cuda" else "fp32")
    print(f"{harness.device_name(device)}, {precision}, K = {arguments.core}; effective / beside by tokens")
    lines, at = [], {}
    for name in arguments.shapes:
        shape = SHAPES[name]
        ratios = []
        for tokens in TOKENS:
            problem = make_problem(shape.in_features, shape.out_features, tokens, arguments.core, 16, precision, device)
            steps = {plan: training_step(problem, PEERS[plan](problem)) for plan in ("factored", "fold")}
            timings = harness.measure(steps, "factored", device, arguments.rounds, 0.02, arguments.clock)
            ratios.append(timings["fold"].ratio[0])
        at[name] = crossing(list(TOKENS), ratios)
        lines.append([name, *(f"{ratio:.2f}" for ratio in ratios), f"{at[name]:.0f}"])
    print(harness.table(["", *map(str, TOKENS), "crossing"], lines))
    finite = [value for value in at.values() if math.isfinite(value)]
    if finite:
        middle = math.exp(sum(map(math.log, finite)) / len(finite))
        shares = [at[name] / min(SHAPES[name].in_features, SHAPES[name].out_features) for name in at]
        print(f"tokens from which effective pays, geometric mean: {middle:.0f} (EFFECTIVE_TOKENS_CUDA on a GPU)")
        print(f"as a share of min(out, in), the rule on a CPU: {min(shares):.2f} to {max(shares):.2f}")


if __name__ == "__main__":
    main()
