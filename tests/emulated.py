"""The compiled module with its CUDA kernels built for an emulator on the CPU.

Only the meaning of the hardware's instructions is replaced (tests/emulator); kernels, launches and bindings are those
that run on a GPU.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
EMULATOR = Path(__file__).parent / "emulator"
# for `make sanitize`, which preloads the library these need
_CHECKS = os.environ.get("SUBSPACE_EMULATED_SANITIZE")
SANITIZE = [f"-fsanitize={_CHECKS}", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"] if _CHECKS else []


def _sources() -> list[Path]:
    return [
        ROOT / "csrc/bindings.cpp",
        *sorted((ROOT / "csrc/cpu").glob("*.cpp")),
        *sorted(ROOT.glob("csrc/cuda/*.cu")),
    ]


def build(folder: Path, defines: tuple[str, ...] = ()) -> Path:
    """The library in `folder`, compiled anew where sources changed; RuntimeError with what the compiler said."""
    import pybind11

    library = folder / "_C.so"
    texts = [*_sources(), *sorted(ROOT.glob("csrc/**/*.*h")), *sorted(EMULATOR.rglob("*.*h")), Path(__file__)]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in texts)).hexdigest()
    stamp = folder / "digest"
    if library.exists() and stamp.exists() and stamp.read_text() == digest:
        return library
    folder.mkdir(parents=True, exist_ok=True)
    includes = [EMULATOR, ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include")]
    # longjmp between fibers is what fortified builds refuse.
    flags = ["-std=c++17", "-O2", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE"]
    flags += ['-DSUBSPACE_VERSION="emulated"', '-DSUBSPACE_COMPILER="emulated"', "-DSUBSPACE_HAS_CUDA"]
    flags += ['-DSUBSPACE_CUDA_VERSION="emulated"', '-DSUBSPACE_CUDA_ARCHS="emulated"']
    flags += [f"-I{path}" for path in includes]
    flags += [*SANITIZE, *(f"-D{name}" for name in defines)]

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.name}.o"
        command = ["c++", *flags, "-x", "c++", "-c", str(source), "-o", str(target)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        return target

    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, _sources()))
        subprocess.run(
            ["c++", "-shared", *SANITIZE, *map(str, objects), "-o", str(library), "-pthread"],
            check=True,
            capture_output=True,
            text=True,
        )
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"the emulated kernels do not compile:\n{error.stderr}") from error
    stamp.write_text(digest)
    return library


def load(plain: bool = False) -> ModuleType | None:
    """The emulated module; None where there is no C++ compiler or no source.

    plain: as Turing and compilers without vector types get it.
    """
    if shutil.which("c++") is None or not (ROOT / "csrc").is_dir():
        return None
    name = f"emulated{'-plain' if plain else ''}{'-sanitized' if SANITIZE else ''}"
    defines = ("SUBSPACE_EMULATED_TURING", "SUBSPACE_PLAIN_LANES") if plain else ()
    spec = importlib.util.spec_from_file_location(f"{name}._C", build(ROOT / "build" / name, defines))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
