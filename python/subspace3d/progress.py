"""Progress with an ETA: a live bar on a terminal, one plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

Item = TypeVar("Item")

_PLAIN_INTERVAL_S = 15.0


def format_duration(seconds: float) -> str:
    """``75`` -> ``1:15``, ``3700`` -> ``1:01:40``."""
    minutes, second = divmod(int(seconds + 0.5), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}" if hour else f"{minute}:{second:02d}"


class Progress:
    """Count ``total`` units of work under ``label`` and say on stderr how far it is and how long it will take.

    Args:
        label (str): what is being done, e.g. ``"render texture_00"``.
        total (int): number of units.
        unit (str): name of one unit, e.g. ``"scene"``.
        initial (int): units already done before this start (a resumed run); they do not count in the rate.
    """

    def __init__(self, label: str, total: int, unit: str = "step", initial: int = 0) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = self.initial = initial
        self._start = self._printed = time.monotonic()
        self._note = ""
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=initial, desc=label, unit=unit, dynamic_ncols=True, leave=True)

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done += count
        self._note = note or self._note
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
        elif time.monotonic() - self._printed >= _PLAIN_INTERVAL_S:
            self._print()

    def _print(self) -> None:
        self._printed = time.monotonic()
        elapsed = self._printed - self._start
        new = self.done - self.initial
        left = f"ETA {format_duration(elapsed / new * (self.total - self.done))}" if new else "ETA unknown"
        note = f", {self._note}" if self._note else ""
        print(f"{self.label}: {self.done}/{self.total} {self.unit}s, {left}{note}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self.done > self.initial:
            elapsed = format_duration(time.monotonic() - self._start)
            note = f", {self._note}" if self._note else ""
            print(
                f"{self.label}: {self.done}/{self.total} {self.unit}s in {elapsed}{note}", file=sys.stderr, flush=True
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def track(items: Iterable[Item], label: str, total: int, unit: str = "step") -> Iterator[Item]:
    """Iterate over ``items`` with a `Progress` of ``total`` units."""
    with Progress(label, total, unit) as progress:
        for item in items:
            yield item
            progress.advance()
