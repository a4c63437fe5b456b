"""Where the commands that make data sets put them."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from subspace3d import outputs, settings
from subspace3d.files import sweep
from subspace3d.outputs import Kind, Output


@dataclass(frozen=True)
class DatasetTargets:
    """Where a command puts data sets: OUT/<name><suffix>, and OUT/config-<name>.yaml, the settings they have.

    Attributes:
        out: their folder.
        name: what their names begin with.
        suffixes: one for each data set.
        lists_skipped: whether OUT/skipped-<name>.json is written too.
        settings_kind: of the settings.

    Raises:
        ValueError: a name that is no plain folder name.
    """

    out: Path
    name: str
    suffixes: tuple[str, ...]
    lists_skipped: bool = False
    settings_kind: Kind = outputs.GENERATE_SETTINGS

    def __post_init__(self) -> None:
        if Path(self.name).name != self.name or self.name.startswith("."):
            raise ValueError(f"name must be a plain folder name, got {self.name!r}")

    @property
    def record(self) -> Path:
        return self.out / f"config-{self.name}.yaml"

    @property
    def skipped(self) -> Path:
        return self.out / f"skipped-{self.name}.json"

    def declared(self) -> list[Output]:
        found = [Output("out", self.record, self.settings_kind)]
        if self.lists_skipped:
            found.append(Output("out", self.skipped, outputs.SKIPPED))
        # where the settings stand, data sets of their name are added to; else they must be new
        kind = outputs.ADDED_TO if self.record.is_file() else outputs.NEW
        return found + [Output("out", self.out / f"{self.name}{suffix}", kind) for suffix in self.suffixes]

    def claim(self, inputs: list[tuple[str, Path]]) -> None:
        """Ask the rule about each of them.

        Raises:
            ValueError: one of them is not own.
        """
        for output in self.declared():
            outputs.claim(output.path, output.kind, output.argument, inputs)

    def replace_differing(self, config: Any, identity: tuple[str, ...], who: str) -> None:
        """Delete the data sets of this name if they were made with other settings.

        Args:
            config: the settings now.
            identity (tuple): the settings that decide what a scene looks like.
            who (str): the command, for the message that says what is replaced.

        Raises:
            ValueError: one of them is not own; nothing has been deleted.
        """
        if not settings.differing(self.record, config, identity):
            return
        outputs.replace(self._found(), outputs.DATASET, who)
        outputs.replace([self.skipped], outputs.SKIPPED, who)
        # last, so that a call that was cut off finds what is left to do
        outputs.replace([self.record], self.settings_kind, who)

    def check_same(self, config: Any, identity: tuple[str, ...], made: str) -> None:
        """Refuse to add to data sets of this name that other settings made, see `settings.check_same`.

        The settings of a run that ended before its first scene bind nothing.
        """
        if any(next(outputs.entries(folder), None) is not None for folder in self._found()):
            settings.check_same(self.record, config, identity, made)

    def remove_empty(self) -> None:
        """Remove what killed processes left in the data sets, and those that hold nothing then."""
        for suffix in self.suffixes:
            folder = self.out / f"{self.name}{suffix}"
            sweep(folder)
            with contextlib.suppress(OSError):
                folder.rmdir()

    def _found(self) -> list[Path]:
        """Folders that are there and have the name of one of the data sets, of whatever settings."""
        made = re.compile(re.escape(self.name) + r"(_\d\d|_train|_test|_cross)?")
        folders = self.out.iterdir() if self.out.is_dir() else ()
        found = sorted(path for path in folders if path.is_dir() and made.fullmatch(path.name))
        # of names that begin alike some may be settings' of their own
        return [
            path
            for path in found
            if path.name == self.name or not self.record.with_name(f"config-{path.name}.yaml").exists()
        ]
