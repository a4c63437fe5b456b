"""Where the figures of every step go: always metrics.jsonl, on request TensorBoard and Weights & Biases too."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from subspace3d.files import discard, open_to_append, write_text
from subspace3d.reading import parse_json, read_text

Values = Mapping[str, float | int | None]

_METRICS, _EVENTS, _WANDB_RUN = "metrics.jsonl", "tensorboard", "wandb_run.txt"
_LARGEST = 1 << 30  # bytes of metrics.jsonl; a million steps have a quarter of it


class Tracker(Protocol):
    """Takes the figures of one step after the other."""

    def log(self, step: int, values: Values) -> None:
        """``step`` counts from 1; a figure that is not finite is None."""

    def close(self) -> None:
        """Write out what is still in memory."""


class MetricsFile:
    """One JSON object per line and step; lines beyond ``step``, of a run that was cut off, are dropped first."""

    def __init__(self, path: Path, step: int) -> None:
        if path.is_file():
            lines = read_text(path, _LARGEST).splitlines()
            write_text(path, "".join(line + "\n" for line in _lines_until(lines, step)))
        self._file = open_to_append(path)  # closed by close

    def log(self, step: int, values: Values) -> None:
        self._file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Event files in ``folder``; events beyond ``step`` are hidden."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def log(self, step: int, values: Values) -> None:
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(f"train/{name}", value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of wandb; a continued training run goes on in it, steps it already has are left as they are."""

    def __init__(self, out: Path, label: str, settings: Mapping[str, Any]) -> None:
        import wandb

        path = out / _WANDB_RUN
        if not path.is_file():
            write_text(path, uuid.uuid4().hex[:12])
        self._run = wandb.init(
            dir=str(out), id=read_text(path, _LARGEST), resume="allow", name=label, config=dict(settings)
        )

    def log(self, step: int, values: Values) -> None:
        self._run.log({name: value for name, value in values.items() if value is not None}, step=step)

    def close(self) -> None:
        self._run.finish()


def open_trackers(names: Iterable[str], out: Path, step: int, label: str, settings: Mapping[str, Any]) -> list[Tracker]:
    """metrics.jsonl in ``out`` and the trackers called ``names``, for a run that has done ``step`` steps.

    Raises:
        ModuleNotFoundError: a tracker's package is not installed.
    """
    trackers: list[Tracker] = [MetricsFile(out / _METRICS, step)]
    if "tensorboard" in names:
        trackers.append(TensorBoard(out / _EVENTS, step))
    if "wandb" in names:
        trackers.append(WeightsAndBiases(out, label, settings))
    return trackers


def remove_records(out: Path) -> None:
    """Delete what the trackers of an earlier run wrote in ``out``; a run of wandb stays, and a new one is begun.

    Raises:
        ValueError: there are other files among the event files; nothing has been deleted.
    """
    events = out / _EVENTS
    foreign = [path for path in events.glob("*") if not path.name.startswith("events.out.tfevents.")]
    if foreign:
        raise ValueError(f"out: {events} must hold nothing but event files to start over in it, got {foreign[0]}")
    (out / _METRICS).unlink(missing_ok=True)
    (out / _WANDB_RUN).unlink(missing_ok=True)
    if events.is_dir():
        discard(events)


def _lines_until(lines: Iterable[str], step: int) -> Iterator[str]:
    for line in lines:
        # a run killed while writing leaves half a line
        with contextlib.suppress(ValueError):
            record = parse_json(line, _METRICS)
            number = record.get("step") if isinstance(record, dict) else None
            if isinstance(number, int) and number <= step:
                yield line
