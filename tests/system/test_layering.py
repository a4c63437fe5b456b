"""subspace3d -> subspace_ext -> _C, one direction; importing is cheap and touches no GPU."""

import json
import subprocess
import sys

import pytest


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
        # the modules named peft_* subclass PEFT's own classes; nothing imports them before PEFT is needed
        "        if not module.name.endswith('__main__') and '.peft_' not in module.name:\n"
        "            importlib.import_module(module.name)\n"
        "assert not torch.cuda.is_initialized()\n"
        "import sys; heavy = {'peft', 'open3d', 'mitsuba', 'matplotlib', 'transformers', 'ray'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip() == "[]"
