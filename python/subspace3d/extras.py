"""What the package's extras bring, read from its own metadata, for advice on libraries that are not installed."""

from __future__ import annotations

import functools
import importlib.metadata
from dataclasses import dataclass

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# names to import that are not those to install, or that a library of ours brings along
_DISTRIBUTION_OF = {"PIL": "pillow", "yaml": "pyyaml", "drjit": "mitsuba", "huggingface_hub": "peft"}


@dataclass(frozen=True)
class Extras:
    """The requirements of the installed package, as names on PyPI."""

    base: tuple[str, ...]
    of_extra: dict[str, tuple[str, ...]]  # extra -> what it adds to the base on this machine, in the order of pyproject
    in_all: tuple[str, ...]  # the extras that `all` joins


@functools.cache
def read() -> Extras:
    metadata = importlib.metadata.metadata("subspace3d")
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist") or []]
    base = tuple(canonicalize_name(item.name) for item in requirements if _applies(item, ""))
    of_extra: dict[str, tuple[str, ...]] = {}
    in_all: tuple[str, ...] = ()
    for extra in metadata.get_all("Provides-Extra") or []:
        chosen = [item for item in requirements if not _applies(item, "") and _applies(item, extra)]
        of_extra[extra] = tuple(canonicalize_name(item.name) for item in chosen if item.name != "subspace3d")
        if extra == "all":
            in_all = tuple(sorted(extra for item in chosen for extra in item.extras))
    return Extras(base, of_extra, in_all)


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def missing(extra: str) -> list[str]:
    """The libraries of ``extra`` that are not installed."""
    return [name for name in read().of_extra[extra] if version(name) is None]


def version(distribution: str) -> str | None:
    """The installed version of a library by its name on PyPI; None: it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def install_line(module: str) -> str | None:
    """The command that installs what ``import module`` needs; None where no extra of the package brings it."""
    distribution = canonicalize_name(_DISTRIBUTION_OF.get(module, module))
    known = read()
    if distribution in known.base:
        return f"pip install {distribution}"
    for extra, names in known.of_extra.items():
        if distribution in names:
            return f"pip install 'subspace3d[{extra}]'"
    return None
