"""The subspace that the low-rank updates of several adapters share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from subspace_ext.column_space import ColumnSpace, column_space, extended_gram, settle
from subspace_ext.ops.irls import MODELS, irls
from subspace_ext.ops.irls_result import APART, SPREAD, IrlsResult, Model, nonzero_median

_LARGEST_PRODUCT = 1e300  # leaves eight digits for sums over entries


@dataclass(frozen=True)
class MinedSubspace:
    """Shared subspace of N adapters; the leading axis [L] is there when the input had it.

    u and v have orthogonal columns; their squared lengths are the strengths of the directions. With columns of unit
    length, u^ and v^, adapter n is nearly u v^T (model "mean") or u^ cores[n] v^^T ("shared"). u and v have the dtype
    of the adapters; everything else is float64, n_iter int64, converged bool.
    """

    u: Tensor  # [..., out, k], strongest direction first, entry of largest magnitude positive
    v: Tensor  # [..., in, k]
    singular_values: Tensor  # [..., s], s = min(N r, out, in), descending: "mean": the whole spectrum of the weighted
    # mean; "shared": (sum_n w_n |u_i^T delta_n v^|^2 / sum_n w_n)^(1/2) for nonzero updates, at the median norm
    singular_values_v: Tensor  # [..., s], the same of the other side; for "mean" equal to singular_values
    cores: Tensor  # [..., N, k, k]: u^^T delta_n v^
    weights: Tensor  # [..., N], (e^2 + res_n^2)^(-(2-p)/2), not normalised; the last fit was made with them. "shared":
    # res_n is that of the update at the median norm
    residuals: Tensor  # [..., N]: |delta_n - u v^T|_F or |delta_n - u^ cores[n] v^^T|_F
    norms: Tensor  # [..., N]: |delta_n|_F
    objective: Tensor  # [..., max_iter + 1]: smoothed objective after 0, 1, ... re-weightings; NaN past n_iter
    n_iter: Tensor  # [...]: re-weightings done
    converged: Tensor  # [...]: what moves moved less than tol

    def update(self) -> Tensor:
        """[..., out, in]: u v^T for the model "mean"; in general u^ (weighted mean of the cores) v^^T."""
        share = (self.weights / self.weights.sum(-1, keepdim=True))[..., None, None]
        core = (share * self.cores).sum(-3).to(self.u.dtype)
        return _unit_columns(self.u) @ core @ _unit_columns(self.v).mT


def _unit_columns(matrix: Tensor) -> Tensor:
    lengths = torch.linalg.vector_norm(matrix, dim=-2, keepdim=True)
    return matrix / torch.where(lengths > 0, lengths, 1.0)


def _check_adapters(lora_b: Tensor, lora_a: Tensor) -> None:
    if lora_b.dim() not in (3, 4) or lora_a.dim() != lora_b.dim():
        raise ValueError(
            "lora_b and lora_a must be [N, out, r] and [N, r, in], or both with a leading layer axis,"
            f" got shapes {tuple(lora_b.shape)} and {tuple(lora_a.shape)}"
        )
    if lora_b.shape[:-2] != lora_a.shape[:-2] or lora_b.shape[-1] != lora_a.shape[-2]:
        raise ValueError(
            f"lora_a must be [..., N, r, in] with [..., N] = {list(lora_b.shape[:-2])} and r = {lora_b.shape[-1]}"
            f" as in lora_b, got shape {tuple(lora_a.shape)}"
        )
    for name, tensor in (("lora_b", lora_b), ("lora_a", lora_a)):
        if tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} must be torch.float32 or torch.float64, got {tensor.dtype}")
        if 0 in tensor.shape[-3:]:
            raise ValueError(f"{name} must have no empty axis but the layers', got shape {tuple(tensor.shape)}")
    if lora_b.dtype != lora_a.dtype or lora_b.device != lora_a.device:
        raise ValueError(
            f"lora_a must have the dtype and device of lora_b, {lora_b.dtype} on {lora_b.device},"
            f" got {lora_a.dtype} on {lora_a.device}"
        )


def _check_settings(
    lora_b: Tensor, lora_a: Tensor, k: int, model: str, p: float, eps: float, max_iter: int, tol: float
) -> None:
    for name, value in (("k", k), ("max_iter", max_iter)):
        if not hasattr(value, "__index__"):
            raise ValueError(f"{name} must be an integer, got {value!r}")
    adapters, out_size, rank = lora_b.shape[-3:]
    largest = min(adapters * rank, out_size, lora_a.shape[-1])
    if not 1 <= k <= largest:
        raise ValueError(
            f"k must be in 1..min(N r, out, in) = 1..{largest} (N = {adapters}, r = {rank}, out = {out_size},"
            f" in = {lora_a.shape[-1]}), got {k}"
        )
    if model not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {model!r}")
    if not 0 < p <= 2:
        raise ValueError(f"p must be in (0, 2], got {p}")
    if not eps > 0 or not torch.isfinite(torch.tensor(float(eps))):
        raise ValueError(f"eps must be positive and finite, got {eps}")
    if max_iter < 0:
        raise ValueError(f"max_iter must be 0 or more, got {max_iter}")
    if not tol >= 0:
        raise ValueError(f"tol must be 0 or more, got {tol}")


def _check_finite(name: str, stack: Tensor, first: int) -> None:
    """stack [L, N, ., .], `first` the number of its first layer. Raises ValueError naming layer and adapter."""
    finite = torch.isfinite(stack).flatten(2).all(dim=2)
    if not finite.all():
        layer, adapter = (~finite).nonzero()[0].tolist()
        raise ValueError(f"{name} must be finite, got NaN or Inf in layer {first + layer}, adapter {adapter}")


def _check_range(fits: Tensor, rule: str, first: int) -> None:
    """Raise ValueError with ``rule``, naming the layer, unless all of ``fits [L]`` are true."""
    if not fits.all():
        layer = first + int((~fits).nonzero()[0])
        raise ValueError(f"lora_b and lora_a must have {rule} (the range of float64), not so in layer {layer}")


def vanishing(lora_b: Tensor, lora_a: Tensor) -> Tensor:
    """Which updates are zero up to rounding: |lora_b lora_a|_F <= max(out, in, r) 2^-52 |lora_b|_F |lora_a|_F.

    An untrained PiSSA adapter, converted to trained minus initial factors, is such an update: its factors are not zero,
    and rounding would be mined as if it had been learnt.

    Args:
        lora_b: [..., out, r] float64.
        lora_a: [..., r, in] float64.

    Returns:
        [...] bool.
    """
    # shares of the largest entry: squares stay within the range of float64
    sides = []
    for side in (lora_b, lora_a.mT):
        peaks = side.abs().amax(dim=(-2, -1), keepdim=True)
        sides.append(side / torch.where(peaks > 0, peaks, 1.0))
    b, a = sides
    grams = b.mT @ b, a.mT @ a
    squares = [gram.diagonal(dim1=-2, dim2=-1).sum(-1) for gram in grams]
    whole = squares[0] * squares[1]
    # what the Gram matrices give is exact to 2^-52 |b|^2 |a|^2, so little is left to look at closely
    zero = (grams[0] * grams[1]).sum((-2, -1)) < 1e-8 * whole
    if zero.any():
        norms = torch.linalg.matrix_norm(torch.linalg.qr(b[zero]).R @ torch.linalg.qr(a[zero]).R.mT)
        limit = max(*b.shape[-2:], a.shape[-2]) * torch.finfo(b.dtype).eps
        zero[zero.clone()] = norms <= limit * whole[zero].sqrt()
    return zero | (whole == 0)


def mine_subspace(
    lora_b: Tensor,
    lora_a: Tensor,
    k: int,
    model: Model = "mean",
    p: float = 1.0,
    eps: float = 1e-3,
    max_iter: int = 50,
    tol: float = 1e-6,
) -> MinedSubspace:
    """min over the fits f_n of sum_n (e^2 + |delta_n - f_n|_F^2)^(p/2), delta_n = lora_b[n] lora_a[n].

    Here e = eps * median_n |delta_n|_F, and f_n depends on what the adapters are taken to share:

    - model "mean": one matrix, f_n = u v^T. From equal weights: the weighted mean M = sum_n w_n delta_n / sum_n w_n,
      its SVD M = L S R^T, u = L_k S_k^(1/2), v = R_k S_k^(1/2), then w_n = (e^2 + |delta_n - u v^T|^2)^(-(2-p)/2).
      p = 2 is the plain mean and one SVD.
    - model "shared": one subspace, f_n = U C_n V^T with orthonormal U and V and a core for every adapter. The core
      takes the scale of an adapter, so every delta_n is first brought to the median norm. From equal weights: V the
      leading right singular vectors of all w_n^(1/2) U^T delta_n stacked, then U likewise, then the weights as above.
      The result u is U with columns scaled by their strength, see `MinedSubspace`.

    Computed in float64 inside the column spaces of the stacked adapters, never on out x in matrices.

    The median is taken over the updates that are not zero (see `vanishing`); a layer whose updates are all zero gives
    u = v = 0, weights one and residuals zero. Singular values at rounding level (below max(shape) * 2^-52 * the
    largest) are returned as zero and give zero columns in u and v.

    Args:
        lora_b: [N, out, r] or [L, N, out, r], float32 or float64, scaling already applied.
        lora_a: [N, r, in] or [L, N, r, in], same dtype.
        k: columns of u and v, at most min(N r, out, in).
        model: "mean" or "shared".
        p: exponent in (0, 2]; smaller cares less about outliers.
        eps: smoothing relative to the median update norm.
        max_iter: re-weightings at most.
        tol: stop when no normalised weight ("mean") or no e^2 + residual^2 ("shared") moves by more than this,
            relatively.

    Raises:
        ValueError: shapes, dtypes or settings outside the rules above, NaN or Inf in an adapter (with its index),
            updates so large or small that they or their weights are no float64 numbers, or an update more than 1e150
            times the median.
    """
    _check_adapters(lora_b, lora_a)
    _check_settings(lora_b, lora_a, k, model, p, eps, max_iter, tol)
    single = lora_b.dim() == 3
    b, a = (lora_b.detach()[None], lora_a.detach()[None]) if single else (lora_b.detach(), lora_a.detach())
    parts = (MiningState(b[i:j], a[i:j], None, None, i).mine(k, model, p, eps, max_iter, tol) for i, j in _chunks(b, a))
    return _joined(list(parts), single)


def _chunks(b: Tensor, a: Tensor) -> Iterator[tuple[int, int]]:
    """Runs of layers whose float64 stacks stay below about 256 MB; on a GPU, which wants hundreds at once, 4 GB."""
    per_layer = 8 * (b[0].numel() + a[0].numel()) if len(b) else 1
    step = max(1, 2 ** (32 if b.is_cuda else 28) // per_layer)
    for start in range(0, max(len(b), 1), step):
        yield start, start + step


def _joined(parts: list[MinedSubspace], single: bool) -> MinedSubspace:
    fields = [torch.cat(column) for column in zip(*(vars(part).values() for part in parts))]
    return MinedSubspace(*(field[0] for field in fields) if single else fields)


@dataclass(frozen=True)
class MiningState:
    """Adapters together with the inner products that mining starts from, to which further adapters can be added.

    The exact result depends on every adapter, so a state holds them all: its memory grows with N r as theirs does, and
    the Gram matrices add (N r)^2 numbers a layer and side. What `extend` saves is the products of the old factors with
    each other. `mine` gives what `mine_subspace` gives for all the adapters at once.
    """

    lora_b: Tensor  # [L, N, out, r]
    lora_a: Tensor  # [L, N, r, in]
    gram_b: Tensor | None  # [L, N r, N r] float64, inner products of all columns of lora_b; None: not yet made
    gram_a: Tensor | None  # likewise of the rows of lora_a
    first: int = 0  # number of the first layer, for messages

    @classmethod
    def of(cls, lora_b: Tensor, lora_a: Tensor) -> MiningState:
        """State of adapters [L, N, out, r] and [L, N, r, in], or of one layer's without L; as in `mine_subspace`."""
        _check_adapters(lora_b, lora_a)
        b, a = lora_b.detach(), lora_a.detach()
        if b.dim() == 3:
            b, a = b[None], a[None]
        return cls(b, a, extended_gram(None, b.mT), extended_gram(None, a))

    def extend(self, lora_b: Tensor, lora_a: Tensor) -> MiningState:
        """State of these adapters and further ones of the same layers, of any rank; this state stays as it is.

        Raises:
            ValueError: another number of layers, other sizes, dtype or device.
        """
        other = MiningState.of(lora_b, lora_a)
        sizes = [(len(one.lora_b), one.lora_b.shape[2], one.lora_a.shape[3]) for one in (self, other)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"lora_b and lora_a must have the layers, out and in of the state, {sizes[0]}, got {sizes[1]}"
            )
        if other.lora_b.dtype != self.lora_b.dtype or other.lora_b.device != self.lora_b.device:
            raise ValueError(
                f"lora_b must have the dtype and device of the state, {self.lora_b.dtype} on {self.lora_b.device},"
                f" got {other.lora_b.dtype} on {other.lora_b.device}"
            )
        rank = max(self.lora_b.shape[3], other.lora_b.shape[3])
        one, two = self._of_rank(rank), other._of_rank(rank)
        b, a = torch.cat([one.lora_b, two.lora_b], 1), torch.cat([one.lora_a, two.lora_a], 1)
        grams = (extended_gram(one.gram_b, b.mT), extended_gram(one.gram_a, a))
        return MiningState(b, a, *grams)

    def _of_rank(self, rank: int) -> MiningState:
        """The factors padded with zeros, which leaves their products as they are."""
        adapters, missing = self.lora_b.shape[1], rank - self.lora_b.shape[3]
        if missing == 0:
            return self
        pad = torch.nn.functional.pad

        def spread(gram: Tensor | None) -> Tensor | None:
            if gram is None:
                return None
            blocks = gram.unflatten(2, (adapters, -1)).unflatten(1, (adapters, -1))
            return pad(blocks, (0, missing, 0, 0, 0, missing)).flatten(3, 4).flatten(1, 2)

        b, a = pad(self.lora_b, (0, missing)), pad(self.lora_a, (0, 0, 0, missing))
        return MiningState(b, a, spread(self.gram_b), spread(self.gram_a))

    def mine(
        self,
        k: int,
        model: Model = "mean",
        p: float = 1.0,
        eps: float = 1e-3,
        max_iter: int = 50,
        tol: float = 1e-6,
    ) -> MinedSubspace:
        """As `mine_subspace`; every field has the axis [L]."""
        _check_settings(self.lora_b, self.lora_a, k, model, p, eps, max_iter, tol)
        parts = []
        for start, end in _chunks(self.lora_b, self.lora_a):
            core = self._core(start, end)
            result = irls(core.b.triangle, core.a.triangle, self.lora_b.shape[1], k, p, eps, max_iter, tol, model)
            core.check(result)
            parts.append(core.finish(result, k, model, self.lora_b.dtype))
        return _joined(parts, False)

    def held_out(
        self,
        k: int,
        model: Model = "mean",
        p: float = 1.0,
        eps: float = 1e-3,
        max_iter: int = 50,
        tol: float = 1e-6,
    ) -> Tensor:
        """How far each adapter lies in the subspace of the others: |u^^T delta_n v^|_F^2 / |delta_n|_F^2, 0..1.

        u^ and v^ are mined from all adapters but n, with the settings of `mine`, in the column spaces of all.

        Returns:
            [L, N] float64; NaN for an update that is zero.

        Raises:
            ValueError: as `mine_subspace` for any N - 1 of the adapters; fewer than two adapters.
        """
        adapters = self.lora_b.shape[1]
        if adapters < 2:
            raise ValueError(f"lora_b and lora_a must have at least two adapters to hold one out, got {adapters}")
        _check_settings(self.lora_b[:, 1:], self.lora_a[:, 1:], k, model, p, eps, max_iter, tol)
        parts = []
        for start, end in _chunks(self.lora_b, self.lora_a):
            core = self._core(start, end)
            shares = []
            for n in range(adapters):
                others, own = core.chosen([m for m in range(adapters) if m != n]), core.chosen([n])
                factors = others.b.triangle, others.a.triangle
                result = irls(*factors, adapters - 1, k, p, eps, max_iter, tol, model)
                others.check(result)
                left, right, _, _ = others.directions(result, k, model)
                held, whole = (torch.linalg.matrix_norm(part[:, 0]) for part in (own.cores(left, right), own.whole()))
                shares.append((held / whole).square())
            parts.append(torch.stack(shares, 1))
        return torch.cat(parts)

    def _core(self, start: int, end: int) -> _Core:
        b, a = self.lora_b[start:end], self.lora_a[start:end]
        # One copy that widens and reorders at once.
        wide_b = b.transpose(1, 2).to(torch.float64, memory_format=torch.contiguous_format)
        stacked_b = wide_b.flatten(2)
        stacked_a = a.double().flatten(1, 2).mT
        grams = [None if gram is None else gram[start:end] for gram in (self.gram_b, self.gram_a)]
        (space_b, growth_b), (space_a, growth_a) = column_space(stacked_b, grams[0]), column_space(stacked_a, grams[1])
        growth = torch.stack([growth_b, growth_a]).cpu()
        if not torch.isfinite(growth).all():
            _check_finite("lora_b", b, self.first + start)
            _check_finite("lora_a", a, self.first + start)
        space_b, space_a = settle(space_b, growth[0]), settle(space_a, growth[1])
        largest = space_b.triangle.abs().amax(dim=(1, 2)) * space_a.triangle.abs().amax(dim=(1, 2))
        rule = f"largest entries with a product below about {_LARGEST_PRODUCT}"
        _check_range(largest < _LARGEST_PRODUCT, rule, self.first + start)
        core = _Core(space_b, space_a, b.shape[1], self.first + start)
        zero = vanishing(core._split(space_b.triangle), core._split(space_a.triangle).mT)
        if not zero.any():
            return core
        kept = (~zero).to(torch.float64).repeat_interleave(b.shape[3], dim=1).unsqueeze(1)
        return replace(core, b=space_b._replace(triangle=space_b.triangle * kept))


