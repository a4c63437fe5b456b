"""What LoRA adapters of one attribute share, module by module.

Modules of equal shape are stacked and mined together, so a network costs a few batched calls.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch

import subspace_ext
from subspace3d.files import natural
from subspace3d.formats.adapter import Adapter
from subspace3d.formats.subspace import ModuleSubspace, SubspaceFile
from subspace3d.mining.selection import HeldOut, Model, choose_k, compare_models, sharing
from subspace3d.mining.stacks import (
    Factors,
    Group,
    Together,
    batches,
    explained_energy,
    group_modules,
    largest_rank,
    stack,
)
from subspace3d.progress import Progress

_USUAL_K = 16  # at which models are compared before k is chosen


@dataclasses.dataclass(frozen=True)
class IrlsSettings:
    """Of `subspace_ext.mine_subspace`."""

    p: float = 1.0
    eps: float = 1e-3
    max_iter: int = 50
    tol: float = 1e-6


@dataclasses.dataclass(frozen=True)
class Mined:
    """What `mine_adapters` found.

    Attributes:
        modules: module -> its subspace.
        details: module -> what a subspace file's header says of it.
        model: of sharing that was mined, mean or shared.
        held_out: the comparison it was chosen by; None where it was given.
        notes: what was chosen, in sentences.
    """

    modules: dict[str, ModuleSubspace]
    details: dict[str, dict[str, Any]]
    model: Model
    held_out: HeldOut | None
    notes: list[str]


def mine_adapters(
    adapters: Sequence[Adapter],
    k: int | Literal["auto"],
    settings: IrlsSettings,
    label: str = "mine",
    model: Model | Literal["auto"] = "mean",
    base_model: str = "",
) -> Mined:
    """What the adapters share in each module, by `subspace_ext.mine_subspace`.

    Adapters of different rank are legal: the factors are padded with zeros, which leaves their product as it is.
    A module too narrow for ``k`` (a head with 2 outputs) gets ``k = min(out, in, sum of its adapters' ranks)``.

    Args:
        adapters (Sequence[Adapter]): of one base model, changing the same modules.
        k (int | str): rank of the subspace; auto: as many directions of each module as stand above those of unrelated
            adapters (`selection.choose_k`), at least one.
        settings (IrlsSettings): of the mining.
        label (str): what the progress is shown as.
        model (str): of sharing, mean or shared; auto: the one by which an adapter that is left out lies more in what
            the others share (`selection.compare_models`).
        base_model (str): see `check_same_modules`.

    Raises:
        ValueError: adapters of different base models or modules, ``k`` larger than the sum of the adapters' ranks in
            every module, model or ``k`` to be chosen for a single adapter, or an adapter that changes nothing.
    """
    check_same_modules(adapters, base_model)
    for name, value, given in (("model", model, "mean or shared"), ("k", k, "an integer")):
        if value == "auto" and len(adapters) == 1:
            raise ValueError(f"{name} must be {given} for a single adapter, which shares nothing with others, got auto")
    factors = Together(adapters, adapters[0].modules)
    options = dataclasses.asdict(settings)
    held_out, notes = None, []
    if model == "auto":
        compared_at = k if isinstance(k, int) else min(_USUAL_K, largest_rank(factors))
        held_out = compare_models(factors, compared_at, options)
        if held_out is None:
            raise ValueError(_changes_nothing(adapters[0], len(factors)))
        model = held_out.best
        # what lies inside grows with k, which may be chosen later
        notes.append(f"at k = {compared_at} {held_out.sentence()}")
    sizes: int | dict[str, int]
    if k == "auto":
        chosen = choose_k(factors, model, options)
        notes.append(sharing(chosen))
        sizes = {name: max(1, value) for name, value in chosen.items()}
    else:
        sizes = k
    modules: dict[str, ModuleSubspace] = {}
    details: dict[str, dict[str, Any]] = {}
    with Progress(label, len(factors), "module") as progress:
        for group, names in group_modules(factors, sizes).items():
            for batch in batches(group, names, len(adapters)):
                mined = _mine_batch(group, [factors[name] for name in batch], model, options)
                for name, (module, detail) in zip(batch, mined):
                    modules[name], details[name] = module, detail
                progress.advance(len(batch))
    return Mined(modules, details, model, held_out, [*notes, *_untrained(adapters, details)])


def _untrained(adapters: Sequence[Adapter], details: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A sentence about each adapter with updates of zero where others have some.

    Raises:
        ValueError: an adapter has no update at all.
    """
    trained = [name for name, detail in details.items() if any(share is not None for share in detail["explained"])]
    for index, adapter in enumerate(adapters):
        zero = [name for name in trained if details[name]["explained"][index] is None]
        if len(zero) == len(trained):
            raise ValueError(_changes_nothing(adapter, len(details)))
        if zero:
            yield (
                f"{adapter.path} changes nothing in {len(zero)} of the {len(trained)} modules that others change, such "
                f"as {zero[0]}; there it counts as an update of zero"
            )


def _changes_nothing(adapter: Adapter, modules: int) -> str:
    return (
        f"{adapter.path} changes nothing: its update is zero in all {modules} modules. An adapter that was not trained "
        "bends what the others share towards zero; move it elsewhere"
    )


def check_same_modules(adapters: Sequence[Adapter], base_model: str = "") -> None:
    """Adapters of one attribute must belong to one base model and change the same modules.

    ``base_model`` says which one it is where the adapters call it by several names; modules and sizes must still agree.

    Raises:
        ValueError: they do not; the message names the first difference.
    """
    first = adapters[0]
    sizes = {name: (len(lora_b), lora_a.shape[1]) for name, (lora_b, lora_a) in first.modules.items()}
    for other in adapters[1:]:
        if other.base_model != first.base_model and not base_model:
            raise ValueError(
                f"adapters must have one base model: {first.path} has {first.base_model!r}, "
                f"{other.path} has {other.base_model!r}; if these are one model, give it one name (--base-model)"
            )
        for here, there in ((first, other), (other, first)):
            missing = sorted(here.modules.keys() - there.modules.keys(), key=natural)
            if missing:
                raise ValueError(
                    f"adapters must change the same modules: {here.path} has {missing[0]}"
                    f"{f' and {len(missing) - 1} more' if missing[1:] else ''}, {there.path} has not"
                )
        for name, (lora_b, lora_a) in other.modules.items():
            other_sizes = (len(lora_b), lora_a.shape[1])
            if sizes[name] != other_sizes:
                raise ValueError(
                    f"{name} must have one size [out, in]: {first.path} has {list(sizes[name])}, "
                    f"{other.path} has {list(other_sizes)}"
                )


def summary(subspaces: SubspaceFile) -> str:
    """One line: number of modules, share of the adapters' energy inside the subspaces, the least trusted adapter."""
    details = subspaces.header["modules"].values()
    shares = [share for detail in details for share in detail["explained"] if share is not None]
    explained = f"{100 * sum(shares) / len(shares):.1f} %" if shares else "none (all updates are zero)"
    text = (
        f"{len(subspaces.modules)} modules; energy of the updates inside the subspaces, mean over modules: {explained}"
    )
    names = [adapter["path"] for adapter in subspaces.header.get("join", subspaces.header["adapters"])]
    if len(names) > 1:
        weights = mean_relative_weights(subspaces)
        least = int(weights.argmin())
        text += f"; most down-weighted adapter: {names[least]} ({weights[least]:.2f} of the mean weight)"
    return text


def mean_relative_weights(subspaces: SubspaceFile) -> torch.Tensor:
    """``mean over modules of w_n / mean_n(w)``: ``[N]`` float64, 1 for an adapter that is trusted like the others."""
    return torch.stack([module.weights / module.weights.mean() for module in subspaces.modules.values()]).mean(0)


def _mine_batch(
    group: Group, batch: Sequence[Factors], model: Model, options: Mapping[str, Any]
) -> list[tuple[ModuleSubspace, dict[str, Any]]]:
    lora_b, lora_a = stack(group, batch)
    mined = subspace_ext.mine_subspace(lora_b, lora_a, group.k, model=model, **options)
    explained = explained_energy(lora_b, lora_a, mined.u, mined.v)
    results = []
    for index in range(len(batch)):
        detail = {
            "rank": group.rank,
            "k": group.k,
            "n_iter": int(mined.n_iter[index]),
            "converged": bool(mined.converged[index]),
            "explained": [None if share != share else round(share, 6) for share in explained[index].tolist()],
        }
        module = ModuleSubspace(mined.u[index], mined.v[index], mined.singular_values[index], mined.weights[index])
        results.append((module, detail))
    return results
