"""One linear layer with every adapter that is compared: the peers' own code, on the same weight, bias and input."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import subspace_ext as se

UPDATE_SIZE = 1e-2
"""rms(delta W) / rms(W) of every adapter: about what fine-tuning ends with."""
SCALE = 2.0
WEIGHT_STD = 0.02
TINY_VECTOR = 64
"""Trained values of TinyLoRA a layer, PEFT's default."""
PRECISIONS = ("fp32", "bf16", "autocast")


@dataclass(frozen=True)
class Problem:
    """y = x w^T + bias, and the gradient dy that comes back; all float32 masters."""

    weight: Tensor  # [out, in]
    bias: Tensor  # [out]
    x: Tensor  # [T, in], in the precision's own dtype
    dy: Tensor  # [T, out]
    core: int  # K
    rank: int  # r
    precision: str  # fp32; bf16: weights and input in bfloat16; autocast: float32 under torch.autocast(bfloat16)

    @property
    def param_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def linear(self) -> nn.Linear:
        """The frozen layer every peer starts from."""
        out_features, in_features = self.weight.shape
        linear = nn.Linear(in_features, out_features, device=self.weight.device, dtype=self.param_dtype)
        linear.requires_grad_(False)
        linear.weight.copy_(self.weight)
        linear.bias.copy_(self.bias)
        return linear

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.precision == "autocast":
            return torch.autocast(self.weight.device.type, torch.bfloat16)
        return contextlib.nullcontext()


def make_problem(
    in_features: int, out_features: int, tokens: int, core: int, rank: int, precision: str, device: torch.device
) -> Problem:
    """Normal data: zeros and integers would flatter a GPU, whose clock follows the bits that flip."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    weight, bias = WEIGHT_STD * normal(out_features, in_features), WEIGHT_STD * normal(out_features)
    x, dy = normal(tokens, in_features), normal(tokens, out_features)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return Problem(weight, bias, x.to(dtype), dy, core, rank, precision)


@dataclass
class Peer:
    """A layer under test, and the dense update it stands for."""

    forward: Callable[[Tensor], Tensor]
    trained: dict[str, Tensor]
    owned: list[Tensor]  # parameters and buffers: memory that is there without a forward pass
    update: Callable[[Mapping[str, Tensor]], Tensor] | None = None  # trained values in float64 -> delta W [out, in]
    begin_step: Callable[[], None] = field(default=lambda: None)  # what an optimiser step makes necessary


def _owned(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _fit_size(delta: Tensor, weight: Tensor) -> float:
    """The factor that gives `delta` the relative size UPDATE_SIZE."""
    return float(UPDATE_SIZE * weight.norm() / delta.float().norm())


def frozen(problem: Problem) -> Peer:
    linear = problem.linear()
    return Peer(linear, {}, _owned(linear))


def _peft_lora(problem: Problem, rank: int) -> tuple[nn.Module, Peer]:
    from peft import LoraConfig, get_peft_model

    model = nn.Module()
    model.linear = problem.linear()
    tuned = get_peft_model(model, LoraConfig(r=rank, lora_alpha=int(SCALE * rank), target_modules=["linear"]))
    layer: Any = tuned.get_submodule("base_model.model.linear")
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        b.normal_()
        b.mul_(_fit_size(SCALE * b @ a, problem.weight))
    return layer, Peer(layer, {"a": a, "b": b}, _owned(layer), lambda t: SCALE * t["b"] @ t["a"])


def lora(problem: Problem) -> Peer:
    return _peft_lora(problem, problem.rank)[1]


def lora_wide(problem: Problem) -> Peer:
    return _peft_lora(problem, problem.core)[1]


def lora_compiled(problem: Problem) -> Peer:
    layer, peer = _peft_lora(problem, problem.rank)
    torch.compiler.reset()
    peer.forward = torch.compile(layer, fullgraph=True)
    return peer


class _LoraXs(nn.Module):
    """y = base(x) + SCALE * B (R (A x)) with only R trained, its products in the order of the published method."""

    def __init__(self, base: nn.Linear, core: int) -> None:
        super().__init__()
        factory: dict[str, Any] = {"bias": False, "device": base.weight.device, "dtype": base.weight.dtype}
        self.base = base
        self.a = nn.Linear(base.in_features, core, **factory)
        self.r = nn.Linear(core, core, **factory)
        self.b = nn.Linear(core, base.out_features, **factory)
        self.a.requires_grad_(False)
        self.b.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        y += self.b(self.r(self.a(x))) * SCALE
        return y


def lora_xs(problem: Problem) -> Peer:
    layer = _LoraXs(problem.linear(), problem.core)
    a, b, r = layer.a.weight, layer.b.weight, layer.r.weight
    with torch.no_grad():
        r.mul_(_fit_size(SCALE * b @ r @ a, problem.weight))
    return Peer(layer, {"r": r}, _owned(layer), lambda t: SCALE * b.double() @ t["r"] @ a.double())


def tinylora(problem: Problem) -> Peer:
    from peft import TinyLoraConfig, get_peft_model

    model = nn.Module()
    model.linear = problem.linear()
    tuned = get_peft_model(model, TinyLoraConfig(r=problem.core, u=TINY_VECTOR, target_modules=["linear"]))
    layer: Any = tuned.get_submodule("base_model.model.linear")
    a, b, p = (getattr(layer, f"tinylora_{name}")["default"] for name in "ABP")
    v = next(parameter for parameter in tuned.parameters() if parameter.requires_grad)
    with torch.no_grad():
        v.normal_()  # it may start at zero
        v.mul_(_fit_size(b.float() @ torch.einsum("u,uij->ij", v, p.to(v)).float() @ a.float(), problem.weight))
    owned = [*_owned(tuned), a, b, p]
    return Peer(
        layer, {"v": v}, owned, lambda t: b.double() @ torch.einsum("u,uij->ij", t["v"], p.to(t["v"])) @ a.double()
    )


def _factors(problem: Problem) -> tuple[Tensor, Tensor]:
    """Plain LoRA factors a [r, in] and b [out, r] in the dtype of the weight."""
    out_features, in_features = problem.weight.shape
    options: dict[str, Any] = {"device": problem.weight.device, "dtype": problem.param_dtype}
    a = torch.randn(problem.rank, in_features, **options).div_(math.sqrt(in_features))
    b = torch.randn(out_features, problem.rank, **options)
    b.mul_(_fit_size(SCALE * b @ a, problem.weight))
    return a.requires_grad_(), b.requires_grad_()


def unsloth(problem: Problem) -> Peer:
    """Unsloth's LoRA_W; it takes no bias, so one addition follows it."""
    from unsloth.kernels.fast_lora import LoRA_W

    linear, (a, b) = problem.linear(), _factors(problem)

    def forward(x: Tensor) -> Tensor:
        return LoRA_W.apply(x[None], linear.weight, None, a, b, SCALE)[0] + linear.bias

    return Peer(forward, {"a": a, "b": b}, [*_owned(linear), a, b], lambda t: SCALE * t["b"] @ t["a"])


