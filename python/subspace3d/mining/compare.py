"""The same attributes mined in two checkpoints: which layers agree, and what can be said across architectures.

Directions are compared only between modules of one name and one size. Even there they agree only as far as the two
networks number their features alike, which networks do that were trained from one another, and others do not.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from subspace3d.choices import in_order
from subspace3d.files import natural
from subspace3d.formats.comparison import FORMAT, VERSION
from subspace3d.formats.subspace import ModuleSubspace, SubspaceFile
from subspace3d.mining.cross_validation import SIDES, mean_of_known
from subspace3d.mining.spectra import place
from subspace3d.mining.stacks import orthonormal, random_cosines

CHECKPOINTS = ("A", "B")
# One role under two names: VGGT's and VGGT-Omega's blocks over all frames.
_ALIASES = {"inter_frame_blocks": "global_blocks"}
# A module agrees where its overlap lies above this normal deviate of random subspaces: about 3 in 100,000 do so by
# chance, none of a network's few hundred modules.
_DEVIATE = 4.0
_ROUNDING = 1e-6  # u and v are stored in float32
_LEADING = (1, 4, 16)

Checkpoint = Mapping[str, SubspaceFile]
"""Attribute -> its subspace file."""


def compare(one: Checkpoint, two: Checkpoint, held_out: Mapping[str, Mapping[str, float | None]]) -> dict[str, Any]:
    """Everything in comparison.json but its inputs; ``docs/formats.md`` describes the layout.

    Args:
        one, two (Checkpoint): attributes of either; those in both are compared.
        held_out (Mapping): checkpoint -> attribute -> share of an adapter's energy in the subspace of the others of its
            attribute, where it was measured (`cross_validation.cross_validate`).

    Raises:
        ValueError: no attribute is in both; or the files of one checkpoint have several base models.
    """
    attributes = in_order(one.keys() & two.keys())
    if not attributes:
        raise ValueError(f"compare must name two checkpoints with an attribute in common, got {[*one]} and {[*two]}")
    sides = dict(zip(CHECKPOINTS, (one, two)))
    modules = {name: {a: _renamed(files[a].modules) for a in attributes} for name, files in sides.items()}
    common = _common(modules, attributes)
    spectra = {name: {a: _spectrum(files[a]) for a in attributes} for name, files in sides.items()}
    shared = {
        name: {a: _shared(files[a], held_out.get(name, {}).get(a)) for a in attributes} for name, files in sides.items()
    }
    result: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "base_models": {name: _base_model(name, files) for name, files in sides.items()},
        "attributes": attributes,
        "left_out": {
            "attributes": {name: sorted(files.keys() - set(attributes)) for name, files in sides.items()},
            "modules": {
                name: sorted(set().union(*modules[name].values()) - set(common), key=natural) for name in sides
            },
        },
        "modules": common,
        "agreement": _agreement(modules, attributes, common) if common else None,
        "spectra": spectra,
        "shared": shared,
        "same_mining": _same_mining(shared, attributes),
        "order": _orders(spectra, shared, attributes),
    }
    result["sentence"] = _sentence(result)
    return result


def _renamed(modules: Mapping[str, ModuleSubspace]) -> dict[str, ModuleSubspace]:
    return {".".join(_ALIASES.get(part, part) for part in name.split(".")): module for name, module in modules.items()}


def _base_model(name: str, files: Checkpoint) -> str | None:
    models = {attribute: file.header.get("base_model") for attribute, file in files.items()}
    if len(set(models.values())) > 1:
        raise ValueError(f"compare: the files of {name} must have one base model, got {models}")
    return next(iter(models.values()))


def _common(
    modules: Mapping[str, Mapping[str, Mapping[str, ModuleSubspace]]], attributes: list[str]
) -> dict[str, dict[str, Any]]:
    """Modules that every file has, in one size: name -> out, in and place."""
    tables = [modules[name][attribute] for name in CHECKPOINTS for attribute in attributes]
    found = {}
    for name in sorted(set(tables[0]).intersection(*tables[1:]), key=natural):
        sizes = {(len(table[name].u), len(table[name].v)) for table in tables}
        if len(sizes) == 1:
            where = place(name)
            out, in_ = sizes.pop()
            found[name] = {"out": out, "in": in_, "family": where.family, "layer": where.layer, "kind": where.kind}
    return found


def random_overlap(dim: int, k1: int, k2: int) -> dict[str, Any]:
    """What two random subspaces of ``dim`` dimensions share.

    The overlap is the mean ``cos^2`` of the principal angles, ``||Q_1^T Q_2||_F^2 / min(k1, k2)``. With
    ``P = Q Q^T``, ``tr(P_1 P_2)`` has mean ``k1 k2 / d`` and variance
    ``2 k1 k2 (d - k1) (d - k2) / (d^2 (d - 1) (d + 2))``; it is close to a gamma variable, whose cube root is close to
    normal (Wilson and Hilferty).

    Args:
        dim, k1, k2 (int): d and the dimensions of both; k1 and k2 at most d.

    Returns:
        dict: ``mean``, ``deviation`` and ``threshold`` of the overlap (above it one of about 30,000 lies), and
            ``angles``, the mean principal angles in degrees, ascending, of 64 draws with a fixed seed.
    """
    cosines = random_cosines(dim, k1, k2)
    mean, fewer = max(k1, k2) / dim, min(k1, k2)
    spread = 2 * k1 * k2 * (dim - k1) * (dim - k2) / (dim**2 * (dim - 1) * (dim + 2)) if dim > 1 else 0.0
    deviation = math.sqrt(spread) / fewer
    ninth = (deviation / mean) ** 2 / 9
    return {
        "mean": mean,
        "deviation": deviation,
        "threshold": min(1.0, mean * (1 - ninth + _DEVIATE * math.sqrt(ninth)) ** 3),
        "angles": [round(value, 3) for value in torch.rad2deg(torch.acos(cosines)).mean(0).tolist()],
    }


def _agreement(
    modules: Mapping[str, Mapping[str, Mapping[str, ModuleSubspace]]], attributes: list[str], common: Mapping[str, Any]
) -> dict[str, Any]:
    result: dict[str, Any] = {attribute: {} for attribute in attributes}
    random: dict[str, dict[str, Any]] = {}
    for side, key in SIDES.items():
        rows: dict[str, dict[str, Any]] = {attribute: {} for attribute in attributes}
        for name in common:
            bases = [{a: _basis(getattr(modules[c][a][name], key)) for a in attributes} for c in CHECKPOINTS]
            for attribute in attributes:
                rows[attribute][name] = _row(bases[0], bases[1], attribute, random)
        for attribute in attributes:
            result[attribute][side] = _summary(rows[attribute], random, common)
    return {**result, "random": random}


def _basis(columns: torch.Tensor) -> torch.Tensor:
    """Orthonormal ``[dim, rank]``; no column where nothing was trained."""
    basis = orthonormal(columns)
    return basis[:, basis.square().sum(0) > 0.5]


def _row(
    one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor], attribute: str, random: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    a, b = one[attribute], two[attribute]
    if not (a.shape[1] and b.shape[1]):
        return {"overlap": None, "angles": [], "random": None, "agrees": False, "others": None}
    size = f"{len(a)}x{a.shape[1]}x{b.shape[1]}"
    if size not in random:
        random[size] = random_overlap(len(a), a.shape[1], b.shape[1])
    cosines = torch.linalg.svdvals(a.T @ b).clamp(max=1)
    overlap = float(cosines.square().mean())
    level = random[size]
    crossed = [_overlap(one[x], two[y]) for x, y in itertools.permutations(one, 2) if attribute in (x, y)]
    return {
        "overlap": round(overlap, 6),
        "angles": [round(value, 3) for value in torch.rad2deg(torch.acos(cosines)).tolist()],
        "random": size,
        # where one space fills the whole, every other lies in it, and nothing can be told
        "agrees": level["deviation"] > 0 and overlap > level["threshold"] - _ROUNDING,
        "others": mean_of_known(crossed),
    }


def _overlap(a: torch.Tensor, b: torch.Tensor) -> float | None:
    if not (a.shape[1] and b.shape[1]):
        return None
    return float((a.T @ b).square().sum()) / min(a.shape[1], b.shape[1])


def _summary(
    rows: dict[str, dict[str, Any]], random: Mapping[str, Mapping[str, Any]], common: Mapping[str, Any]
) -> dict[str, Any]:
    blocks: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for name, row in rows.items():
        where = common[name]
        blocks.setdefault((-1 if where["layer"] is None else where["layer"], where["family"]), []).append(row)
    return {
        **_level(list(rows.values()), random),
        "blocks": [
            {"family": family, "layer": None if layer < 0 else layer, **_level(block, random)}
            for (layer, family), block in sorted(blocks.items())
        ],
        "modules": rows,
    }


def _level(rows: list[dict[str, Any]], random: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Means over modules, and how many of those that could be measured agree."""
    known = [row for row in rows if row["overlap"] is not None]
    return {
        "overlap": mean_of_known([row["overlap"] for row in known]),
        "random": mean_of_known([random[row["random"]]["mean"] for row in known]),
        "others": mean_of_known([row["others"] for row in known]),
        "agree": sum(row["agrees"] for row in known),
        "measured": len(known),
    }


