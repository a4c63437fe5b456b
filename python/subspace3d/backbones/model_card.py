"""README.md beside weights, as the Hub reads it: what an adapter belongs to, and the licence of those weights."""

from __future__ import annotations

import re
from pathlib import Path

from subspace3d.files import write_text
from subspace3d.reading import open_regular

NAME = "README.md"
# blank lines are no part of the dashes' line: of a card of nothing else every one would begin a search to the end
_FRONT_MATTER = re.compile(r"---[ \t\r]*\n(.*?)\n---[ \t\r]*\n", re.DOTALL)
_ENTRY = re.compile(r"^(license|license_name):[ \t]*(?:\"([^\"\n]+)\"|'([^'\n]+)'|([^\s\"'#]+))", re.MULTILINE)
_LARGEST, _LONGEST = 1 << 20, 200
# the Hub's own names; any other is "other" with a name of its own
_KNOWN = re.compile(r"(apache-2\.0|mit|cc-by(-nc)?(-sa|-nd)?-\d\.\d)$")


def write_card(folder: Path, base_model: str, licence: str) -> None:
    """Write the card of an adapter.

    Args:
        folder (Path): that of the adapter.
        base_model (str): identity of the weights it was made on.
        licence (str): theirs, as their publisher calls it.
    """
    known = re.sub(r"[\s_]+", "-", re.sub(r"\s*\(.*\)$", "", licence).strip().lower())
    entry = f"license: {known}\n" if _KNOWN.match(known) else f"license: other\nlicense_name: {_quoted(licence)}\n"
    text = (
        f"---\nlibrary_name: peft\n{entry}---\n"
        f"An adapter for the weights `{base_model}`, made by subspace3d. Licence of these weights: {licence}\n"
    )
    write_text(folder / NAME, text)


def _quoted(text: str) -> str:
    return '"' + " ".join(text.replace('"', "'").split())[:_LONGEST] + '"'


def licence_of_card(path: Path) -> str | None:
    """``license_name``, else ``license``, between two lines of three dashes at the start of a card; None: neither."""
    if not path.is_file():
        return None
    with open_regular(path) as file:
        front = _FRONT_MATTER.match(file.read(_LARGEST).decode("utf-8", "replace"))
    entries = {key: a or b or c for key, a, b, c in _ENTRY.findall(front[1])} if front else {}
    named = entries.get("license_name") or entries.get("license")
    return named[:_LONGEST] if named else None
