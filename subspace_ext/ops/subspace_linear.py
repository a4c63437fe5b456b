"""`subspace_linear`: a frozen linear layer plus a low-rank update of which only the K x K core is trained.

One implementation (`_forward`, `_backward`) stands behind two entries: an `autograd.Function`, which is cheaper in
eager mode, and the library op `subspace_ext::subspace_linear`, which `torch.compile` can trace.

Folded weights come as a `Folded`: alone, or in the corner of an augmented matrix with which one product gives y and p,
and one product dx and g.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from subspace_ext.ops.core_grad import core_grad
from subspace_ext.ops.fold_weight import fold_weight
from subspace_ext.ops.rank_update import rank_update_
from subspace_ext.ops.rank_update_ref import accumulation_dtype

PLANS = ("auto", "fold", "factored")

# Tokens from which folding pays on a GPU: the roofline crossover for 1024-wide layers and K = 64 on an H100 (below
# it, rewriting the weight moves more bytes than the low-rank chain saves).
FOLD_TOKENS_CUDA = 1000


class Folded(NamedTuple):
    """A fold made before the call, in the dtype of the call."""

    weight: Tensor  # w_eff [out, in]
    augmented: Tensor | None = None  # [[w_eff, U], [V^T, 0]] of at least [out + K, in + K]; holds weight
    bias: Tensor | None = None  # [out + K]: the layer's bias and zeros, where it has one and augmented is there


def choose_fold(plan: str, tokens: int, w: Tensor, exact: bool = True) -> bool:
    """True when the plan is "fold", or "auto" and folding is the better choice for this call.

    A weight that exists only in half precision is not folded by "auto" unless the fold is rounded stochastically
    (`exact` False): an update smaller than half a unit in its last place would be lost. On CPU folding pays from about
    min(out, in) tokens. Measured on one AVX-512 core in float32, fold against factored in microseconds: [192, 192],
    K=32: 64 tokens 88 / 77, 256 tokens 226 / 270; [576, 192], K=32: 256 tokens 649 / 690; [1024, 1024], K=64: 256
    tokens 7695 / 6924, 4096 tokens 142k / 160k; [3072, 1024], K=64: 256 tokens 36.6k / 28.7k, 1024 tokens 79k / 111k.
    """
    if plan != "auto":
        return plan == "fold"
    if exact and w.dtype in (torch.bfloat16, torch.float16):
        return False
    return tokens >= (FOLD_TOKENS_CUDA if w.device.type == "cuda" else min(w.shape[0], w.shape[1]))


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype a matrix product of `x` takes under the active autocast, or None when autocast leaves it alone."""
    device_type = x.device.type
    if device_type not in ("cpu", "cuda") or not torch.is_autocast_enabled(device_type) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device_type)


def without_autocast(device_type: str):
    """A context in which products keep the dtype of their operands; free when autocast is off."""
    if device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def check_update(w: Tensor, bias: Tensor | None, U: Tensor, c: Tensor, V: Tensor) -> None:
    """Check a frozen weight [out, ...] and its update against each other.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """
    if w.dim() < 2:
        raise ValueError(f"w must be [out, in], got shape {tuple(w.shape)}")
    out_size, in_size = w.shape[0], w[0].numel()
    if U.dim() != 2 or U.shape[0] != out_size:
        raise ValueError(f"U must be [out, K] with out = {out_size}, got shape {tuple(U.shape)}")
    rank = U.shape[1]
    for name, tensor, shape, rule in (("c", c, (rank, rank), "[K, K]"), ("V", V, (in_size, rank), "[in, K]")):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {rule} = {list(shape)} to match w and U, got shape {tuple(tensor.shape)}")
    if bias is not None and tuple(bias.shape) != (out_size,):
        raise ValueError(f"bias must be [out] = [{out_size}], got shape {tuple(bias.shape)}")
    for name, frozen in (("w", w), ("bias", bias), ("U", U), ("V", V)):
        if frozen is not None and frozen.requires_grad:
            raise ValueError(f"{name} must be frozen (only x and c get gradients), got requires_grad=True")
    for name, other in (("bias", bias), ("U", U), ("c", c), ("V", V)):
        if other is not None and other.device != w.device:
            raise ValueError(f"{name} must be on the device of w, {w.device}, got {other.device}")


