"""Layout of analysis.json; docs/formats.md has every field."""

from __future__ import annotations

from collections.abc import Set
from typing import Annotated, Any, Literal, NotRequired

from typing_extensions import TypedDict

from subspace3d.schema import NOT_EMPTY, Count, Positive, PositiveInt, Rule

FORMAT = "subspace3d-analysis"
VERSION = 4

_Share = Annotated[float, Rule("a number of -0.001 to 1.001", lambda value: -1e-3 <= value <= 1 + 1e-3)]
_Names = Annotated[list[str], NOT_EMPTY]


class _Module(TypedDict):
    out: PositiveInt
    family: str
    layer: int | None
    kind: str


class _Largest(TypedDict):
    at: PositiveInt
    ratio: Positive


class _Spectrum(TypedDict):
    rank: PositiveInt | None
    k: PositiveInt
    singular_values: list[float]
    drops: list[PositiveInt]
    ratio_at_rank: Positive | None
    largest_ratio_beyond: _Largest | None
    behaviour: str | None


class _Row(TypedDict):
    eigenvalues: list[_Share]
    random: str


class _Pair(TypedDict):
    attributes: Annotated[list[str], Rule("two names", lambda value: len(value) == 2)]
    mean_smallest: _Share | None
    mean_smallest_random: _Share | None
    modules: dict[str, _Row]


class _Level(TypedDict):
    mean: list[_Share]
    low: list[_Share]
    high: list[_Share]


class _Disentanglement(TypedDict):
    output: list[_Pair]
    input: list[_Pair]
    random: dict[str, _Level]


class _Interference(TypedDict):
    attributes: Annotated[list[str], Rule("two names", lambda value: len(value) == 2)]
    mean: float | None
    mean_random: float | None
    modules: dict[str, float | None]


class _Weights(TypedDict):
    adapters: _Names
    mean: list[float]
    below_half: list[float]
    down_weighted: list[str]
    most_down_weighted: str | None
    modules: dict[str, Annotated[list[float], NOT_EMPTY]]


class AnalysisRecord(TypedDict):
    """analysis.json."""

    format: Literal["subspace3d-analysis"]
    version: int
    base_model: NotRequired[str | None]
    attributes: _Names
    modules: Annotated[dict[str, _Module], NOT_EMPTY]
    models: dict[str, Literal["mean", "shared"]]
    spectra: dict[str, dict[str, _Spectrum]]
    behaviours: dict[str, dict[str, Count]]
    disentanglement: _Disentanglement
    interference: list[_Interference]
    weights: dict[str, _Weights]
    cross_validation: dict[str, Any] | None
    inputs: NotRequired[dict[str, str]]


def check_together(record: AnalysisRecord, what: object) -> None:
    """Raise ValueError unless every part is about the same attributes and modules."""
    attributes, modules = set(record["attributes"]), record["modules"].keys()
    parts: dict[str, Set[str]] = {name: record[name].keys() for name in ("models", "spectra", "behaviours", "weights")}
    for name, keys in parts.items():
        if keys != attributes:
            raise ValueError(f"{what}: {name} must have an entry for each of attributes")
    tables: dict[str, Set[str]] = {f"spectra.{name}": record["spectra"][name].keys() for name in attributes}
    tables |= {f"weights.{name}.modules": record["weights"][name]["modules"].keys() for name in attributes}
    for side in ("output", "input"):
        pairs: list[_Pair] = record["disentanglement"][side]
        for index, pair in enumerate(pairs):
            if not set(pair["attributes"]) <= attributes:
                raise ValueError(f"{what}: disentanglement.{side}[{index}].attributes must be among attributes")
            tables[f"disentanglement.{side}[{index}].modules"] = pair["modules"].keys()
            unknown = {row["random"] for row in pair["modules"].values()} - record["disentanglement"]["random"].keys()
            if unknown:
                raise ValueError(f"{what}: disentanglement.random must have {min(unknown):.80}")
    for index, scores in enumerate(record["interference"]):
        if not set(scores["attributes"]) <= attributes:
            raise ValueError(f"{what}: interference[{index}].attributes must be among attributes")
        tables[f"interference[{index}].modules"] = scores["modules"].keys()
    for name, keys in tables.items():
        if keys != modules:
            raise ValueError(f"{what}: {name} must have an entry for each of modules")
    for name in attributes:
        weights = record["weights"][name]
        count = len(weights["adapters"])
        if any(len(row) != count for row in (weights["mean"], weights["below_half"], *weights["modules"].values())):
            raise ValueError(f"{what}: weights.{name} must have {count} numbers a row, one for each adapter")
