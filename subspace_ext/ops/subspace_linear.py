"""`subspace_linear`: a frozen linear layer plus a low-rank update of which only the K x K core is trained.

One implementation (`_forward`, `_backward`) stands behind two entries: an `autograd.Function`, which is cheaper in
eager mode, and the library op `subspace_ext::subspace_linear`, which `torch.compile` can trace.

A core that keeps its effective weight goes a third way, `effective_linear`: with that weight in the corner of an
augmented matrix one product gives y and p, and one product dx and g. A base layer of any other kind keeps its own
forward, and `add_beside` adds the update to what it returns.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad

from subspace_ext.ops.core_grad import core_grad
from subspace_ext.ops.effective_weight import effective_weight
from subspace_ext.ops.first_order import first_order
from subspace_ext.ops.rank_update import rank_update_
from subspace_ext.ops.rank_update_ref import accumulation_dtype

PLANS = ("auto", "effective", "beside")
_FORMER_PLANS = {"fold": "effective", "factored": "beside"}

# Tokens from which the effective weight pays on a GPU: the roofline crossover for 1024-wide layers and K = 64 on an
# H100 (below it, rewriting the weight moves more bytes than the low-rank chain saves).
EFFECTIVE_TOKENS_CUDA = 1000

_interpreters = torch._C._functorch.peek_interpreter_stack
_tracing_state = torch._C._get_tracing_state
# torch 2.6 has no such question, and takes an export for a compilation
exporting = getattr(torch.compiler, "is_exporting", lambda: False)


class Effective:
    """An effective weight made before the call, and what goes with it; all in the dtype of the call."""

    __slots__ = ("augmented", "bias", "spent", "u", "v", "weight")

    def __init__(
        self, weight: Tensor, u: Tensor, v: Tensor, bias: Tensor | None, augmented: Tensor | None = None
    ) -> None:
        self.weight = weight  # w_eff, shaped like w
        self.u = u  # scale * U [out, K]: all it is used for is dc = scale * g^T p
        self.v = v  # [in, K]
        self.bias = bias  # [out], or [out + K] filled up with zeros beside an augmented
        self.augmented = augmented  # [[w_eff, s U], [V^T, 0]] of at least [out + K, in + K]; holds weight, u and v
        self.spent = False  # a backward pass has given the core a gradient: whoever uses it may change the core now


def checked_plan(plan: str) -> str:
    """The plan; "fold" and "factored", its names in release 0.1, still stand for "effective" and "beside".

    Raises:
        ValueError: no such plan.
    """
    if plan in PLANS:
        return plan
    if plan not in _FORMER_PLANS:
        raise ValueError(f"plan must be one of {', '.join(PLANS)}, got {plan!r}")
    now = _FORMER_PLANS[plan]
    warnings.warn(f"plan {plan!r} is now called {now!r}", DeprecationWarning, stacklevel=3)
    return now


def choose_effective(plan: str, tokens: int, w: Tensor, exact: bool = True) -> bool:
    """True when the plan is "effective", or "auto" and the effective weight is the better choice for this call.

    "auto" makes none of a weight that exists only in half precision, unless it is rounded stochastically (`exact`
    False): an update smaller than half a unit in its last place would be lost. On CPU it pays from about min(out, in)
    tokens. Measured on one AVX-512 core in float32, effective against beside in microseconds: [192, 192], K=32: 64
    tokens 88 / 77, 256 tokens 226 / 270; [576, 192], K=32: 256 tokens 649 / 690; [1024, 1024], K=64: 256 tokens 7695 /
    6924, 4096 tokens 142k / 160k; [3072, 1024], K=64: 256 tokens 36.6k / 28.7k, 1024 tokens 79k / 111k.
    """
    if plan != "auto":
        return plan == "effective"
    if exact and w.dtype in (torch.bfloat16, torch.float16):
        return False
    return tokens >= (EFFECTIVE_TOKENS_CUDA if w.device.type == "cuda" else min(w.shape[0], w.shape[1]))


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


def check_core(U: Tensor, c: Tensor, V: Tensor, out_size: int | None = None, in_size: int | None = None) -> None:
    """Check bases and core against each other, and against the sides of a weight where they are given.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """
    if U.dim() != 2 or (out_size is not None and U.shape[0] != out_size):
        rule = "" if out_size is None else f" with out = {out_size}"
        raise ValueError(f"U must be [out, K]{rule}, got shape {tuple(U.shape)}")
    rank = U.shape[1]
    if tuple(c.shape) != (rank, rank):
        raise ValueError(f"c must be [K, K] = {[rank, rank]} to match w and U, got shape {tuple(c.shape)}")
    if V.dim() != 2 or V.shape[1] != rank or (in_size is not None and V.shape[0] != in_size):
        rule = f"[in, {rank}]" if in_size is None else f"{[in_size, rank]}"
        raise ValueError(f"V must be [in, K] = {rule} to match w and U, got shape {tuple(V.shape)}")


def check_update(w: Tensor, bias: Tensor | None, U: Tensor, c: Tensor, V: Tensor) -> None:
    """Check a frozen weight [out, ...] and its update against each other.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """
    if w.dim() < 2:
        raise ValueError(f"w must be [out, in], got shape {tuple(w.shape)}")
    out_size = w.shape[0]
    check_core(U, c, V, out_size, w[0].numel())
    if bias is not None and tuple(bias.shape) != (out_size,):
        raise ValueError(f"bias must be [out] = [{out_size}], got shape {tuple(bias.shape)}")
    for name, frozen in (("w", w), ("bias", bias), ("U", U), ("V", V)):
        if frozen is not None and frozen.requires_grad:
            raise ValueError(f"{name} must be frozen (only x and c get gradients), got requires_grad=True")


def check_input(x: Tensor, w: Tensor, bias: Tensor | None, U: Tensor, c: Tensor, V: Tensor, autocast: bool) -> None:
    """Check devices and dtypes of a call; under autocast any floating dtypes may meet.

    Raises:
        ValueError: naming the argument, the rule and the value.
    """
    if x.device != w.device:
        raise ValueError(f"x must be on the device of w, {w.device}, got {x.device}")
    for name, other in (("bias", bias), ("U", U), ("c", c), ("V", V)):
        if other is not None and other.device != w.device:
            raise ValueError(f"{name} must be on the device of w, {w.device}, got {other.device}")
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
    effective: bool,
    project: bool,
    w_eff: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y [..., out] and p = x v [T, K] in the dtype of x; p has no rows unless `project`."""
    dtype, rank = x.dtype, u.shape[1]
    linear = torch.nn.functional.linear
    with without_autocast(x.device.type):
        tokens = x.reshape(-1, x.shape[-1])
        narrow_bias = None if bias is None else bias.to(dtype)
        p = tokens @ v.to(dtype) if project or not effective else tokens.new_empty(0, rank)
        if effective:
            y = linear(tokens, effective_weight(w, u, c, v, scale, dtype) if w_eff is None else w_eff, narrow_bias)
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
    effective: bool,
    needs: tuple[bool, bool],
    w_eff: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """dx = dy w_eff + dp v^T [..., in] and dc = scale * (dy u)^T p [K, K], each only where `needs` asks for it."""
    dtype = dy.dtype
    dx = dc = None
    with without_autocast(dy.device.type):
        rows = dy.reshape(-1, dy.shape[-1])
        g = rows @ u.to(dtype) if needs[1] or not effective else None
        if needs[0]:
            if effective:
                dx = rows @ (effective_weight(w, u, c, v, scale, dtype) if w_eff is None else w_eff)
            else:
                assert g is not None
                dx = rank_update_(rows @ w.to(dtype), g, c.to(accumulation_dtype(dtype)), v, scale)
            if dp is not None and dp.shape[0] == rows.shape[0]:
                dx = dx + dp @ v.to(dtype).t()
            dx = _shaped(dx, dy.shape[:-1])
        if needs[1]:
            assert g is not None and p is not None
            dc = core_grad(g, p, scale).to(c.dtype)
    return dx, dc