def _spectrum(file: SubspaceFile) -> dict[str, Any]:
    """Of the mean update, over modules: stable rank ``sum s^2 / s_1^2``, and the energy in its leading directions."""
    spectra = [module.singular_values.double() for module in file.modules.values() if module.singular_values.any()]
    squares = [(values / values[0]).square() for values in spectra]  # of any size: squares of shares stay finite
    ranks = [float(values.sum() / values[0]) for values in squares]
    length = min((len(values) for values in squares), default=0)
    return {
        "stable_rank": _quartiles(ranks),
        "leading": {
            str(k): mean_of_known([float(values[:k].sum() / values.sum()) for values in squares])
            for k in _LEADING
            if k < length
        },
        "modules": len(squares),
    }


def _shared(file: SubspaceFile, held_out: float | None) -> dict[str, Any]:
    """How much of its adapters' energy lies in the subspace they share, and under which conditions it was mined."""
    details = file.header.get("modules", {})
    shares = [share for detail in details.values() for share in detail.get("explained", []) if share is not None]
    adapters = file.header.get("join", file.header.get("adapters", []))
    return {
        "source": file.header.get("source", "tuned"),
        "adapters": len(adapters) or len(next(iter(file.modules.values())).weights),
        "rank": max((detail["rank"] for detail in details.values() if "rank" in detail), default=None),
        "k": file.header.get("k"),
        "model": file.header.get("model", "mean"),
        "explained": mean_of_known(shares),
        "held_out": held_out,
    }


