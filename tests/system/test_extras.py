"""What the messages about missing libraries advise, against pyproject.toml."""

import importlib.metadata
import sys
import tomllib
from pathlib import Path

import pytest
from training.plane_scenes import write_plane_scenes

from subspace3d import cli, extras
from subspace3d.commands import doctor

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_extras_are_those_of_the_project() -> None:
    known = extras.read()
    assert list(known.of_extra) == list(PROJECT["optional-dependencies"])
    assert "torch" in known.base and "tyro" in known.base
    assert "mitsuba" in known.of_extra["render"] and "mitsuba" not in known.base
    assert set(known.in_all) == {"tune", "eval", "render", "colmap", "view"}


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("mitsuba", "pip install 'subspace3d[render]'"),
        ("drjit", "pip install 'subspace3d[render]'"),
        ("PIL", "pip install 'subspace3d[tune]'"),
        ("huggingface_hub", "pip install 'subspace3d[tune]'"),
        ("open3d", "pip install 'subspace3d[eval]'"),
        ("ray", "pip install 'subspace3d[cluster]'"),
        ("yaml", "pip install pyyaml"),
        ("nothing_of_ours", None),
    ],
)
def test_the_line_that_installs_a_library(module: str, line: str | None) -> None:
    assert extras.install_line(module) == line


def test_a_command_names_the_line_that_installs_what_it_lacks(tmp_path, monkeypatch, capsys) -> None:
    write_plane_scenes(tmp_path, scenes=1, views=2, size=28)
    monkeypatch.setitem(sys.modules, "viser", None)
    with pytest.raises(SystemExit) as end:
        cli.main(["view", str(tmp_path)])
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert "viser is not installed: pip install 'subspace3d[view]'" in message


def test_doctor_lists_what_is_missing_by_extra(monkeypatch) -> None:
    real = importlib.metadata.version

    def without_peft(name: str) -> str:
        if name == "peft":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", without_peft)
    facts = doctor.examine()
    assert facts["missing"]["tune"] == ["peft"] and "eval" not in facts["missing"]
    assert "peft: pip install 'subspace3d[tune]'" in doctor._text(facts)


@pytest.mark.parametrize(
    ("version", "free_threaded", "left_out", "who"),
    [
        ("3.11.9", 0, {}, None),
        ("3.15.0", 0, {"eval": ["open3d"]}, "Python 3.15"),
        ("3.14.0", 1, {"eval": ["open3d"], "render": ["mitsuba"]}, "free-threaded Python 3.14"),
    ],
)
def test_what_has_no_release_for_a_new_python_is_said(monkeypatch, version, free_threaded, left_out, who) -> None:
    monkeypatch.setattr(extras.platform, "python_version_tuple", lambda: tuple(version.split(".")))
    monkeypatch.setattr(extras.sysconfig, "get_config_var", lambda name: free_threaded)
    extras.read.cache_clear()
    try:
        facts = doctor.examine()
        assert facts["not_for_this_python"] == left_out
        assert set(extras.read().of_extra["eval"]) >= {"scipy", "matplotlib", "pillow"}
        lines = [line for line in doctor._text(facts).splitlines() if line.startswith("left out")]
        assert len(lines) == len(left_out)
        for line, (extra, names) in zip(lines, left_out.items()):
            assert f"{names[0]}: no release for {who} yet; the rest of subspace3d[{extra}] works" in line
            assert extras.install_line(names[0]) == f"it has no release for {who}; an older Python has"
        assert extras.install_line("scipy") == "pip install 'subspace3d[eval]'"
    finally:
        extras.read.cache_clear()