def axolotl(problem: Problem) -> Peer:
    """Axolotl's LoRA_O, which takes the bias with it; neither dropout nor DoRA."""
    from axolotl.kernels.lora import LoRA_O

    linear, (a, b) = problem.linear(), _factors(problem)

    def forward(x: Tensor) -> Tensor:
        return LoRA_O.apply(x[None], None, linear.weight, linear.bias, None, a, b, SCALE, None, None)[0]

    return Peer(forward, {"a": a, "b": b}, [*_owned(linear), a, b], lambda t: SCALE * t["b"] @ t["a"])


def lorafusion(problem: Problem) -> Peer:
    """LoRAFusion's fused linear without dropout."""
    from lorafusion.ops.lora_v1 import fused_linear_lora

    linear, (a, b) = problem.linear(), _factors(problem)

    def forward(x: Tensor) -> Tensor:
        return fused_linear_lora(x[None], linear.weight, a, b, SCALE, linear_bias=linear.bias)[0]

    return Peer(forward, {"a": a, "b": b}, [*_owned(linear), a, b], lambda t: SCALE * t["b"] @ t["a"])


def _subspace(problem: Problem, plan: str, augments: bool = True) -> Peer:
    out_features, in_features = problem.weight.shape
    options: dict[str, Any] = {"device": problem.weight.device}
    u = torch.linalg.qr(torch.randn(out_features, problem.core, **options)).Q
    v = torch.linalg.qr(torch.randn(in_features, problem.core, **options)).Q
    layer = se.SubspaceLinear.from_linear(problem.linear(), u, v, SCALE, plan).train()
    layer.core.augments = augments
    with torch.no_grad():
        layer.c.normal_()
        layer.c.mul_(_fit_size(SCALE * u @ layer.c @ v.t(), problem.weight))

    def begin_step() -> None:
        # As after optimizer.step(): the core was written, so its effective weight is out of date.
        with torch.no_grad():
            layer.c.mul_(1)

    return Peer(
        layer, {"c": layer.c}, _owned(layer), lambda t: SCALE * u.double() @ t["c"] @ v.double().t(), begin_step
    )


