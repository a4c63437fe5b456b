"""The stage ``mine``: a folder of LoRA adapters of one attribute -> one subspace file.

Modules of equal shape are stacked and mined together, so a network costs a few batched calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import subspace_ext
from subspace3d import files
from subspace3d.configs import MineConfig
from subspace3d.formats.adapter import CONFIG_NAME, WEIGHTS_NAME, Adapter, read_adapter
from subspace3d.formats.adapter_folders import search_adapters
from subspace3d.formats.subspace import ModuleSubspace, SubspaceFile, load_subspace, natural_key, save_subspace
from subspace3d.mining.stacks import Factors, Group, batches, explained_energy, group_modules, stack
from subspace3d.progress import Progress


def run(config: MineConfig) -> Path:
    """``min over u, v of sum_n ||delta[n] - u v^T||_F^p`` for each module of the adapters below ``config.adapters``.

    Adapters of different rank are legal: the factors are padded with zeros, which leaves their product as it is.
    A module too narrow for ``config.k`` (a head with 2 outputs) gets ``k = min(out, in, sum of its adapters' ranks)``,
    recorded in the header under ``modules.<name>.k``. Nothing is computed when ``config.out`` was made from the same
    adapters with the same settings.

    Returns:
        ``config.out``.

    Raises:
        FileNotFoundError: there is no adapter below ``config.adapters``.
        ValueError: an adapter that cannot be read, adapters of different base models or modules, or ``k`` larger than
            the sum of the adapters' ranks in every module.
    """
    found = search_adapters(config.adapters)
    folders = found.folders
    inputs = _inputs(config, folders)
    if _is_done(config.out, inputs, config.base_model):
        print(f"{config.out}: already mined with the same settings; {found.summary()}")
        return config.out

    adapters = [read_adapter(folder) for folder in folders]
    check_same_modules(adapters, config.base_model)
    factors = {name: [adapter.modules[name] for adapter in adapters] for name in adapters[0].modules}
    groups = group_modules(factors, config.k)
    _report_ignored(adapters)

    modules: dict[str, ModuleSubspace] = {}
    details: dict[str, dict[str, Any]] = {}
    with Progress(f"mine {config.out.stem}", len(factors), "module") as progress:
        for group, names in groups.items():
            for batch in batches(group, names, len(adapters)):
                mined = _mine_batch(group, [factors[name] for name in batch], config)
                for name, (module, detail) in zip(batch, mined):
                    modules[name], details[name] = module, detail
                progress.advance(len(batch))
    header = {"base_model": config.base_model or adapters[0].base_model, **inputs, "modules": details}
    save_subspace(config.out, modules, header)
    print(summary(SubspaceFile(modules, header)), f"-> {config.out}", flush=True)
    print(found.summary(), flush=True)
    return config.out


def check_same_modules(adapters: Sequence[Adapter], base_model: str = "") -> None:
    """Adapters of one attribute must belong to one base model and change the same modules.

    ``base_model`` says which one it is where the adapters call it by several names; modules and sizes must still agree.

    Raises:
        ValueError: they do not; the message names the first difference.
    """
    first = adapters[0]
    for other in adapters[1:]:
        if other.base_model != first.base_model and not base_model:
            raise ValueError(
                f"adapters must have one base model: {first.path} has {first.base_model!r}, "
                f"{other.path} has {other.base_model!r}; if these are one model, give it one name (--base-model)"
            )
        for here, there in ((first, other), (other, first)):
            missing = sorted(here.modules.keys() - there.modules.keys(), key=natural_key)
            if missing:
                raise ValueError(
                    f"adapters must change the same modules: {here.path} has {missing[0]}"
                    f"{f' and {len(missing) - 1} more' if missing[1:] else ''}, {there.path} has not"
                )
        for name, (lora_b, lora_a) in first.modules.items():
            sizes = (len(lora_b), lora_a.shape[1])
            other_sizes = (len(other.modules[name][0]), other.modules[name][1].shape[1])
            if sizes != other_sizes:
                raise ValueError(
                    f"{name} must have one size [out, in]: {first.path} has {list(sizes)}, "
                    f"{other.path} has {list(other_sizes)}"
                )


def summary(subspaces: SubspaceFile) -> str:
    """One line: number of modules, share of the adapters' energy inside the subspaces, the least trusted adapter."""
    details = subspaces.header["modules"].values()
    shares = [share for detail in details for share in detail["explained"] if share is not None]
    explained = f"{100 * sum(shares) / len(shares):.1f} %" if shares else "none (all updates are zero)"
    text = f"{len(subspaces.modules)} modules; energy of the updates inside the subspaces: {explained}"
    names = [adapter["path"] for adapter in subspaces.header["adapters"]]
    if len(names) > 1:
        weights = mean_relative_weights(subspaces)
        least = int(weights.argmin())
        text += f"; most down-weighted adapter: {names[least]} ({weights[least]:.2f} of the mean weight)"
    return text


def mean_relative_weights(subspaces: SubspaceFile) -> torch.Tensor:
    """``mean over modules of w_n / mean_n(w)``: ``[N]`` float64, 1 for an adapter that is trusted like the others."""
    return torch.stack([module.weights / module.weights.mean() for module in subspaces.modules.values()]).mean(0)


def _inputs(config: MineConfig, folders: Sequence[Path]) -> dict[str, Any]:
    """Everything the result depends on, as it stands in the header."""
    adapters = [
        {
            "path": folder.relative_to(config.adapters).as_posix(),
            "sha256": files.sha256(folder / WEIGHTS_NAME),
            "config_sha256": files.sha256(folder / CONFIG_NAME),
        }
        for folder in folders
    ]
    settings = {name: getattr(config, name) for name in ("k", "p", "eps", "max_iter", "tol")}
    return {"adapters": adapters, **settings}


def _is_done(path: Path, inputs: dict[str, Any], base_model: str) -> bool:
    if not Path(path).exists():
        return False
    try:
        header = load_subspace(path).header
    except ValueError as error:
        print(f"mining anew: {error}")
        return False
    named = {"base_model": base_model} if base_model else {}
    return all(header.get(name) == value for name, value in {**inputs, **named}.items())


def _report_ignored(adapters: Sequence[Adapter]) -> None:
    for prefix in dict.fromkeys(prefix for adapter in adapters for prefix in adapter.unwrapped):
        count = sum(prefix in adapter.unwrapped for adapter in adapters)
        print(f"  the wrapper's prefix {prefix!r} was taken off the names of {count} adapters' modules")
    ignored = sorted({key for adapter in adapters for key in adapter.ignored})
    if ignored:
        more = f" and {len(ignored) - 1} more" if ignored[1:] else ""
        print(f"  not part of any LoRA update and left out: {ignored[0]}{more}")


def _mine_batch(
    group: Group, batch: Sequence[Factors], config: MineConfig
) -> list[tuple[ModuleSubspace, dict[str, Any]]]:
    lora_b, lora_a = stack(group, batch)
    mined = subspace_ext.mine_subspace(
        lora_b, lora_a, group.k, p=config.p, eps=config.eps, max_iter=config.max_iter, tol=config.tol
    )
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
