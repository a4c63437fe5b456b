"""subspace3d -> subspace_ext -> _C, one direction; importing is cheap and touches no GPU."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import subspace3d

LAYERS = (
    # each module or package of subspace3d imports from its own row and from those above it only
    "choices cropping extras files geometry locks log machine mitsuba_variant outputs patterns plain_pickle progress"
    " reading records schema settings system tables",
    "backbones jobs",
    "formats",
    "adapters mining scenes",
    "datasets",
    "training",
    "evaluation",
    "reporting bench",
    "commands",
    "cli __main__",
)
ROOT = Path(subspace3d.__file__).parent


def loaded_modules(statement: str) -> set[str]:
    code = f"{statement}\nimport json, sys; print(json.dumps(sorted(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in json.loads(answer.stdout.splitlines()[-1])}


def test_the_core_imports_nothing_above_it():
    loaded = loaded_modules("import subspace_ext")
    assert not loaded & {"subspace3d", "peft", "open3d", "transformers", "mitsuba", "scipy", "safetensors"}


@pytest.mark.parametrize(
    "module", ["subspace3d", "subspace3d.cli", "subspace3d.files", "subspace3d.settings", "subspace3d.extras"]
)
def test_the_command_line_is_light(module):
    assert not loaded_modules(f"import {module}") & {"torch", "numpy", "peft", "open3d", "mitsuba", "matplotlib"}


def test_importing_everything_does_not_initialise_cuda():
    code = (
        "import importlib, pkgutil, subspace_ext, subspace3d, torch\n"
        "for package in (subspace_ext, subspace3d):\n"
        "    for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        # those of adapters.peft subclass PEFT's own classes; nothing imports them before PEFT is needed
        "        if not module.name.endswith('__main__') and '.peft.' not in module.name:\n"
        "            importlib.import_module(module.name)\n"
        "assert not torch.cuda.is_initialized()\n"
        "import sys; heavy = {'peft', 'open3d', 'mitsuba', 'matplotlib', 'transformers', 'ray'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip() == "[]"


def _imported(source: Path) -> set[str]:
    """Names right below subspace3d that a file imports, also inside functions and for types alone."""
    found = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "subspace3d":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("subspace3d."):
            found.add(str(node.module).split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("subspace3d.")}
    return found


def test_no_module_imports_upwards():
    level = {name: row for row, names in enumerate(LAYERS) for name in names.split()}
    upwards, unknown = [], set()
    for source in sorted(ROOT.rglob("*.py")):
        importer = source.relative_to(ROOT).with_suffix("").parts[0]
        if importer == "__init__":
            continue  # the public names, each imported when it is used
        for name in _imported(source) - {"__version__"}:
            if name not in level or importer not in level:
                unknown.add(name if name not in level else importer)
            elif level[name] > level[importer]:
                upwards.append(f"{source.relative_to(ROOT)} imports subspace3d.{name}")
    assert not unknown, f"in no row of LAYERS: {sorted(unknown)}"
    assert not upwards, "\n".join(upwards)


def test_no_two_modules_import_each_other():
    """Imports inside functions and for types alone count too; the public names of a package do not."""
    modules = {
        ".".join(("subspace3d", *source.relative_to(ROOT).with_suffix("").parts)): source
        for source in ROOT.rglob("*.py")
        if source.name != "__init__.py"
    }
    edges: dict[str, set[str]] = {}
    for name, source in modules.items():
        edges[name] = set()
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                targets = {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
                edges[name] |= targets & modules.keys()
    state: dict[str, int] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert state.get(name) != 1, " -> ".join((*path[path.index(name) :], name))
        if name not in state:
            state[name] = 1
            for target in sorted(edges[name]):
                visit(target, (*path, name))
            state[name] = 2

    for name in sorted(edges):
        visit(name, ())


def test_public_names_are_lazy_and_complete():
    assert not loaded_modules("import subspace3d as s3; dir(s3)") & {"torch", "numpy", "peft"}
    code = (
        "import subspace3d as s3; print([getattr(s3, name).__name__ for name in s3.__all__ if name != '__version__'])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ast.literal_eval(answer.stdout) == [name for name in subspace3d.__all__ if name != "__version__"]
    with pytest.raises(AttributeError, match="no attribute 'version'"):
        _ = subspace3d.version