def subspace_fold(problem: Problem) -> Peer:
    return _subspace(problem, "effective")


def subspace_fold_separate(problem: Problem) -> Peer:
    """The effective weight without the bases around it: one more product in each direction, results without gaps."""
    return _subspace(problem, "effective", augments=False)


def subspace_factored(problem: Problem) -> Peer:
    return _subspace(problem, "beside")


PEERS: dict[str, Callable[[Problem], Peer]] = {
    "frozen": frozen,
    "fold": subspace_fold,
    "fold-separate": subspace_fold_separate,
    "factored": subspace_factored,
    "lora": lora,
    "lora-wide": lora_wide,
    "lora-compiled": lora_compiled,
    "lora-xs": lora_xs,
    "tinylora": tinylora,
    "unsloth": unsloth,
    "axolotl": axolotl,
    "lorafusion": lorafusion,
}


def label(name: str, core: int, rank: int) -> str:
    """What a table calls a peer."""
    return {
        "frozen": "frozen linear",
        "fold": f"subspace fold K={core}",
        "fold-separate": f"subspace fold, separate products K={core}",
        "factored": f"subspace factored K={core}",
        "lora": f"PEFT LoRA r={rank}",
        "lora-wide": f"PEFT LoRA r={core}",
        "lora-compiled": f"PEFT LoRA r={rank}, compiled",
        "lora-xs": f"LoRA-XS order K={core}",
        "tinylora": f"PEFT TinyLoRA K={core}",
        "unsloth": f"Unsloth LoRA_W r={rank}",
        "axolotl": f"axolotl LoRA_O r={rank}",
        "lorafusion": f"LoRAFusion r={rank}",
    }[name]


# ---- is it right? ----------------------------------------------------------------------------------------------------
LIMITS = {"fp32": 1e-5, "bf16": 2e-2, "autocast": 2e-2}
"""Largest relative error that passes: several times what rounding in the precision gives, far below a wrong formula."""


def errors(problem: Problem, peer: Peer, tokens: int) -> dict[str, float]:
    """|result - exact| / |exact| of y, dx and every gradient on the first `tokens` tokens; exact is dense float64."""
    x = problem.x[:tokens].detach().requires_grad_()
    peer.begin_step()
    with problem.autocast():
        y = peer.forward(x)
    dy = problem.dy[:tokens]
    grads = torch.autograd.grad(y, [x, *peer.trained.values()], dy.to(y.dtype))
    exact_x = x.detach().double().requires_grad_()
    exact_trained = {name: value.detach().double().requires_grad_() for name, value in peer.trained.items()}
    weight = problem.weight.double()
    if peer.update is not None:
        weight = weight + peer.update(exact_trained)
    exact_y = exact_x @ weight.t() + problem.bias.double()
    exact = torch.autograd.grad(exact_y, [exact_x, *exact_trained.values()], dy.double())
    names = ["y", "dx", *(f"d{name}" for name in peer.trained)]
    pairs = zip(names, (y.detach(), *grads), (exact_y.detach(), *exact))
    return {name: float((got.double() - want).norm() / want.norm()) for name, got, want in pairs}


def admitted(problem: Problem, names: Iterable[str], tokens: int) -> Iterator[tuple[str, Peer | str, dict[str, float]]]:
    """(name, peer, its errors) for every peer that is there and right; for the others a reason in the peer's place."""
    for name in names:
        torch.manual_seed(0)
        try:
            peer = PEERS[name](problem)
            found = errors(problem, peer, tokens)
        except ImportError as error:
            yield name, f"not installed ({error})", {}
            continue
        except Exception as error:
            # a peer is somebody else's code: whatever it raises, the others are still measured
            first = (str(error).splitlines() or [""])[0]
            yield name, f"fails: {type(error).__name__}: {first[:160]}", {}
            continue
        limit = LIMITS[problem.precision]
        wrong = {key: value for key, value in found.items() if not value <= limit}
        if wrong:
            said = ", ".join(f"{key} off by {value:.1e}" for key, value in wrong.items())
            yield name, f"wrong: {said} (limit {limit:g})", found
        else:
            yield name, peer, found
