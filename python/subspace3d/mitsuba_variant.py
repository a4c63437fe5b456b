"""Choose the Mitsuba variant this machine can run, and point Dr.Jit at an LLVM it can use."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, files
from types import ModuleType

from subspace3d.choices import Variant
from subspace3d.machine import usable_cores

VARIANTS: dict[Variant, str] = {"cuda": "cuda_ad_rgb", "llvm": "llvm_ad_rgb", "scalar": "scalar_rgb"}  # fastest first
_LLVM_VARIABLE = "DRJIT_LIBLLVM_PATH"
_LLVM_PACKAGE = "karellen-llvm-core"
_PROBE_TIMEOUT_S = 180

# One ray against one sphere compiles and runs a kernel, which is what an unsuitable LLVM fails at. LLVM 15 aborts only
# at the least of two arrays, which every picture needs.
_PROBE = """
import sys
import drjit as dr
import mitsuba as mi
mi.set_variant(sys.argv[1])
scene = mi.load_dict({"type": "scene", "shape": {"type": "sphere"}})
hit = scene.ray_intersect(mi.Ray3f([0, 0, -3], [0, 0, 1]))
nearest = dr.minimum(hit.t, 9)
distance = float(nearest if sys.argv[1] == "scalar_rgb" else nearest[0])
assert abs(distance - 2) < 1e-3, distance
"""


def find_llvm() -> str | None:
    """Path of the LLVM library that Dr.Jit is told to load; None: Dr.Jit searches the system by itself.

    The variable DRJIT_LIBLLVM_PATH wins; then the library of the package karellen-llvm-core, wherever it is installed.
    """
    if os.environ.get(_LLVM_VARIABLE):
        return os.environ[_LLVM_VARIABLE]
    try:
        libraries = sorted(str(file.locate()) for file in files(_LLVM_PACKAGE) or () if file.match("libLLVM.so.*"))
    except PackageNotFoundError:
        return None
    return os.path.normpath(libraries[-1]) if libraries else None


@functools.cache
def check_variant(name: Variant) -> str:
    """Why the variant ``name`` (cuda, llvm, scalar) does not work here; empty when it does.

    The check runs in another process, because Dr.Jit aborts the process on an LLVM it cannot use.
    """
    environment = dict(os.environ)
    llvm = find_llvm()
    if llvm:
        environment[_LLVM_VARIABLE] = llvm
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE, VARIANTS[name]],
            env=environment,
            capture_output=True,
            text=True,
            timeout=_PROBE_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {_PROBE_TIMEOUT_S} s"
    if done.returncode == 0:
        return ""
    if done.returncode < 0:
        return f"the process died of signal {-done.returncode}"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"exit status {done.returncode}"


def choose_variant(wanted: Variant = "auto", gpu: bool = True) -> Variant:
    """``wanted`` if it works, or for ``auto`` the first of cuda, llvm, scalar that does; without ``gpu`` not cuda.

    Raises:
        ValueError: ``wanted`` is not a variant, or does not work on this machine; says why.
    """
    if wanted != "auto" and wanted not in VARIANTS:
        raise ValueError(f"variant must be auto or one of {list(VARIANTS)}, got {wanted!r}")
    reasons = {}
    candidates = [name for name in VARIANTS if gpu or name != "cuda"] if wanted == "auto" else [wanted]
    for name in candidates:
        reason = check_variant(name)
        if not reason:
            return name
        reasons[name] = reason
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise ValueError(f"variant must be one that works on this machine, got {wanted!r} ({listed})")


def load_mitsuba(name: Variant | None = None) -> ModuleType:
    """Import mitsuba with the variant ``name`` active (known to work here); None: any, for work that needs no rays."""
    llvm = find_llvm()
    if llvm and "drjit" not in sys.modules:
        os.environ[_LLVM_VARIABLE] = llvm
    try:
        import mitsuba
    except ImportError as error:
        raise ImportError("rendering needs mitsuba: pip install 'subspace3d[render]'") from error
    wanted = VARIANTS[name] if name else mitsuba.variant() or VARIANTS["scalar"]
    if mitsuba.variant() != wanted:
        mitsuba.set_variant(wanted)
    mitsuba.set_log_level(mitsuba.LogLevel.Error)  # warnings would break up the progress bar
    if name is None:
        import drjit

        # on one core the pool has no thread beside the caller, who waits for it for ever when it reads or writes an EXR
        drjit.set_thread_count(max(2, drjit.thread_count()))
    module: ModuleType = mitsuba
    return module


def set_threads(name: Variant, count: int) -> None:
    """Let the variant ``name`` use ``count`` CPU threads; 0: all cores."""
    load_mitsuba(name)
    import drjit

    drjit.set_thread_count(count or usable_cores())


def probe() -> dict[str, object]:
    """What ``doctor`` says about rendering: each variant as "works" or the reason why not, the LLVM, the choice."""
    variants = {name: check_variant(name) or "works" for name in VARIANTS}
    chosen = next((name for name, state in variants.items() if state == "works"), None)
    return {"variants": variants, "llvm": find_llvm() or "searched by Dr.Jit", "chosen": chosen}
