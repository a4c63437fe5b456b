"""Does a basis suit the data? The share of the loss's gradient that it holds, before anything is trained.

Where the cores start, the loss can be lowered only by the part of its gradient inside the basis: with
``w + s U c V^T`` the gradient by c is ``s U^T G V``, G the gradient by w. So the share ``||U^T G V||^2 / ||G||^2`` says
what a small step inside the basis gains of what a step on all of w would. It needs no training.

Gradients come in parts (halves of the batches), so that directions taken from one part can be measured on the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import subspace_ext as se
from subspace3d.adapters.spectral import leading_directions

SIDES = ("core", "U", "V")
"""``||U^T G V||^2``, ``||U^T G||^2`` and ``||G V||^2``: what both sides hold together, and each alone."""
MINED, RANDOM, PSV, OWN = "basis", "random", "psv", "gradient"
"""The basis that is asked about, and what stands beside it at the same K: random directions (expected value), the
leading singular vectors of the weight, and the leading directions of the gradient of the other part."""
KEPT = 0.9
"""The suggested k and K keep this much of what the whole basis holds."""
HELPS = 0.99
"""An attribute helps if without it no more than this is held of what all attributes cut to the same K hold."""

_CONSISTENCY = "photometric and geometric consistency through predicted depth and cameras"
TEACHERS = {
    "depth": ("the loss", ""),
    "views": (
        "the views' agreement",
        f" There are no cameras to compare with: the loss is the views' agreement ({_CONSISTENCY}), as in finetune "
        "--few; of the losses of cameras, depth and points nothing can be said.",
    ),
    "both": (
        "the loss (where there are no cameras or no depth: the views' agreement)",
        f" Scenes without cameras or depth are taught by the views' agreement ({_CONSISTENCY}), as in finetune --few; "
        "of their losses of cameras, depth and points nothing can be said.",
    ),
}
"""What the loss compares with -> what it is called, and what there is to say about it: true cameras and depth, the
views of a scene among each other, or either, by scene."""

Pair = tuple[torch.Tensor, torch.Tensor]


def inside(gradients: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """``||U^T G V||_F^2``, ``||U^T G||_F^2``, ``||G V||_F^2`` for the leading K' = 1..K columns of either side.

    Args:
        gradients (Tensor): ``[parts, out, in]``.
        u (Tensor): ``[out, K]``; made orthonormal, each leading set of columns keeping its span.
        v (Tensor): ``[in, K]``, likewise.

    Returns:
        Tensor: ``[parts, 3, K]`` float64.
    """
    g = gradients.double()
    left, right = _nested(u.to(g.device)).mT @ g, g @ _nested(v.to(g.device))
    core = (_nested(u.to(g.device)).mT @ right).square()
    both = core.cumsum(1).cumsum(2).diagonal(dim1=1, dim2=2)
    return torch.stack([both, left.square().sum(2).cumsum(1), right.square().sum(1).cumsum(1)], 1).cpu()


def _nested(columns: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns, the first j of which span what the first j given ones do; dependent ones become zero."""
    q, r = torch.linalg.qr(columns.double())
    size = r.diagonal(dim1=-2, dim2=-1).abs()
    return q * (size > 1e-9 * columns.double().norm(dim=-2).clamp(min=1e-300))


def random_share(out: int, into: int, K: int) -> torch.Tensor:
    """Expected share inside uniformly random subspaces of 1..K dimensions: ``K'^2 / (out in)``, ``K'/out``, ``K'/in``.

    Returns:
        Tensor: ``[3, K]`` float64; exact, whatever the gradient.
    """
    sizes = torch.arange(1, K + 1, dtype=torch.float64)
    u, v = (sizes / out).clamp(max=1), (sizes / into).clamp(max=1)
    return torch.stack([u * v, u, v])


@dataclass
class Measured:
    """Energies of one module or, summed, of several.

    Attributes:
        total: ``||G||_F^2`` by part, ``[parts]``.
        held: source -> ``[parts, 3, K]``, see `inside`.
        by_k: directions per attribute -> what the basis of so many holds in its core ``[parts]``, and its K.
        alone: attribute -> what its own basis holds ``[parts]``.
        without: attribute -> what the basis without it holds, and what all attributes cut to the same K hold, each
            ``[parts]``.
    """

    total: torch.Tensor
    held: dict[str, torch.Tensor]
    by_k: dict[int, tuple[torch.Tensor, int]] = field(default_factory=dict)
    alone: dict[str, torch.Tensor] = field(default_factory=dict)
    without: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


