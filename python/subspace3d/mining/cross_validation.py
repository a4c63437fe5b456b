"""What the adapters say about the subspaces mined from them: held-out energy, and stability when one is left out.

An adapter that took part in the mining bends the subspace towards itself. So each adapter is also left out in turn, the
others are mined with the same settings, and the one left out is projected on what they share.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from subspace3d import files
from subspace3d.formats.adapter import CONFIG_NAME, WEIGHTS_NAME, read_adapter
from subspace3d.formats.adapter_folders import search_adapters
from subspace3d.formats.subspace import SubspaceFile
from subspace3d.mining.stacks import (
    Factors,
    Group,
    Together,
    batches,
    energy,
    group_modules,
    leave_one_out,
    orthonormal,
    projected_energy,
    stack,
)
from subspace3d.progress import Progress

SIDES = {"output": "u", "input": "v"}
_SETTINGS = ("k", "p", "eps", "max_iter", "tol")


def find_mined_adapters(subspaces: Mapping[str, SubspaceFile], roots: Iterable[Path]) -> dict[str, list[Path]]:
    """Attribute -> the adapter folders below ``roots`` that its subspace was mined from, known by their hashes.

    Raises:
        FileNotFoundError: there is no adapter below a root.
        ValueError: an adapter is not there, or a subspace file does not say what it was mined from.
    """
    roots = list(roots)
    known: dict[tuple[str, str], Path] = {}
    for folder in (folder for root in roots for folder in search_adapters(root).all()):
        known.setdefault((files.sha256(folder / WEIGHTS_NAME), files.sha256(folder / CONFIG_NAME)), folder)
    found: dict[str, list[Path]] = {}
    for attribute, subspace in subspaces.items():
        missing = [name for name in ("adapters", *_SETTINGS) if name not in subspace.header]
        if missing:
            raise ValueError(f"the header of {attribute} must have {', '.join(missing)}, got {sorted(subspace.header)}")
        if "join" in subspace.header:
            raise ValueError(f"{attribute} was joined from two sources: analyze the subspace of each on its own")
        found[attribute] = []
        for adapter in subspace.header["adapters"]:
            key = adapter["sha256"], adapter["config_sha256"]
            if key not in known:
                below = ", ".join(map(str, roots))
                raise ValueError(f"adapters must hold those of {attribute}: {adapter['path']} is not below {below}")
            found[attribute].append(known[key])
    return found


def cross_validate(
    subspaces: Mapping[str, SubspaceFile], attributes: Sequence[str], folders: Mapping[str, Sequence[Path]]
) -> dict[str, Any]:
    """``explained`` and ``stability`` of analysis.json; ``docs/formats.md`` describes the layout.

    Args:
        subspaces: attribute -> its file; all have the same modules.
        attributes: the order of the result.
        folders: attribute -> its adapters, in the order of its file.

    Raises:
        ValueError: an adapter cannot be read or lacks a module of the subspaces.
    """
    explained: dict[str, Any] = {}
    stability: dict[str, Any] = {}
    total = sum(len(subspaces[attribute].modules) for attribute in attributes)
    with Progress("leave adapters out", total, "module") as progress:
        for attribute in attributes:
            record = _Record(len(folders[attribute]))
            for group, names, factors in _groups(attribute, subspaces[attribute], folders[attribute]):
                for batch in batches(group, names, record.adapters):
                    _measure(record, group, batch, [factors[name] for name in batch], subspaces, attribute)
                    progress.advance(len(batch))
            names = [adapter["path"] for adapter in subspaces[attribute].header["adapters"]]
            explained[attribute] = {"adapters": names, **record.explained()}
            stability[attribute] = {"adapters": names, **record.stability()} if record.adapters > 1 else None
    return {"explained": explained, "stability": stability}


def own_and_nearest(explained: Mapping[str, Any], attribute: str) -> tuple[float | None, tuple[str, float] | None]:
    """What its own attribute explains of an adapter that was left out, and the other attribute that explains most.

    Args:
        explained: what `cross_validate` has for ``attribute``.
        attribute: of the adapters.

    Returns:
        tuple: share of the energy in all modules together, mean over adapters; name and share of the other attribute.
        None where there is none: a single adapter, no other attribute, adapters without energy.
    """
    held_out = explained["held_out"]
    shares = {name: row["mean"] for name, row in explained["subspaces"].items() if row["mean"] is not None}
    shares.pop(attribute, None)
    nearest = max(shares.items(), key=lambda item: item[1], default=None)
    return held_out and held_out["mean"], nearest


@dataclass
class _Record:
    """What is collected over the modules of one attribute.

    Attributes:
        adapters: N.
        energies: module -> ``||delta_n||^2`` ``[N]``.
        projected: source -> module -> energy inside a subspace ``[N]``; a source is an attribute, ``held out`` (mined
            from the other adapters) or ``random`` (expected of random subspaces of the same sizes).
        overlaps: side -> module -> overlap with the subspace mined without adapter n ``[N]``.
        chance: side -> module -> overlap expected of random subspaces of the same sizes.
    """

    adapters: int
    energies: dict[str, torch.Tensor] = field(default_factory=dict)
    projected: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    overlaps: dict[str, dict[str, torch.Tensor]] = field(default_factory=lambda: {side: {} for side in SIDES})
    chance: dict[str, dict[str, float]] = field(default_factory=lambda: {side: {} for side in SIDES})

    def explained(self) -> dict[str, Any]:
        shares = {source: self._shares(modules) for source, modules in self.projected.items()}
        held_out, random = shares.pop("held out", None), shares.pop("random")
        return {"subspaces": shares, "held_out": held_out, "random": random}

    def _shares(self, projected: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Per adapter the share of its energy in all modules; per module the mean share over adapters."""
        inside = torch.stack(list(projected.values())).sum(0)
        whole = torch.stack([self.energies[name] for name in projected]).sum(0)
        adapters = [_rounded(share) for share in (inside / whole).tolist()]
        return {
            "mean": mean_of_known(adapters),
            "adapters": adapters,
            "modules": {
                name: mean_of_known([_rounded(share) for share in (values / self.energies[name]).tolist()])
                for name, values in projected.items()
            },
        }

    def stability(self) -> dict[str, Any]:
        result = {}
        for side, modules in self.overlaps.items():
            rows = {name: [_rounded(value) for value in values.tolist()] for name, values in modules.items()}
            adapters = [mean_of_known([row[n] for row in rows.values()]) for n in range(self.adapters)]
            result[side] = {
                "mean": mean_of_known(adapters),
                "random": mean_of_known(list(self.chance[side].values())),
                "adapters": adapters,
                "modules": rows,
            }
        return result