@dataclass(frozen=True)
class _Core:
    """A run of layers in the column spaces of their adapters: delta_n = Q_b (b_n a_n^T) Q_a^T."""

    b: ColumnSpace
    a: ColumnSpace
    adapters: int
    first: int  # number of the first layer, for messages

    def chosen(self, adapters: list[int]) -> _Core:
        """These adapters alone, in the column spaces of all."""

        def part(space: ColumnSpace) -> ColumnSpace:
            return space._replace(triangle=self._split(space.triangle)[:, adapters].transpose(1, 2).flatten(2))

        return _Core(part(self.b), part(self.a), len(adapters), self.first)

    def check(self, result: IrlsResult) -> None:
        _check_range(result.status != APART, f"no update of more than {SPREAD:g} times the median norm", self.first)
        # a weight is about the norm to the power p - 2
        fits = torch.isfinite(result.weights).all(dim=1) & (result.weights.amax(dim=1) > 0)
        _check_range(fits, "products that are zero or whose norm to the power p - 2 is a positive number", self.first)

    def finish(self, result: IrlsResult, k: int, model: Model, dtype: torch.dtype) -> MinedSubspace:
        """The fields of MinedSubspace, from exact decompositions with the last weights."""
        left, right, spectra, strengths = self.directions(result, k, model)
        u, v = self.b.embed(left), self.a.embed(right)
        signs = [_signs(side) for side in (u, v)]
        if model == "mean":
            signs[1] = signs[0]  # u v^T is the fit
        cores = self.cores(left, right) * signs[0].mT.unsqueeze(1) * signs[1].unsqueeze(1)
        scaled = [side * sign * strength.sqrt().unsqueeze(1) for side, sign, strength in zip((u, v), signs, strengths)]
        rest = (result.weights, result.residuals, result.norms, result.objective, result.n_iter, result.converged)
        return MinedSubspace(scaled[0].to(dtype), scaled[1].to(dtype), *spectra, cores, *rest)

    def _split(self, side: Tensor) -> Tensor:
        """[L, s, N r] -> [L, N, s, r]."""
        return side.unflatten(2, (self.adapters, -1)).transpose(1, 2)

    def cores(self, left: Tensor, right: Tensor) -> Tensor:
        """[L, N, k, k]: left^T delta_n right."""
        b, a = self._split(self.b.triangle), self._split(self.a.triangle)
        return (left.mT.unsqueeze(1) @ b) @ (right.mT.unsqueeze(1) @ a).mT

    def whole(self) -> Tensor:
        """[L, N, s_b, s_a]: the updates."""
        return self._split(self.b.triangle) @ self._split(self.a.triangle).mT

    def directions(
        self, result: IrlsResult, k: int, model: Model
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Orthonormal columns of both sides, both spectra, and the strengths of the columns."""
        share = result.weights / result.weights.amax(dim=1, keepdim=True)
        share = share / share.sum(dim=1, keepdim=True)
        return (self._mean if model == "mean" else self._shared)(share, result, k)

    def _mean(
        self, share: Tensor, result: IrlsResult, k: int
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        columns = self.b.triangle.shape[2] // self.adapters
        mean = (self.b.triangle * share.repeat_interleave(columns, dim=1).unsqueeze(1)) @ self.a.triangle.mT
        left, values, right = _svd(mean)
        left, right, strengths = left[:, :, :k], right[:, :k].mT, values[:, :k]
        return left, right, (values, values.clone()), (strengths, strengths)

    def _shared(
        self, share: Tensor, result: IrlsResult, k: int
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        b, a = self._split(self.b.triangle), self._split(self.a.triangle)
        units = nonzero_median(result.norms)[:, None]
        ratios = torch.where(result.norms > 0, units / result.norms, 1.0)
        # an update of zero lies in every subspace: its weight is the largest and says nothing of how strong this one is
        share = torch.where(result.norms > 0, share, 0.0)
        share = share / share.sum(dim=1, keepdim=True).clamp(min=torch.finfo(share.dtype).tiny)
        roots = (share.sqrt() * ratios)[:, :, None, None]

        def spectrum(one: Tensor, other: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
            """Of the updates, `one` their leading factor, projected on vectors of the other side."""
            projected = roots * one @ (vectors.mT.unsqueeze(1) @ other).mT
            left, values, _ = _svd(projected.transpose(1, 2).flatten(2))
            return left, values

        size = min(b.shape[2], a.shape[2])
        left, values_u = spectrum(b, a, result.v)
        left, strengths = left[:, :, :k], values_u[:, :k]
        _, values_v = spectrum(a, b, left)
        # v is the last but one half of a sweep: its directions are turned inside it, by the cores
        turn, strengths_v = spectrum(result.v.mT.unsqueeze(1) @ a, b, left)
        spectra = (_sized(values_u, size), _sized(values_v, size))
        return left, result.v @ turn, spectra, (strengths, strengths_v)


def _sized(values: Tensor, size: int) -> Tensor:
    return torch.nn.functional.pad(values[:, :size], (0, max(0, size - values.shape[1])))


def _signs(vectors: Tensor) -> Tensor:
    """[L, 1, k]: what makes each column's entry of largest magnitude positive."""
    pivots = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True))
    return torch.where(pivots < 0, -1.0, 1.0).to(vectors.dtype)


def _svd(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD in which what is at rounding level is zero; on the CPU, for cuSOLVER takes such matrices one by one."""
    peaks = matrices.abs().amax(dim=(1, 2), keepdim=True)
    peaks = torch.where(peaks > 0, peaks, 1.0)
    factors = torch.linalg.svd((matrices / peaks).cpu(), full_matrices=False)
    left, values, right = (factor.to(matrices.device) for factor in factors)
    kept = values > max(matrices.shape[1:]) * torch.finfo(matrices.dtype).eps * values[:, :1]
    return left * kept.unsqueeze(1), values * kept * peaks[:, :, 0], right * kept.unsqueeze(2)
