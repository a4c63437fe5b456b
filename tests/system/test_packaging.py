"""What a release says about itself: version, licences, sizes, model card, wheel configuration."""

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import yaml

import subspace3d
import subspace_ext

ROOT = Path(__file__).parents[2]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
CLASSIFIED = re.findall(r'"Programming Language :: Python :: 3\.(\d+)"', PROJECT)


def script(name: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_version_comes_from_one_place() -> None:
    (version,) = re.findall(r'^version = "(.*)"$', PROJECT, flags=re.MULTILINE)
    assert subspace3d.__version__ == subspace_ext.__version__ == subspace_ext.build_info()["version"] == version
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert first is not None and first[1] == version
    sources = [
        path
        for folder in ("python", "subspace_ext", "csrc", "scripts")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".cpp", ".cu", ".h", ".sh") and f'"{version}"' in path.read_text(encoding="utf-8")
    ]
    assert sources == []


def test_licence_texts_of_what_the_wheel_carries_are_installed() -> None:
    files = {path.name for path in metadata.files("subspace3d") or [] if "licenses" in path.parts}
    texts = {path.name for path in (ROOT / "notices").iterdir()}
    assert files == {"LICENSE", *texts}
    listed = set(re.findall(r"`([\w-]+\.txt)`", (ROOT / "notices/README.md").read_text(encoding="utf-8")))
    assert listed == texts - {"README.md"}
    expression = metadata.metadata("subspace3d")["License-Expression"]
    assert expression == "Apache-2.0 AND BSD-3-Clause AND LicenseRef-NVIDIA-CUDA-Toolkit-EULA"


def test_the_model_card_has_the_figures_of_the_weights() -> None:
    command = [sys.executable, "-m", "experiments.pretraining.model_card", "--check"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert answer.returncode == 0, answer.stderr


def test_the_programme_has_the_figures_of_the_rows() -> None:
    answer = script("benchmarks/programme.py", "--check")
    assert answer.returncode == 0, answer.stderr


@pytest.mark.parametrize(
    ("system", "architecture", "tag"),
    [
        ("linux", "x86_64", "manylinux_x86_64"),
        ("linux", "aarch64", "manylinux_aarch64"),
        ("macos", "arm64", "macosx_arm64"),
        ("windows", "AMD64", "win_amd64"),
    ],
)
def test_wheels_are_configured_for_every_python_that_is_supported(system: str, architecture: str, tag: str) -> None:
    command = [sys.executable, "-m", "cibuildwheel", "--print-build-identifiers"]
    command += ["--platform", system, "--archs", architecture]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.split() == [f"cp3{minor}-{tag}" for minor in ("11", "12", "13", "14", "14t", "15")]


def test_the_supported_pythons_are_named_alike() -> None:
    oldest = min(CLASSIFIED, key=int)
    assert [int(minor) for minor in CLASSIFIED] == [11, 12, 13, 14, 15]
    assert f'requires-python = ">=3.{oldest}"' in PROJECT
    assert f'target-version = "py3{oldest}"' in PROJECT and f'python_version = "3.{oldest}"' in PROJECT
    assert f"Python 3.{oldest} or newer" in (ROOT / "scripts/bootstrap.sh").read_text(encoding="utf-8")


def test_the_packages_say_that_they_are_typed() -> None:
    for package in (subspace3d, subspace_ext):
        assert (Path(package.__file__).parent / "py.typed").is_file()


def test_the_citation_is_that_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == subspace3d.__version__
    assert citation["preferred-citation"]["title"] in (ROOT / "README.md").read_text(encoding="utf-8").replace(
        "\n", " "
    )


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_the_files_of_the_hosting_site_can_be_read(path: Path) -> None:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    # YAML 1.1 reads the key `on` of a workflow as a truth value
    needed = {"name", True, "jobs"} if path.parent.name == "workflows" else set()
    assert needed <= content.keys()


def test_workflows_use_actions_at_a_fixed_commit() -> None:
    used = [
        line.strip()
        for path in (ROOT / ".github" / "workflows").glob("*.yml")
        for line in path.read_text(encoding="utf-8").splitlines()
        if "uses:" in line
    ]
    # a tag can be moved to other code; the comment says which version the commit is
    assert used and not [line for line in used if not re.fullmatch(r"- uses: \S+@[0-9a-f]{40}  # v[0-9.]+", line)]