class _SubspaceLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, bias, u, c, v, scale, effective):
        project = c.requires_grad
        y, p = _forward(x, w, bias, u, c, v, scale, effective, project)
        ctx.save_for_backward(p if project else None, w, u, c, v)
        ctx.scale, ctx.effective = scale, effective
        return y

    @staticmethod
    @first_order
    def backward(ctx, dy):
        p, w, u, c, v = ctx.saved_tensors
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[4])
        dx, dc = _backward(dy, None, p, w, u, c, v, ctx.scale, ctx.effective, needs)
        return dx, None, None, None, dc, None, None, None


class _EffectiveLinear(torch.autograd.Function):
    """The effective plan on a kept weight: only products, since its Python runs for every layer in every step."""

    @staticmethod
    def forward(ctx, x, c, effective):
        weight, bias, augmented = effective.weight, effective.bias, effective.augmented
        tokens = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        if not c.requires_grad:
            ctx.save_for_backward(weight)
            return _shaped(torch.nn.functional.linear(tokens, weight, _own_bias(effective)), x.shape[:-1])
        u, v = effective.u, effective.v
        if augmented is None:
            y, p = torch.nn.functional.linear(tokens, weight, bias), torch.mm(tokens, v)
            y = y if x.dim() == 2 else _shaped(y, x.shape[:-1])
        else:
            out_size, rank = u.shape
            both = torch.nn.functional.linear(tokens, augmented[: out_size + rank, : tokens.shape[1]], bias)
            # Copied out: a view saved for backward would keep all of y.
            y, p = _shaped(both[:, :out_size], x.shape[:-1]), both[:, out_size:].contiguous()
        # Kept through autograd, which notices when a later weight is written into the same memory.
        ctx.save_for_backward(weight, p, u)
        ctx.effective, ctx.core_dtype = effective, c.dtype
        return y

    @staticmethod
    @first_order
    def backward(ctx, dy):
        needs_x, needs_c, _ = ctx.needs_input_grad
        rows = dy if dy.dim() == 2 else dy.reshape(-1, dy.shape[-1])
        if not needs_c:
            weight = ctx.saved_tensors[0]
            return _shaped(rows @ weight, dy.shape[:-1]) if needs_x else None, None, None
        weight, p, u = ctx.saved_tensors
        ctx.effective.spent = True
        dx, augmented = None, ctx.effective.augmented
        if augmented is not None and needs_x:
            in_size = weight.shape[1]
            both = rows @ augmented[: u.shape[0], : in_size + u.shape[1]]
            dx, g = _shaped(both[:, :in_size], dy.shape[:-1]), both[:, in_size:]
        else:
            g = torch.mm(rows, u)
            if needs_x:
                dx = torch.mm(rows, weight)
                dx = dx if dy.dim() == 2 else _shaped(dx, dy.shape[:-1])
        dc = core_grad(g, p, 1.0)
        return dx, dc if dc.dtype == ctx.core_dtype else dc.to(ctx.core_dtype), None