def _same_mining(shared: Mapping[str, Mapping[str, Mapping[str, Any]]], attributes: list[str]) -> bool:
    """Whether all were mined alike; else shares of energy and spectra differ by that alone."""
    conditions = ("source", "adapters", "rank", "k", "model")
    return len({tuple(shared[c][a][key] for key in conditions) for c in CHECKPOINTS for a in attributes}) == 1


def _orders(spectra: Mapping[str, Any], shared: Mapping[str, Any], attributes: list[str]) -> list[dict[str, Any]]:
    """Attributes from the largest to the smallest value in either checkpoint, and in how many pairs both agree."""
    measures: dict[str, Callable[[str, str], Any]] = {
        "stable rank": lambda c, a: spectra[c][a]["stable_rank"]["median"],
        "energy shared, of adapters that took part": lambda c, a: shared[c][a]["explained"],
        "energy shared, of an adapter left out": lambda c, a: shared[c][a]["held_out"],
    }
    orders = []
    for name, measure in measures.items():
        values = {c: {a: measure(c, a) for a in attributes} for c in CHECKPOINTS}
        if len(attributes) < 2 or any(value is None for column in values.values() for value in column.values()):
            continue
        ranked = {c: sorted(attributes, key=lambda a: -values[c][a]) for c in CHECKPOINTS}
        alike = sum(
            (values["A"][x] - values["A"][y]) * (values["B"][x] - values["B"][y]) > 0
            for x, y in itertools.combinations(attributes, 2)
        )
        pairs = len(attributes) * (len(attributes) - 1) // 2
        orders.append({"by": name, **ranked, "alike": alike, "pairs": pairs})
    return orders


def _quartiles(values: list[float]) -> dict[str, float | None]:
    if not values:
        return {"low": None, "median": None, "high": None}
    quantiles = torch.quantile(torch.tensor(values, dtype=torch.float64), torch.tensor([0.25, 0.5, 0.75]).double())
    return dict(zip(("low", "median", "high"), (round(value, 4) for value in quantiles.tolist())))


def _sentence(result: Mapping[str, Any]) -> str:
    models = " and ".join(str(result["base_models"][name]) for name in CHECKPOINTS)
    if result["agreement"] is None:
        text = f"{models} have no module of one name and size, so no directions are compared"
        orders = [f"{order['alike']} of {order['pairs']} pairs by {order['by']}" for order in result["order"]]
        return text + (f"; they order the attributes alike in {'; '.join(orders)} (half by chance)" if orders else "")
    parts, stands_out = [], False
    for side in SIDES:
        levels = [result["agreement"][attribute][side] for attribute in result["attributes"]]
        agree, measured = (sum(level[key] for level in levels) for key in ("agree", "measured"))
        overlap, random, others = (
            mean_of_known(level[key] for level in levels) for key in ("overlap", "random", "others")
        )
        if overlap is None:
            continue
        stands_out |= agree > 0
        beside = "" if others is None else f", different attributes {others:.3f}"
        parts.append(
            f"{agree} of {measured} {side} sides of a module and attribute agree (overlap {overlap:.3f}, random "
            f"subspaces {random:.3f}{beside})"
        )
    text = f"{models}: " + ("; ".join(parts) or "nothing was trained in the modules they have in common")
    if parts and not stands_out:
        text += "; nothing stands above chance, as between networks that were not trained from one another"
    return text