def measure_module(
    gradients: torch.Tensor,
    weight: torch.Tensor,
    basis: Pair,
    attributes: Mapping[str, Pair] | None = None,
) -> Measured:
    """All energies of one module.

    Args:
        gradients (Tensor): ``[parts, out, in]``, at least two parts; a convolution's are unrolled.
        weight (Tensor): ``[out, in]``.
        basis (tuple): U ``[out, K]`` and V ``[in, K]``, leading direction first.
        attributes (Mapping | None): attribute -> its u and v, from which the basis was combined.

    Raises:
        ValueError: fewer than two parts.
    """
    parts = len(gradients)
    if parts < 2:
        raise ValueError(f"gradients must have at least two parts, so that one can be held out, got {parts}")
    u, v = basis
    K = u.shape[1]
    total = gradients.double().square().sum((1, 2)).cpu()
    psv, _, psv_v = leading_directions(weight, min(K, *weight.shape))
    held = {
        MINED: inside(gradients, u, v),
        RANDOM: total[:, None, None] * random_share(len(u), len(v), K),
        PSV: _padded(inside(gradients, psv, psv_v), K),
        OWN: torch.cat([_padded(_held_out(gradients, part, K), K) for part in range(parts)]),
    }
    measured = Measured(total, held)
    if attributes and len(attributes) > 1:
        _measure_attributes(measured, gradients, attributes, K)
    return measured


def _held_out(gradients: torch.Tensor, part: int, K: int) -> torch.Tensor:
    """``[1, 3, K]``: the energy of one part inside the leading directions of the sum of the others."""
    others = gradients.sum(0) - gradients[part]
    u, _, v = leading_directions(others, min(K, *others.shape))
    return inside(gradients[part : part + 1], u, v)


def _padded(held: torch.Tensor, K: int) -> torch.Tensor:
    """A narrow module has fewer directions than K; more hold no more."""
    return torch.cat([held, held[..., -1:].expand(*held.shape[:-1], K - held.shape[-1])], -1)


def _measure_attributes(measured: Measured, gradients: torch.Tensor, attributes: Mapping[str, Pair], K: int) -> None:
    def core(pairs: Iterable[Pair], rank: int | None = None) -> tuple[torch.Tensor, int]:
        u, v = se.combine_subspaces(list(pairs), rank=rank)
        return inside(gradients, u, v)[:, 0, -1], u.shape[1]

    trained = {name: pair for name, pair in attributes.items() if pair[0].any() and pair[1].any()}
    zero = torch.zeros(len(gradients), dtype=torch.float64)
    for name, pair in attributes.items():
        measured.alone[name] = core([pair])[0] if name in trained else zero
        rest = [other for key, other in trained.items() if key != name]
        if not rest:
            measured.without[name] = (zero, measured.held[MINED][:, 0, -1])
            continue
        lost, size = core(rest, K)
        measured.without[name] = (lost, measured.held[MINED][:, 0, size - 1])
    widest = max(u.shape[1] for u, _ in attributes.values())
    for k in sorted({2**power for power in range(widest.bit_length()) if 2**power < widest} | {widest}):
        cut = [(u[:, :k], v[:, :k]) for u, v in trained.values()]
        measured.by_k[k] = core(cut, K) if cut else (zero, 0)


def add_up(modules: Sequence[Measured]) -> Measured:
    """The energies of several modules together; where one has fewer than K directions, more of them hold no more."""
    K = max(each.held[MINED].shape[-1] for each in modules)
    held = {
        source: torch.stack([_padded(each.held[source], K) for each in modules]).sum(0) for source in modules[0].held
    }
    result = Measured(torch.stack([each.total for each in modules]).sum(0), held)
    for name in modules[0].alone:
        result.alone[name] = torch.stack([each.alone[name] for each in modules]).sum(0)
        left, cut = (torch.stack(side).sum(0) for side in zip(*(each.without[name] for each in modules)))
        result.without[name] = left, cut
    for k in sorted({k for each in modules for k in each.by_k}):
        found = [each.by_k.get(k) or each.by_k[max(each.by_k)] for each in modules]
        result.by_k[k] = (torch.stack([energy for energy, _ in found]).sum(0), max(size for _, size in found))
    return result


def share(energy: torch.Tensor, total: torch.Tensor) -> float | None:
    """Energy of all parts over their total; None where there is none."""
    whole = float(total.sum())
    return float(energy.sum()) / whole if whole else None


def compare(measured: Measured, other: str) -> str:
    """``better``, ``worse`` or ``level``: the core of the basis against ``other``'s at the same K.

    A difference counts where every part of the batches has it.
    """
    difference = measured.held[MINED][:, 0, -1] - measured.held[other][:, 0, -1]
    if bool((difference > 0).all()):
        return "better"
    return "worse" if bool((difference < 0).all()) else "level"


@dataclass(frozen=True)
class Suggestion:
    """What of the basis is worth keeping.

    Attributes:
        K: the least number of leading directions that hold `KEPT` of what the whole basis does.
        k: the least number of directions per attribute that do; None without attributes.
        attributes: those that help, see `HELPS`; None without.
    """

    K: int
    k: int | None
    attributes: list[str] | None