def check_input(x: Tensor, w: Tensor, bias: Tensor | None, U: Tensor, c: Tensor, V: Tensor, autocast: bool) -> None:
    """Check device and dtypes of a call; under autocast any floating dtypes may meet.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """
    if x.device != w.device:
        raise ValueError(f"x must be on the device of w, {w.device}, got {x.device}")
    if not x.is_floating_point():
        raise ValueError(f"x must have a floating dtype, got {x.dtype}")
    if autocast:
        return
    if w.dtype != x.dtype:
        raise ValueError(f"w must have the dtype of x, {x.dtype} (or run under torch.autocast), got {w.dtype}")
    if bias is not None and bias.dtype != x.dtype:
        raise ValueError(f"bias must have the dtype of x, {x.dtype}, got {bias.dtype}")
    for name, tensor in (("U", U), ("c", c), ("V", V)):
        if tensor.dtype not in (x.dtype, torch.float32):
            raise ValueError(f"{name} must have the dtype of x, {x.dtype}, or torch.float32, got {tensor.dtype}")


def _shaped(matrix: Tensor, leading: torch.Size) -> Tensor:
    """matrix [T, n] as [*leading, n] over the same memory, but no view to autograd: a caller may write to it."""
    return torch.ops.aten._unsafe_view(matrix, (*leading, matrix.shape[1]))


def _forward(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    u: Tensor,
    c: Tensor,
    v: Tensor,
    scale: float,
    fold: bool,
    project: bool,
    folded: Folded | None = None,
) -> tuple[Tensor, Tensor]:
    """y [..., out] and p = x v [T, K] in the dtype of x; p has no rows unless `project`."""
    dtype = x.dtype
    out_size, rank = u.shape
    linear = torch.nn.functional.linear
    with without_autocast(x.device.type):
        tokens = x.reshape(-1, x.shape[-1])
        if fold and project and folded is not None and folded.augmented is not None:
            both = linear(tokens, folded.augmented[: out_size + rank, : x.shape[-1]], folded.bias)
            # Copied out: a view saved for backward would keep all of y.
            return _shaped(both[:, :out_size], x.shape[:-1]), both[:, out_size:].contiguous()
        narrow_bias = None if bias is None else bias.to(dtype)
        p = tokens @ v.to(dtype) if project or not fold else tokens.new_empty(0, rank)
        if fold:
            w_eff = fold_weight(w, u, c, v, scale, dtype) if folded is None else folded.weight
            y = linear(tokens, w_eff, narrow_bias)
        else:
            core = c.to(accumulation_dtype(dtype)).t()
            y = rank_update_(linear(tokens, w.to(dtype), narrow_bias), p, core, u, scale)
            p = p if project else tokens.new_empty(0, rank)
    return y if x.dim() == 2 else _shaped(y, x.shape[:-1]), p


def _backward(
    dy: Tensor,
    dp: Tensor | None,
    p: Tensor | None,
    w: Tensor,
    u: Tensor,
    c: Tensor,
    v: Tensor,
    scale: float,
    fold: bool,
    needs: tuple[bool, bool],
    folded: Folded | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """dx = dy w_eff + dp v^T [..., in] and dc = scale * (dy u)^T p [K, K], each only where `needs` asks for it."""
    dtype = dy.dtype
    in_size, rank = v.shape
    dx = dc = g = None
    with without_autocast(dy.device.type):
        rows = dy.reshape(-1, dy.shape[-1])
        if all(needs) and folded is not None and folded.augmented is not None:
            both = rows @ folded.augmented[: rows.shape[1], : in_size + rank]
            dx, g = both[:, :in_size], both[:, in_size:]
        elif needs[1] or not fold:
            g = rows @ u.to(dtype)
        if needs[0] and dx is None:
            if fold:
                dx = rows @ (fold_weight(w, u, c, v, scale, dtype) if folded is None else folded.weight)
            else:
                assert g is not None
                dx = rank_update_(rows @ w.to(dtype), g, c.to(accumulation_dtype(dtype)), v, scale)
        if dx is not None:
            if dp is not None and dp.shape[0] == rows.shape[0]:
                dx = dx + dp @ v.to(dtype).t()
            dx = _shaped(dx, dy.shape[:-1])
        if needs[1]:
            assert g is not None and p is not None
            dc = core_grad(g, p, scale).to(c.dtype)
    return dx, dc


class _SubspaceLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, bias, u, c, v, scale, fold, folded):
        project = c.requires_grad
        y, p = _forward(x, w, bias, u, c, v, scale, fold, project, folded)
        weight, augmented = (None, None) if folded is None else folded[:2]
        # Kept through autograd, which notices when a later fold writes into the same memory.
        ctx.save_for_backward(p if project else None, w, u, c, v, weight, augmented)
        ctx.scale, ctx.fold = scale, fold
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        p, w, u, c, v, weight, augmented = ctx.saved_tensors
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[4])
        folded = None if weight is None else Folded(weight, augmented)
        dx, dc = _backward(dy, None, p, w, u, c, v, ctx.scale, ctx.fold, needs, folded)
        return dx, None, None, None, dc, None, None, None, None