def _own_bias(effective: Effective) -> Tensor | None:
    bias = effective.bias
    return bias if bias is None or effective.augmented is None else bias[: effective.u.shape[0]]


def effective_linear(x: Tensor, effective: Effective, c: Tensor) -> Tensor:
    """y [..., out] from x [..., in] in the dtype of the weight, which was made from this `c`; autocast must be off."""
    if torch.is_grad_enabled() and (x.requires_grad or c.requires_grad):
        return _EffectiveLinear.apply(x, c, effective)
    return torch.nn.functional.linear(x, effective.weight, _own_bias(effective))


class _Beside(torch.autograd.Function):
    """y + scale * ((x v) c^T) u^T; saves p = x v alone for each token, and the bases as they are held."""

    @staticmethod
    def forward(ctx, y, x, u, c, v, scale):
        tokens = x.reshape(-1, x.shape[-1])
        p = tokens @ v.to(x.dtype)
        core = c.to(accumulation_dtype(x.dtype)).t()
        sum_ = rank_update_(y.reshape(-1, y.shape[-1]).clone(), p, core, u, scale)
        ctx.save_for_backward(p if c.requires_grad else None, u, c, v)
        ctx.scale, ctx.leading = scale, x.shape[:-1]
        return _shaped(sum_, y.shape[:-1])

    @staticmethod
    @first_order
    def backward(ctx, dy):
        p, u, c, v = ctx.saved_tensors
        _, needs_x, _, needs_c, _, _ = ctx.needs_input_grad
        rows = dy.reshape(-1, dy.shape[-1])
        g = rows @ u.to(dy.dtype)
        dx = dc = None
        if needs_x:
            zeros = rows.new_zeros(rows.shape[0], v.shape[0])
            core = c.to(accumulation_dtype(dy.dtype))
            dx = _shaped(rank_update_(zeros, g, core, v, ctx.scale), ctx.leading)
        if needs_c:
            dc = core_grad(g, p, ctx.scale).to(c.dtype)
        return dy, dx, None, dc, None, None


def add_beside(y: Tensor, x: Tensor, u: Tensor, c: Tensor, v: Tensor, scale: float) -> Tensor:
    """y + scale * ((x v) c^T) u^T in the dtype of `y`, which came out of a base layer of any kind.

    Gradients go to `y`, `x` and `c`, whatever the grad mode of the bases.

    Args:
        y: [..., out].
        x: [..., in], cast to the dtype of y; or a nested tensor of rows, as y then is.
        u, c, v: [out, K], [K, K], [in, K]; c may be the result of other operations.
        scale: factor s of the update.
    """
    with without_autocast(y.device.type):
        x = x.to(y.dtype)
        if x.is_nested:
            update = x
            for factor in (v.t(), c, scale * u):
                update = torch.nn.functional.linear(update, factor.to(y.dtype))
            return y + update
        if plain_operations_only():
            wide = accumulation_dtype(y.dtype)
            p = (x @ v.to(y.dtype)).to(wide)
            return y + (scale * (p @ c.to(wide).t())).to(y.dtype) @ u.to(y.dtype).t()
        return _Beside.apply(y, x, u, c, v, scale)