def suggest(measured: Measured) -> Suggestion:
    curve = measured.held[MINED][:, 0].sum(0)
    K = 1 + int((curve >= KEPT * curve[-1]).nonzero()[0])
    if not measured.alone:
        return Suggestion(K, None, None)
    by_k = {k: float(energy.sum()) for k, (energy, _) in measured.by_k.items()}
    k = min(k for k, energy in by_k.items() if energy >= KEPT * by_k[max(by_k)])
    helpful = [name for name, (left, cut) in measured.without.items() if float(left.sum()) < HELPS * float(cut.sum())]
    return Suggestion(K, k, helpful)


def sentence(measured: Measured, scenes: str, teacher: str = "depth") -> str:
    """What the energies say about the basis, for someone who has read nothing else.

    Args:
        measured (Measured): the energies, of all modules together.
        scenes (str): what the gradient was taken on.
        teacher (str): a key of `TEACHERS`.
    """
    loss, remark = TEACHERS[teacher]
    K = measured.held[MINED].shape[-1]
    shares = {name: share(held[:, 0, -1], measured.total) for name, held in measured.held.items()}
    here, random, psv, own = (shares[name] for name in (MINED, RANDOM, PSV, OWN))
    if here is None or random is None or psv is None or own is None:
        return (
            f"{loss[0].upper()}{loss[1:]} on {scenes} has no gradient, so nothing can be said about the basis.{remark}"
        )
    fit = {"better": "more than", "worse": "less than", "level": "about as much as"}[compare(measured, PSV)]
    reach = f", and {here / own:.0%} of what directions of this gradient itself would ({own:.1%})" if own else ""
    return (
        f"At K = {K} the basis holds {here:.1%} of the gradient of {loss} on {scenes}: {_times(here / random)} what "
        f"random directions would, {fit} the singular vectors of the weights ({psv:.1%}){reach}.{remark}"
    )


def _times(ratio: float) -> str:
    return f"{ratio:.0f} times" if ratio >= 9.5 else f"{ratio:.1f} times"


def stable_rank(gradients: torch.Tensor) -> float | None:
    """``||G||_F^2 / ||G||_2^2`` of the sum over parts; None where it is zero."""
    whole = gradients.double().sum(0)
    top = float(torch.linalg.matrix_norm(whole, 2))
    return float(whole.square().sum()) / top**2 if top else None


def verdict(measured: Measured) -> str:
    """``fits``: more than the singular vectors of the weights and random directions; ``weak``: more than random ones
    alone; ``chance``: not even that."""
    if compare(measured, RANDOM) != "better":
        return "chance"
    return "fits" if compare(measured, PSV) == "better" else "weak"


def record(
    modules: Mapping[str, Measured], ranks: Mapping[str, float | None], scenes: str, teacher: str = "depth"
) -> dict[str, Any]:
    """All of it as plain JSON values; ``docs/formats.md`` describes the layout.

    Args:
        modules (Mapping): module -> its energies.
        ranks (Mapping): module -> `stable_rank` of its gradient.
        scenes (str): what the gradient was taken on, for the sentence.
        teacher (str): of whose loss, see `TEACHERS`.
    """
    whole = add_up(list(modules.values()))
    advice = suggest(whole)
    return {
        "sentence": sentence(whole, scenes, teacher),
        "teacher": teacher,
        "verdict": verdict(whole),
        "K": whole.held[MINED].shape[-1],
        "shares": {source: _sides(held[..., -1], whole.total) for source, held in whole.held.items()},
        "by_part": {source: _rounded(held[:, 0, -1] / whole.total) for source, held in whole.held.items()},
        "by_K": {source: _rounded(held[:, 0].sum(0) / whole.total.sum()) for source, held in whole.held.items()},
        "by_k": {k: {"share": _share(energy, whole.total), "K": K} for k, (energy, K) in whole.by_k.items()},
        "attributes": {
            name: {
                "alone": _share(whole.alone[name], whole.total),
                "without": _share(left, whole.total),
                "all_at_that_K": _share(cut, whole.total),
            }
            for name, (left, cut) in whole.without.items()
        },
        "suggested": {"K": advice.K, "k": advice.k, "attributes": advice.attributes},
        "modules": {
            name: {
                "norm": round(float(each.total.sum().sqrt()), 9),
                "stable_rank": None if ranks[name] is None else round(float(ranks[name] or 0), 4),
                "K": each.held[MINED].shape[-1],
                "shares": {source: _sides(held[..., -1], each.total) for source, held in each.held.items()},
            }
            for name, each in modules.items()
        },
    }


def _sides(held: torch.Tensor, total: torch.Tensor) -> dict[str, float | None]:
    return {side: _share(held[:, index], total) for index, side in enumerate(SIDES)}


def _share(energy: torch.Tensor, total: torch.Tensor) -> float | None:
    value = share(energy, total)
    return None if value is None else round(value, 6)


def _rounded(values: torch.Tensor) -> list[float | None]:
    return [round(value, 6) if value == value else None for value in values.tolist()]