def _groups(
    attribute: str, subspace: SubspaceFile, folders: Sequence[Path]
) -> list[tuple[Group, list[str], Mapping[str, Factors]]]:
    adapters = [read_adapter(folder) for folder in folders]
    for adapter in adapters:
        missing = subspace.modules.keys() - adapter.modules.keys()
        if missing:
            raise ValueError(f"adapters of {attribute} must change {min(missing)}, {adapter.path} does not")
    factors = Together(adapters, subspace.modules)
    sizes = {name: module.u.shape[1] for name, module in subspace.modules.items()}
    return [(group, names, factors) for group, names in group_modules(factors, sizes).items()]


def _measure(
    record: _Record,
    group: Group,
    names: Sequence[str],
    factors: Sequence[Factors],
    subspaces: Mapping[str, SubspaceFile],
    attribute: str,
) -> None:
    """Add the modules ``names``, which are stackable, to ``record``."""
    lora_b, lora_a = stack(group, factors)
    record.energies |= dict(zip(names, energy(lora_b, lora_a)))
    for other, subspace in subspaces.items():
        inside = record.projected.setdefault(other, {})
        for index, name in enumerate(names):
            u, v = subspace.modules[name].u[None], subspace.modules[name].v[None]
            inside[name] = projected_energy(lora_b[index : index + 1], lora_a[index : index + 1], u, v)[0]
    share = group.k**2 / (group.out_features * group.in_features)
    random = record.projected.setdefault("random", {})
    random |= {name: share * record.energies[name] for name in names}
    if record.adapters > 1:
        _leave_out(record, group, names, lora_b, lora_a, subspaces[attribute])


def _leave_out(
    record: _Record,
    group: Group,
    names: Sequence[str],
    lora_b: torch.Tensor,
    lora_a: torch.Tensor,
    own: SubspaceFile,
) -> None:
    settings = {name: own.header[name] for name in _SETTINGS if name != "k"}
    settings["model"] = own.header.get("model", "mean")
    full = {side: torch.stack([getattr(own.modules[name], key) for name in names]) for side, key in SIDES.items()}
    held_out: list[torch.Tensor] = []
    overlaps: dict[str, list[torch.Tensor]] = {side: [] for side in SIDES}
    for left_b, left_a, mined in leave_one_out(group, lora_b, lora_a, settings):
        held_out.append(projected_energy(left_b, left_a, mined.u, mined.v)[:, 0])
        for side, key in SIDES.items():
            overlaps[side].append(overlap(full[side], getattr(mined, key)))
    record.projected.setdefault("held out", {}).update(zip(names, torch.stack(held_out, 1)))
    for side, size in (("output", group.out_features), ("input", group.in_features)):
        record.overlaps[side] |= dict(zip(names, torch.stack(overlaps[side], 1)))
        record.chance[side] |= dict.fromkeys(names, group.k / size)


def overlap(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    """``||Q_1^T Q_2||_F^2 / min(k_1, k_2)``, the mean ``cos^2`` of the principal angles between the column spaces.

    1 when one space holds the other, 0 when they are orthogonal, ``max(k_1, k_2) / dim`` expected of random ones; NaN
    where a space is zero.

    Args:
        one: ``[L, dim, k_1]``.
        two: ``[L, dim, k_2]``.

    Returns:
        ``[L]`` float64.
    """
    bases = orthonormal(one), orthonormal(two)
    ranks = [basis.square().sum((-2, -1)).round() for basis in bases]
    return (bases[0].mT @ bases[1]).square().sum((-2, -1)) / torch.minimum(*ranks)


def _rounded(value: float) -> float | None:
    return None if value != value else round(value, 6)


def mean_of_known(values: Iterable[float | None]) -> float | None:
    """The mean of what is not None, to six digits; None where nothing is left."""
    known = [value for value in values if value is not None]
    return round(statistics.fmean(known), 6) if known else None
