"""Spectra, disentanglement and adapter weights of mined subspaces, as plain JSON values."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

import subspace_ext
from subspace3d.choices import in_order
from subspace3d.files import natural
from subspace3d.formats.analysis import FORMAT, VERSION
from subspace3d.formats.subspace import SubspaceFile
from subspace3d.mining.cross_validation import SIDES, own_and_nearest
from subspace3d.mining.interference import compare_attributes
from subspace3d.mining.mine import mean_relative_weights
from subspace3d.mining.spectra import BEHAVIOURS, behaviour, find_drops, place, steps
from subspace3d.mining.stacks import random_cosines

# An adapter is down-weighted in a module where it has less than half of the mean weight.
_LOW_WEIGHT = 0.5


def analyze(subspaces: Mapping[str, SubspaceFile]) -> dict[str, Any]:
    """Everything the figures show, as plain JSON values; ``docs/formats.md`` describes the layout.

    Raises:
        ValueError: the files are of different base models or modules.
    """
    attributes = in_order(subspaces)
    _check_comparable(subspaces)
    first = subspaces[attributes[0]]
    modules = sorted(first.modules, key=natural)
    spectra = {attribute: _spectra(subspaces[attribute], modules) for attribute in attributes}
    return {
        "format": FORMAT,
        "version": VERSION,
        "base_model": first.header.get("base_model"),
        "attributes": attributes,
        "modules": {name: _describe_module(first, name) for name in modules},
        "models": {attribute: _model(subspaces[attribute]) for attribute in attributes},
        "spectra": spectra,
        "behaviours": {attribute: _count_behaviours(spectra[attribute]) for attribute in attributes},
        "disentanglement": _disentanglement(subspaces, attributes, modules),
        "interference": compare_attributes(subspaces, attributes, modules),
        "weights": {attribute: _weights(subspaces[attribute], modules) for attribute in attributes},
        "cross_validation": None,
    }


def describe(analysis: Mapping[str, Any]) -> list[str]:
    """The analysis in a few lines for the terminal."""
    lines = []
    for attribute, counts in analysis["behaviours"].items():
        if analysis["models"][attribute] == "mean":
            drops = ", ".join(f"{name}: {count}" for name, count in counts.items() if count)
            lines.append(f"{attribute}: modules by drop of the spectrum: {drops or 'spectra end at the adapter rank'}")
        low = analysis["weights"][attribute]["down_weighted"]
        if low:
            lines.append(f"{attribute}: less than half of the mean weight in most modules: {', '.join(low)}")
    for side in SIDES:
        for pair in analysis["disentanglement"][side]:
            if pair["mean_smallest"] is None:
                continue
            lines.append(
                f"{' / '.join(pair['attributes'])}, {side} side: smallest eigenvalue {pair['mean_smallest']:.2f}, "
                f"mean over modules (random subspaces {pair['mean_smallest_random']:.2f})"
            )
    for pair in analysis["interference"]:
        if pair["mean"] is not None:
            lines.append(
                f"{' / '.join(pair['attributes'])}: interference {pair['mean']:.2f}, mean over modules "
                f"(random subspaces {pair['mean_random']:.2f})"
            )
    return lines + _describe_cross_validation(analysis)


def _describe_cross_validation(analysis: Mapping[str, Any]) -> list[str]:
    validation = analysis["cross_validation"]
    lines = []
    for attribute, explained in (validation or {"explained": {}})["explained"].items():
        held_out, nearest = own_and_nearest(explained, attribute)
        stability = validation["stability"][attribute]
        if held_out is None:
            continue
        beside = f", by the other attributes {100 * nearest[1]:.1f} % at most" if nearest else ""
        lines.append(
            f"{attribute}: energy of an adapter explained by the subspace of the others of its attribute "
            f"{100 * held_out:.1f} %{beside}; overlap with the subspace mined without one adapter: "
            f"output {stability['output']['mean']:.2f}, input {stability['input']['mean']:.2f}"
        )
    return lines


def _check_comparable(subspaces: Mapping[str, SubspaceFile]) -> None:
    (first_name, first), *others = subspaces.items()
    for name, other in others:
        models = first.header.get("base_model"), other.header.get("base_model")
        if models[0] != models[1]:
            raise ValueError(f"base models must agree: {first_name} has {models[0]!r}, {name} has {models[1]!r}")
        difference = sorted(first.modules.keys() ^ other.modules.keys(), key=natural)
        if difference:
            raise ValueError(f"modules must agree: {difference[0]} is in only one of {first_name} and {name}")
        for module, here in first.modules.items():
            there = other.modules[module]
            sizes = (len(here.u), len(here.v)), (len(there.u), len(there.v))
            if sizes[0] != sizes[1]:
                raise ValueError(
                    f"{module} must have one size (out, in): {first_name} has {sizes[0]}, {name} has {sizes[1]}"
                )


def _describe_module(subspaces: SubspaceFile, name: str) -> dict[str, Any]:
    where = place(name)
    module = subspaces.modules[name]
    return {
        "out": len(module.u),
        "in": len(module.v),
        "family": where.family,
        "layer": where.layer,
        "kind": where.kind,
    }


def _adapter_rank(subspaces: SubspaceFile, name: str) -> int | None:
    return subspaces.header.get("modules", {}).get(name, {}).get("rank")


def _model(subspaces: SubspaceFile) -> str:
    """Files of before there was a choice do not name it."""
    return subspaces.header.get("model", "mean")


def _spectra(subspaces: SubspaceFile, modules: list[str]) -> dict[str, Any]:
    """Where the spectrum of a weighted mean drops says what is shared; that of the model shared is of another kind."""
    spectra = {}
    for name in modules:
        module = subspaces.modules[name]
        values, rank = module.singular_values.tolist(), _adapter_rank(subspaces, name)
        if _model(subspaces) == "shared":
            # N adapters between k directions: what comes after is zero by construction
            values, rank = values[: len(module.weights) * module.v.shape[1]], None
        drops = find_drops(values)
        spectra[name] = {
            "rank": rank,
            "k": subspaces.modules[name].u.shape[1],
            "singular_values": [float(f"{value:.6g}") for value in values],
            "drops": drops,
            "ratio_at_rank": None if rank is None else _ratio(values, rank),
            "largest_ratio_beyond": None if rank is None else _largest_ratio(values, rank + 1),
            "behaviour": None if rank is None else behaviour(drops, rank, len(values)),
        }
    return spectra


def _ratio(values: list[float], index: int) -> float | None:
    """``s_i / s_(i+1)``, the step after the i-th singular value; None past the end of the spectrum."""
    logs = steps(values)
    return round(math.exp(logs[index - 1]), 4) if index <= len(logs) else None


def _largest_ratio(values: list[float], first: int) -> dict[str, Any] | None:
    """The largest step at or after the ``first``-th singular value."""
    logs = steps(values)[first - 1 :]
    if not logs:
        return None
    best = max(range(len(logs)), key=logs.__getitem__)
    return {"at": first + best, "ratio": round(math.exp(logs[best]), 4)}


def _count_behaviours(spectra: Mapping[str, Any]) -> dict[str, int]:
    counts = Counter(module["behaviour"] for module in spectra.values())
    return {name: counts[name] for name in BEHAVIOURS}


def _weights(subspaces: SubspaceFile, modules: list[str]) -> dict[str, Any]:
    relative = [subspaces.modules[name].weights / subspaces.modules[name].weights.mean() for name in modules]
    mean = mean_relative_weights(subspaces).tolist()
    low = (torch.stack(relative) < _LOW_WEIGHT).double().mean(0).tolist()
    names = [adapter["path"] for adapter in subspaces.header.get("join", subspaces.header.get("adapters", []))] or [
        str(n) for n in range(len(mean))
    ]
    return {
        "adapters": names,
        "mean": [round(value, 6) for value in mean],
        "below_half": [round(value, 6) for value in low],
        "down_weighted": [name for name, share in zip(names, low) if share > 0.5],
        "most_down_weighted": names[mean.index(min(mean))] if len(names) > 1 else None,
        "modules": {name: [round(value, 6) for value in row.tolist()] for name, row in zip(modules, relative)},
    }


def _disentanglement(
    subspaces: Mapping[str, SubspaceFile], attributes: list[str], modules: list[str]
) -> dict[str, Any]:
    random: dict[str, dict[str, list[float]]] = {}
    result: dict[str, Any] = {}
    for side, field in SIDES.items():
        result[side] = []
        for one, two in itertools.combinations(attributes, 2):
            rows: dict[str, dict[str, Any]] = {}
            for name in modules:
                a = getattr(subspaces[one].modules[name], field)
                b = getattr(subspaces[two].modules[name], field)
                size = f"{len(a)}x{a.shape[1]}x{b.shape[1]}"
                if size not in random:
                    random[size] = random_level(len(a), a.shape[1], b.shape[1])
                rows[name] = {"eigenvalues": _eigenvalues(a, b), "random": size}
            measured = [row for row in rows.values() if row["eigenvalues"]]
            pair = {
                "attributes": [one, two],
                "mean_smallest": _mean_smallest([row["eigenvalues"] for row in measured]),
                "mean_smallest_random": _mean_smallest([random[row["random"]]["mean"] for row in measured]),
                "modules": rows,
            }
            result[side].append(pair)
    return {**result, "random": random}


def _eigenvalues(one: torch.Tensor, two: torch.Tensor) -> list[float]:
    """Ascending; none when a side is zero, as it is where no adapter was trained."""
    if not one.any() or not two.any():
        return []
    return [round(value, 6) for value in subspace_ext.disentanglement(one, two).tolist()]


def _mean_smallest(spectra: list[list[float]]) -> float | None:
    return round(statistics.fmean(values[0] for values in spectra), 6) if spectra else None


def random_level(dim: int, k1: int, k2: int) -> dict[str, list[float]]:
    """Eigenvalues ``1 - cos(theta)`` between random subspaces of ``dim`` dimensions, ascending: mean and 5 % to 95 %.

    Two attributes are disentangled only as far as they stand above what chance gives: in few dimensions even random
    subspaces share directions. Drawn with a fixed seed, so the same sizes always give the same numbers.

    Args:
        dim: dimension of the surrounding space.
        k1: dimension of the first subspace.
        k2: dimension of the second.
    """
    values = 1 - random_cosines(dim, k1, k2)
    low, high = torch.quantile(values, torch.tensor([0.05, 0.95], dtype=torch.float64), dim=0)
    return {
        name: [round(value, 6) for value in row.tolist()]
        for name, row in (("mean", values.mean(0)), ("low", low), ("high", high))
    }