torch.library.define(
    "subspace_ext::subspace_linear",
    "(Tensor x, Tensor w, Tensor? bias, Tensor u, Tensor c, Tensor v, float scale, bool fold, bool project,"
    " Tensor? w_eff=None) -> (Tensor, Tensor)",
)


@torch.library.register_kernel("subspace_ext::subspace_linear", "default")
def _library_forward(x, w, bias, u, c, v, scale, fold, project, w_eff=None):
    return _forward(x, w, bias, u, c, v, scale, fold, project, None if w_eff is None else Folded(w_eff))


@torch.library.register_fake("subspace_ext::subspace_linear")
def _fake(x, w, bias, u, c, v, scale, fold, project, w_eff=None):
    tokens = x.numel() // x.shape[-1]
    y = x.new_empty(*x.shape[:-1], w.shape[0])
    return y, x.new_empty(tokens if project else 0, v.shape[1])


def _library_setup(ctx, inputs, output) -> None:
    x, w, _bias, u, c, v, scale, fold, project, w_eff = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1] if project else None, w, u, c, v, w_eff)
    ctx.scale, ctx.fold, ctx.leading = scale, fold, x.shape[:-1]


def _library_backward(ctx, dy, dp):
    p, w, u, c, v, w_eff = ctx.saved_tensors
    needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[4])
    if dy is None:
        dy = w.new_zeros(*ctx.leading, w.shape[0], dtype=v.dtype if dp is None else dp.dtype)
    folded = None if w_eff is None else Folded(w_eff)
    dx, dc = _backward(dy, dp, p, w, u, c, v, ctx.scale, ctx.fold, needs, folded)
    return dx, None, None, None, dc, None, None, None, None, None


torch.library.register_autograd("subspace_ext::subspace_linear", _library_backward, setup_context=_library_setup)


def apply_checked(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    u: Tensor,
    c: Tensor,
    v: Tensor,
    scale: float,
    fold: bool,
    folded: Folded | None = None,
) -> Tensor:
    """`subspace_linear` after its checks and casts; `folded` is a fold made before."""
    if torch.compiler.is_compiling():
        project = c.requires_grad and torch.is_grad_enabled()
        w_eff = None if folded is None else folded.weight
        return torch.ops.subspace_ext.subspace_linear(x, w, bias, u, c, v, scale, fold, project, w_eff)[0]
    if torch.is_grad_enabled() and (x.requires_grad or c.requires_grad):
        return _SubspaceLinear.apply(x, w, bias, u, c, v, scale, fold, folded)
    return _forward(x, w, bias, u, c, v, scale, fold, False, folded)[0]


def subspace_linear(
    x: Tensor, w: Tensor, bias: Tensor | None, U: Tensor, c: Tensor, V: Tensor, scale: float = 1.0, plan: str = "auto"
) -> Tensor:
    """y = x w^T + bias + scale * ((x V) c^T) U^T.

    Gradients go to `x` and `c`; `w`, `bias`, `U` and `V` are frozen. Saved for backward per token: p = x V alone,
    and nothing when `c` needs no gradient. Under `torch.autocast` the op computes in the autocast dtype, as
    `torch.nn.functional.linear` does.

    Args:
        x: [..., in] with any leading sizes, zero included.
        w: [out, in] of the dtype of x.
        bias: [out] of the dtype of x, or None.
        U: [out, K] of the dtype of x, or float32.
        c: [K, K] of the dtype of x, or float32 (recommended: it is what the optimiser changes in small steps).
        V: [in, K] of the dtype of x, or float32.
        scale: factor s of the update.
        plan: "fold" builds w_eff = cast(w + scale * U c V^T) and multiplies once; "factored" computes the low-rank
            chain beside the frozen product; "auto" chooses by the number of tokens (see `choose_fold`).

    Returns:
        [..., out], of the dtype of x, or the autocast dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not match, a frozen argument requires a gradient, unknown plan.
    """
    if plan not in PLANS:
        raise ValueError(f"plan must be one of {', '.join(PLANS)}, got {plan!r}")
    if w.dim() != 2:
        raise ValueError(f"w must be [out, in], got shape {tuple(w.shape)}")
    check_update(w, bias, U, c, V)
    if x.dim() == 0 or x.shape[-1] != w.shape[1]:
        raise ValueError(f"x must be [..., in] with in = {w.shape[1]}, got shape {tuple(x.shape)}")
    dtype = autocast_dtype(x)
    check_input(x, w, bias, U, c, V, autocast=dtype is not None)
    if dtype is not None:
        x = x.to(dtype)
    return apply_checked(x, w, bias, U, c, V, float(scale), choose_fold(plan, x.numel() // w.shape[1], w))
