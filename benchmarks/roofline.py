"""Roofline model of one linear layer on an H100: what arithmetic and memory traffic allow. Nothing here is measured.

python benchmarks/roofline.py

Every kernel takes max(operations / FLOPS, bytes / BANDWIDTH) + LAUNCH. The kernels of PEFT LoRA are those its op list
shows under bfloat16; Unsloth's and LoRAFusion's are read from their source. Pure bfloat16, one layer, one step.
"""

from __future__ import annotations

from collections.abc import Callable

from subspace3d.bench.shapes import BLOCKS, TOKENS_PER_VIEW, LinearShape
from subspace3d.bench.shapes import SHAPES as NAMED_SHAPES

SHAPES = tuple(NAMED_SHAPES.values())
FLOPS = 790e12  # bfloat16 products, the rate large library GEMMs reach
BANDWIDTH = 3.0e12  # bytes a second that large copies reach
LAUNCH = 2e-6  # a dependent kernel in a CUDA graph
SKINNY = 0.95  # share of the bandwidth that narrow products and elementwise kernels reach
FOLDING = 0.85  # the same for the fold, which reads and writes in tiles
TRITON = 1.05  # LoRAFusion's product against the library's; with SKINNY this gives the speed-up its authors publish
R = 16

Cost = tuple[float, float]  # seconds forward, backward


def kernel(operations: float, moved: float, share: float = 1.0, launch: float = LAUNCH) -> float:
    return max(operations / FLOPS, moved / (BANDWIDTH * share)) + launch


def product(m: int, n: int, depth: int, launch: float = LAUNCH) -> float:
    return kernel(2.0 * m * n * depth, 2.0 * (m * depth + depth * n + m * n), launch=launch)


def narrow(m: int, n: int, depth: int) -> float:
    return kernel(2.0 * m * n * depth, 2.0 * (m * depth + depth * n + m * n), SKINNY)


def elementwise(moved: float) -> float:
    return kernel(0.0, moved, SKINNY)


def frozen(tokens: int, shape: LinearShape) -> Cost:
    """Both products without launches: the floor that the ratios refer to."""
    i, o = shape.in_features, shape.out_features
    return product(tokens, o, i, launch=0.0), product(tokens, i, o, launch=0.0)


def fold(core: int) -> Callable[[int, LinearShape], Cost]:
    def cost(tokens: int, shape: LinearShape) -> Cost:
        i, o = shape.in_features, shape.out_features
        folding = kernel(2.0 * i * o * core, 6.0 * i * o, FOLDING)  # float32 in, bfloat16 out
        core_gradient = kernel(2.0 * tokens * core**2, 4.0 * tokens * core, SKINNY) + LAUNCH
        return folding + product(tokens, o + core, i), product(tokens, i + core, o) + core_gradient

    return cost


def factored(core: int) -> Callable[[int, LinearShape], Cost]:
    def cost(tokens: int, shape: LinearShape) -> Cost:
        i, o = shape.in_features, shape.out_features

        def chain(width: int) -> float:
            return kernel(2.0 * tokens * core * (width + core), 2.0 * tokens * (width + 2 * core), SKINNY)

        core_gradient = kernel(2.0 * tokens * core**2, 4.0 * tokens * core, SKINNY) + LAUNCH
        return chain(i) + product(tokens, o, i + core), chain(o) + product(tokens, i, o + core) + core_gradient

    return cost


def peft_lora(tokens: int, shape: LinearShape) -> Cost:
    i, o = shape.in_features, shape.out_features
    forward = product(tokens, o, i) + narrow(tokens, R, i) + narrow(tokens, o, R)
    forward += elementwise(4.0 * tokens * o) + elementwise(6.0 * tokens * o)  # * scaling, +
    backward = elementwise(4.0 * tokens * o) + narrow(o, R, tokens) + narrow(tokens, R, o) + narrow(R, i, tokens)
    backward += narrow(tokens, i, R) + product(tokens, i, o) + elementwise(6.0 * tokens * i)
    return forward, backward


def unsloth(tokens: int, shape: LinearShape) -> Cost:
    i, o = shape.in_features, shape.out_features
    forward = product(tokens, o, i) + narrow(tokens, R, i) + kernel(2.0 * tokens * R * o, 4.0 * tokens * o, SKINNY)
    backward = 2 * narrow(tokens, R, o) + narrow(tokens, R, i) + narrow(i, R, tokens) + narrow(o, R, tokens)
    backward += product(tokens, i, o) + kernel(2.0 * tokens * R * i, 4.0 * tokens * i, SKINNY)
    return forward, backward


def lorafusion(tokens: int, shape: LinearShape) -> Cost:
    i, o = shape.in_features, shape.out_features
    forward = narrow(tokens, R, i) + TRITON * product(tokens, o, i + R)
    backward = elementwise(8.0 * tokens * R) + narrow(tokens, 2 * R, o) + elementwise(6.0 * tokens * R)
    backward += narrow(R, i, tokens) + TRITON * product(tokens, i, o + R)
    return forward, backward


LAYERS: dict[str, Callable[[int, LinearShape], Cost]] = {
    "frozen": frozen,
    "fold K=64": fold(64),
    "fold K=256": fold(256),
    "factored K=64": factored(64),
    f"PEFT LoRA r={R}": peft_lora,
    f"Unsloth r={R}": unsloth,
    f"LoRAFusion r={R}": lorafusion,
}


def markdown(views: tuple[int, ...] = (2, 8, 24)) -> str:
    """Milliseconds of all 192 linears and, in brackets, the ratio to the frozen floor."""
    lines = ["| modelled, H100, bfloat16 | " + " | ".join(f"{count} views" for count in views) + " |"]
    lines.append("|---" * (len(views) + 1) + "|")
    for name, cost in LAYERS.items():
        cells = []
        for count in views:
            tokens = count * TOKENS_PER_VIEW
            total, floor = (BLOCKS * sum(sum(layer(tokens, shape)) for shape in SHAPES) for layer in (cost, frozen))
            cells.append(f"{1e3 * total:.1f} ms ({total / floor:.2f})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
