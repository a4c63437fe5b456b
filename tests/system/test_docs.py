"""What the site does not check: links between files outside it, and that the references list everything."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from subspace3d import cli

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), ROOT / "benchmarks/README.md", ROOT / "notices/README.md"]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    found = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


def test_every_setting_of_every_command_is_in_its_reference() -> None:
    script = (
        "import json, sys; sys.path.insert(0, 'docs/_ext'); from generated import commands, flags;"
        "found = {name: [[flag.name, flag.help] for flag in flags(value)] for name, value in commands().items()};"
        "print(json.dumps(found))"
    )
    answer = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    commands = json.loads(answer.stdout)
    assert {"doctor", "generate", "mine", "finetune"} <= commands.keys()
    assert [flag[0] for flag in commands["mine"]][:3] == ["--adapters", "--out", "--k"]
    assert "--train.lr" in [flag[0] for flag in commands["finetune"]]
    without = [(name, flag[0]) for name, flags in commands.items() for flag in flags if not flag[1]]
    assert without == [], "settings without a help text"


def documented_commands(page: Path) -> list[str]:
    """Every `subspace3d COMMAND FLAGS` of a page's blocks without "...", the variables of shell loops filled in."""
    blocks = re.findall(r"^```(\S*)\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    shell = [text.replace("\\\n", " ") for language, text in blocks if language in ("", "sh")]
    lines = [line for text in shell for line in text.splitlines()]
    found = (re.search(r"(?:^|-m | )subspace3d ([a-z].*)", line) for line in lines)
    values = {"a": "texture", "attribute": "texture", "method": "lora"}
    filled = (re.sub(r"\$(\w+)", lambda name: values.get(name[1], "4"), each[1]) for each in found if each)
    return [line for line in filled if "..." not in line.partition("#")[0]]


def test_commands_have_the_flags_they_are_shown_with() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    lines = [line for page in pages for line in documented_commands(page)]
    assert len(lines) > 60
    for line in lines:
        name, *arguments = shlex.split(line, comments=True)
        if "--config" in arguments:  # read for its values; the page shows what is in it
            at = arguments.index("--config")
            del arguments[at : at + 2]
        assert name in cli.COMMANDS, line
        try:
            cli.parse(name, cli.load(name)[0], arguments, cli.COMMANDS[name].bare)
        except SystemExit as end:
            pytest.fail(f"{line}: {end}")


def test_the_guide_has_every_page() -> None:
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    listed = {
        line for block in re.findall(r"```\{toctree\}\n(.*?)```", index, flags=re.DOTALL) for line in block.split()
    }
    assert pages <= listed


def test_every_promise_names_tests_that_are_there() -> None:
    page = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    tests = {path: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    functions = {name for text in tests.values() for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)}
    named = set(re.findall(r"`(?:[\w/]*/)?(test_\w+)(?:\.py)?(?:::test_\w+)?(\.\.\.)?`", page))
    assert len(named) > 30
    files = {path.stem for path in tests}
    for name, cut in named:
        known = name in files | functions or (cut and any(each.startswith(name) for each in functions))
        assert known, name
    # a line of a table without a test promises what nothing shows
    for line in page.split("## Faults")[1].split("## Hostile numbers")[0].splitlines():
        if line.startswith("| ") and not line.startswith(("| what happens", "| promise")):
            assert "`test" in line or "tests/" in line, line


def test_commands_that_need_a_gpu_select_tests_for_one() -> None:
    """By the files and words of docs/gpu.md: a test that is renamed would be looked for in vain on the GPU."""
    page = (ROOT / "docs/gpu.md").read_text(encoding="utf-8")
    commands = re.findall(r"pytest -m gpu (tests/[\w/.]+)(?: -k (\"[^\"]+\"|\w+))?", page)
    assert len(commands) > 7
    for place, words in commands:
        path = ROOT / place
        files = [path] if path.suffix else sorted(path.glob("test_*.py"))
        text = "".join(file.read_text(encoding="utf-8") for file in files)
        assert re.search(r"mark\.gpu|\(kernel_device|, kernel_device", text), place
        for word in words.strip('"').split(" or ") if words else ():
            assert re.search(rf"^def test_\w*{word}", text, re.MULTILINE), f"{place} -k {word}"


def test_pages_name_files_of_tests_that_are_there() -> None:
    tests = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for name in re.findall(r"[\w/]*?(?:tests/[\w/]+|`test_\w+)\.py", page.read_text(encoding="utf-8")):
            there = (ROOT / name).is_file() if name.startswith("tests/") else name.strip("`") in tests
            assert there, f"{page.name}: {name}"
