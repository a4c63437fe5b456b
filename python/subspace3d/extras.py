"""What the package's extras bring, read from its own metadata, for advice on libraries that are not installed."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import sysconfig
from dataclasses import dataclass

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

_OLDEST = "3.11"  # for which every library has a release
# Without wheels for free-threaded Python, which no marker can name.
_NEEDS_THE_INTERPRETER_LOCK = {"open3d", "mitsuba"}
# names to import that are not those to install, or that a library of ours brings along
_DISTRIBUTION_OF = {"PIL": "pillow", "yaml": "pyyaml", "drjit": "mitsuba", "huggingface_hub": "peft"}


@dataclass(frozen=True)
class Extras:
    """The requirements of the installed package, as names on PyPI."""

    base: tuple[str, ...]
    of_extra: dict[str, tuple[str, ...]]  # extra -> what it adds to the base on this machine, in the order of pyproject
    in_all: tuple[str, ...]  # the extras that `all` joins
    not_for_this_python: dict[str, tuple[str, ...]]  # extra -> what it leaves out here


@functools.cache
def read() -> Extras:
    metadata = importlib.metadata.metadata("subspace3d")
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist") or []]
    base = tuple(canonicalize_name(item.name) for item in requirements if _applies(item, ""))
    of_extra: dict[str, tuple[str, ...]] = {}
    left_out: dict[str, tuple[str, ...]] = {}
    in_all: tuple[str, ...] = ()
    for extra in metadata.get_all("Provides-Extra") or []:
        asked = [item for item in requirements if not _applies(item, "") and _applies(item, extra, _OLDEST)]
        chosen = [item for item in asked if _applies(item, extra) and not _needs_the_lock(item)]
        left_out[extra] = tuple(canonicalize_name(item.name) for item in asked if item not in chosen)
        of_extra[extra] = tuple(canonicalize_name(item.name) for item in chosen if item.name != "subspace3d")
        if extra == "all":
            in_all = tuple(sorted(extra for item in chosen for extra in item.extras))
    return Extras(base, of_extra, in_all, {extra: names for extra, names in left_out.items() if names})


def _applies(requirement: Requirement, extra: str, python: str | None = None) -> bool:
    environment = {"extra": extra, "python_version": python or ".".join(platform.python_version_tuple()[:2])}
    return requirement.marker is None or requirement.marker.evaluate(environment)


def _needs_the_lock(requirement: Requirement) -> bool:
    return requirement.name in _NEEDS_THE_INTERPRETER_LOCK and bool(sysconfig.get_config_var("Py_GIL_DISABLED"))


def this_python() -> str:
    """The interpreter as wheels tell it apart: ``Python 3.14``, ``free-threaded Python 3.14``."""
    free = "free-threaded " if sysconfig.get_config_var("Py_GIL_DISABLED") else ""
    return f"{free}Python {'.'.join(platform.python_version_tuple()[:2])}"


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
    """The command that installs what ``import module`` needs, or that none can; None where no extra brings it."""
    distribution = canonicalize_name(_DISTRIBUTION_OF.get(module, module))
    known = read()
    if distribution in known.base:
        return f"pip install {distribution}"
    for extra, names in known.of_extra.items():
        if distribution in names:
            return f"pip install 'subspace3d[{extra}]'"
    if any(distribution in names for names in known.not_for_this_python.values()):
        return f"it has no release for {this_python()}; an older Python has"
    return None