def plain_operations_only() -> bool:
    """Whether someone looks at each operation: a compiler, an export, a trace, or one who differentiates forward."""
    return torch.compiler.is_compiling() or transforming()


def transforming() -> bool:
    """Whether a transform of torch.func, forward-mode differentiation or torch.jit.trace is under way.

    Their tensors have no address, or carry what an address does not show.
    """
    return _interpreters() is not None or forward_ad._current_level >= 0 or _tracing_state() is not None


torch.library.define(
    "subspace_ext::subspace_linear",
    "(Tensor x, Tensor w, Tensor? bias, Tensor u, Tensor c, Tensor v, float scale, bool effective, bool project,"
    " Tensor? w_eff=None) -> (Tensor, Tensor)",
)


@torch.library.register_kernel("subspace_ext::subspace_linear", "default")
def _library_forward(x, w, bias, u, c, v, scale, effective, project, w_eff=None):
    return _forward(x, w, bias, u, c, v, scale, effective, project, w_eff)


@torch.library.register_fake("subspace_ext::subspace_linear")
def _fake(x, w, bias, u, c, v, scale, effective, project, w_eff=None):
    tokens = x.numel() // x.shape[-1]
    y = x.new_empty(*x.shape[:-1], w.shape[0])
    return y, x.new_empty(tokens if project else 0, v.shape[1])


def _library_setup(ctx, inputs, output) -> None:
    x, w, _bias, u, c, v, scale, effective, project, w_eff = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1] if project else None, w, u, c, v, w_eff)
    ctx.scale, ctx.effective, ctx.leading = scale, effective, x.shape[:-1]


def _library_backward(ctx, dy, dp):
    p, w, u, c, v, w_eff = ctx.saved_tensors
    needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[4])
    if torch.is_grad_enabled():
        w_eff = None  # made without a graph: dx would not depend on c
    if dy is None:
        dy = w.new_zeros(*ctx.leading, w.shape[0], dtype=v.dtype if dp is None else dp.dtype)
    dx, dc = _backward(dy, dp, p, w, u, c, v, ctx.scale, ctx.effective, needs, w_eff)
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
    effective: bool,
    w_eff: Tensor | None = None,
) -> Tensor:
    """`subspace_linear` after its checks and casts; `w_eff` is an effective weight for use while compiling."""
    compiling = torch.compiler.is_compiling()
    if compiling and not exporting():
        project = c.requires_grad and torch.is_grad_enabled()
        return torch.ops.subspace_ext.subspace_linear(x, w, bias, u, c, v, scale, effective, project, w_eff)[0]
    if compiling or transforming():
        return add_beside(
            torch.nn.functional.linear(x, w.to(x.dtype), None if bias is None else bias.to(x.dtype)), x, u, c, v, scale
        )
    if torch.is_grad_enabled() and (x.requires_grad or c.requires_grad):
        return _SubspaceLinear.apply(x, w, bias, u, c, v, scale, effective)
    return _forward(x, w, bias, u, c, v, scale, effective, False)[0]


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
        plan: "effective" builds w_eff = cast(w + scale * U c V^T) and multiplies once; "beside" computes the low-rank
            chain beside the frozen product; "auto" chooses by the number of tokens (see `choose_effective`).

    Returns:
        [..., out], of the dtype of x, or the autocast dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not match, a frozen argument requires a gradient, unknown plan.
    """
    plan = checked_plan(plan)
    if w.dim() != 2:
        raise ValueError(f"w must be [out, in], got shape {tuple(w.shape)}")
    check_update(w, bias, U, c, V)
    if x.dim() == 0 or x.shape[-1] != w.shape[1]:
        raise ValueError(f"x must be [..., in] with in = {w.shape[1]}, got shape {tuple(x.shape)}")
    dtype = autocast_dtype(x)
    check_input(x, w, bias, U, c, V, autocast=dtype is not None)
    if dtype is not None:
        x = x.to(dtype)
    return apply_checked(x, w, bias, U, c, V, float(scale), choose_effective(plan, x.numel() // max(1, w.shape[1]), w))
