"""How much of an update a bfloat16 layer sees: gain and noise of every way to add it, on this package's own layers.

python benchmarks/numerics.py [--size 1024] [--tokens 2048] [--core 64]

With E = s U C V^T of relative size rms(E) / rms(W), Y the layer's output and Y0 its output without the update:
gain = <Y - Y0, X E^T> / |X E^T|^2 (1: all of the update is seen), noise = the rest of Y - Y0 relative to |X E^T|,
error = |Y - exact| / |exact| with exact in float64.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import subspace_ext as se

SIZES = (1e-4, 1e-3, 3e-3, 1e-2, 1e-1)
WEIGHT_STD = 0.02


class Seen(NamedTuple):
    gain: float
    noise: float
    error: float


class Case:
    """One weight, input and direction of the update; methods give outputs at a relative size of the update."""

    def __init__(self, size: int, tokens: int, core: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weight = WEIGHT_STD * torch.randn(size, size, generator=generator)
        self.x = torch.randn(tokens, size, generator=generator).bfloat16().float()
        self.u, self.v = (torch.linalg.qr(torch.randn(size, core, generator=generator)).Q for _ in range(2))
        c = torch.randn(core, core, generator=generator)
        update = self.u @ c @ self.v.t()
        self.unit_core = c * (WEIGHT_STD / update.square().mean().sqrt())  # relative size 1

    def _linear(self, dtype: torch.dtype) -> nn.Linear:
        linear = nn.Linear(*self.weight.shape[::-1], bias=False)
        linear.weight.data = self.weight.to(dtype)
        return linear.requires_grad_(False)

    @torch.no_grad()
    def subspace(self, plan: str, dtype: torch.dtype) -> Callable[[float], Tensor]:
        """A SubspaceLinear whose weight exists in `dtype`; float32 runs under bfloat16 autocast."""
        layer = se.SubspaceLinear.from_linear(self._linear(dtype), self.u, self.v, plan=plan)
        return self._runner(layer, lambda size: layer.c.copy_(size * self.unit_core), dtype)

    @torch.no_grad()
    def lora(self) -> Callable[[float], Tensor]:
        """The same update as a stock PEFT LoRA, lora_B = U and lora_A = C V^T, under bfloat16 autocast."""
        from peft import LoraConfig, get_peft_model

        model = nn.Module()
        model.linear = self._linear(torch.float32)
        core = self.u.shape[1]
        tuned = get_peft_model(model, LoraConfig(r=core, lora_alpha=core, target_modules=["linear"]))
        layer: Any = tuned.get_submodule("base_model.model.linear")
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        b.copy_(self.u)
        return self._runner(layer, lambda size: a.copy_(size * self.unit_core @ self.v.t()), torch.float32)

    def frozen(self) -> Tensor:
        """Output of the frozen layer in bfloat16."""
        return nn.functional.linear(self.x.bfloat16(), self.weight.bfloat16())

    def _runner(
        self, layer: nn.Module, set_size: Callable[[float], Any], dtype: torch.dtype
    ) -> Callable[[float], Tensor]:
        @torch.no_grad()
        def outputs(size: float) -> Tensor:
            set_size(size)
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
                return layer(self.x.to(dtype))

        return outputs

    def exact(self, size: float, dtype: torch.dtype = torch.float32) -> Tensor:
        """float64 output for the weight as it exists in `dtype`."""
        update = size * (self.u.double() @ self.unit_core.double() @ self.v.double().t())
        return self.x.double() @ (self.weight.to(dtype).double() + update).t()

    def seen(self, outputs: Callable[[float], Tensor], size: float, dtype: torch.dtype = torch.float32) -> Seen:
        exact = self.exact(size, dtype)
        wanted = exact - self.exact(0.0, dtype)
        y = outputs(size).double()
        moved = y - outputs(0.0).double()
        gain = (moved * wanted).sum() / wanted.square().sum()
        noise = (moved - gain * wanted).norm() / wanted.norm()
        return Seen(float(gain), float(noise), float((y - exact).norm() / exact.norm()))

    def frozen_error(self) -> float:
        exact = self.exact(0.0)
        return float((self.frozen().double() - exact).norm() / exact.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024, help="in and out features")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--core", type=int, default=64, help="K")
    arguments = parser.parse_args()
    case = Case(arguments.size, arguments.tokens, arguments.core)
    half = torch.bfloat16
    columns = {
        "effective, float32 weight": (case.subspace("effective", torch.float32), torch.float32),
        "effective, bfloat16 weight": (case.subspace("effective", half), half),
        "beside, float32 weight": (case.subspace("beside", torch.float32), torch.float32),
        "PEFT LoRA": (case.lora(), torch.float32),
    }
    print("| rms(E) / rms(W) | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for size in SIZES:
        found = [case.seen(outputs, size, dtype) for outputs, dtype in columns.values()]
        cells = [f"{seen.gain:.2f}, noise {seen.noise:.2g}, error {seen.error:.2e}" for seen in found]
        print(f"| {size:.0e} | " + " | ".join(cells) + " |")
    print(f"\nerror of the frozen bfloat16 layer: {case.frozen_error():.2e}")


if __name__ == "__main__":
    main()
