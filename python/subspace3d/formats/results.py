"""Layout of results.json, of the records per method beside it, and of what is kept of a scene to be shown."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from typing_extensions import TypedDict

from subspace3d.schema import NOT_NEGATIVE, Count, Positive, Rule

FORMAT = "subspace3d-results"
_Metrics = dict[str, float | None]
_Time = Annotated[float, NOT_NEGATIVE]


class _Skipped(TypedDict):
    scene: str
    reason: str


class _Training(TypedDict):
    steps: NotRequired[Count | None]
    seconds: NotRequired[_Time | None]
    peak_memory_bytes: NotRequired[Count | None]


class _Details(TypedDict):
    frames: NotRequired[Count]
    inference_seconds: NotRequired[_Time | None]


class _ProtocolValues(TypedDict):
    mean: _Metrics
    per_scene: dict[str, _Metrics]
    reasons: NotRequired[dict[str, dict[str, str]]]


class MethodRecord(TypedDict):
    """What one method measured."""

    mean: _Metrics
    per_scene: dict[str, _Metrics]
    failed: dict[str, str]
    details: NotRequired[dict[str, _Details]]
    reasons: NotRequired[dict[str, dict[str, str]]]
    protocols: NotRequired[dict[str, _ProtocolValues]]
    trainable_parameters: NotRequired[Count | None]
    trainable: NotRequired[dict[str, Count] | None]
    training: NotRequired[_Training | None]
    backbone: NotRequired[dict[str, Any] | None]


class _Picture(TypedDict):
    scene: str
    true: str
    prediction: str


class KeptRecord(MethodRecord):
    """``methods/<name>.json`` of an evaluation, from which an interrupted one goes on."""

    key: dict[str, Any]
    skipped: list[_Skipped]
    pictures: list[_Picture]
    files: NotRequired[dict[str, str]]


class _KeptProtocol(TypedDict):
    per_scene: dict[str, _Metrics]
    reasons: dict[str, dict[str, str]]


class KeptScene(TypedDict):
    """``methods/<name>.parts/<number>.json``: the same of one scene, until all are measured."""

    key: dict[str, Any]
    per_scene: dict[str, _Metrics]
    reasons: dict[str, dict[str, str]]
    details: dict[str, _Details]
    failed: dict[str, str]
    skipped: list[_Skipped]
    pictures: list[_Picture]
    protocols: dict[str, _KeptProtocol]
    files: NotRequired[dict[str, str]]
    seconds: _Time


class _Shown(TypedDict):
    scene: str
    true: NotRequired[Any]
    methods: dict[str, Any]


class _Metric(TypedDict):
    label: str
    lower_is_better: bool
    unit: str
    main: bool
    alignment: NotRequired[str]


class _Quantity(TypedDict):
    label: str
    lower_is_better: bool


class _Protocol(TypedDict):
    metrics: dict[str, _Quantity]


class ResultsRecord(TypedDict):
    """results.json; docs/evaluation.md has every field."""

    format: Literal["subspace3d-results"]
    version: Literal[1]
    scenes: list[str]
    units: NotRequired[dict[str, str]]
    skipped: NotRequired[list[_Skipped]]
    protocol: NotRequired[dict[str, Any]]
    protocols: NotRequired[dict[str, _Protocol]]
    backbone: NotRequired[dict[str, Any]]
    metrics: dict[str, _Metric]
    methods: Annotated[dict[str, MethodRecord], Rule("an object of at least one method", lambda value: len(value) > 0)]
    pictures: NotRequired[list[_Shown]]


_Row = Annotated[list[float], Rule("a list of three numbers", lambda value: len(value) == 3)]


class Alignment(TypedDict):
    """A Sim(3)."""

    scale: Positive
    rotation: Annotated[list[_Row], Rule("a 3x3 matrix", lambda value: len(value) == 3)]
    translation: _Row


class ViewsHeader(TypedDict):
    """Header of the tensors that are kept of a scene; see `evaluation.pictures`."""

    format: Literal["subspace3d-views"]
    version: int
    frames: list[Count]
    translation_known: bool
    depth_scale: Positive
    alignment: Alignment | None


class MetricsLine(TypedDict):
    """A line of metrics.jsonl that a report draws."""

    step: Count
    loss: NotRequired[float | None]
