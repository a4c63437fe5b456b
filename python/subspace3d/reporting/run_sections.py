"""The sections of the report about the run itself: what was run, and where every number comes from."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import PurePath
from typing import Any

from subspace3d import __version__
from subspace3d.evaluation.table import is_comparable
from subspace3d.progress import format_duration
from subspace3d.reporting.collect import RunContent
from subspace3d.reporting.html import Html, definitions, details, element, join, number, section, table

_SETTINGS = (
    ("method", "method"), ("rank", "rank r"), ("K", "K"), ("lr", "learning rate"),
    ("head_lr", "learning rate of LoRA on the heads"), ("steps", "steps"),
    ("images_per_step", "images per step"), ("frames", "frames"), ("precision", "precision"), ("seed", "seed"),
)  # fmt: skip
_KINDS = {"extrinsics": "camera poses"}
_FINGERPRINT = 12  # hex digits shown of a sha256


def summary(content: RunContent) -> Html:
    """What was run, in a few lines."""
    items: list[tuple[str, str]] = []
    if content.tuned or content.results is not None:
        items.append(("Backbone", ", ".join(backbones(content)) or "not recorded"))
        items += _about_backbone(content)
    if content.results is not None:
        measured = content.results.value
        protocol, scenes = measured.get("protocol", {}), len(measured["scenes"])
        size = f", {protocol['image_size']} px" if "image_size" in protocol else ""
        items.append(("Methods", ", ".join(measured["methods"])))
        found = [
            part["frames"] for method in measured["methods"].values() for part in _details(method) if "frames" in part
        ]
        frames = f", up to {max(found)} frames each" if found else ""
        items.append(("Test scenes", f"{scenes}{frames}{size}"))
        items += _least_error(measured)
    if content.analysis is not None:
        attributes, modules = content.analysis.value["attributes"], len(content.analysis.value["modules"])
        items.append(("Subspaces", f"{', '.join(attributes)}, in {modules} modules"))
    if content.comparison is not None:
        models = content.comparison.value["base_models"]
        items.append(("Compared", f"A: {models['A'] or 'not recorded'}; B: {models['B'] or 'not recorded'}"))
    seconds = sum((record.get("training") or {}).get("seconds", 0) for record in content.tuned.values())
    if seconds:
        items.append(("Fine-tuning", f"{len(content.tuned)} runs, {format_duration(seconds)} in all"))
    machines = _unique(_environment(record).get("device") for record in content.tuned.values())
    if machines:
        items.append(("Tuned on", ", ".join(machines)))
    notes = [
        f"{other.relative_to(content.run)} is not shown: this page is about {document.path.relative_to(content.run)}, "
        "the nearest of that name"
        for document in (content.results, content.analysis, content.fit, content.comparison)
        if document is not None
        for other in document.others
    ]
    if any("nano" in name for name in backbones(content)):
        notes.append(
            "This run used vggt-nano, a VGGT small enough for a laptop. Its numbers compare methods under equal "
            "conditions at that scale; they are not the paper's, and they do not say which method wins on VGGT-1B."
        )
    return section("run", "What was run", definitions(items), *(element("p", note, class_="note") for note in notes))


def _details(method: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    return method.get("details", {}).values()


def few(content: RunContent) -> Html | None:
    """What runs on a few images gained, and what they forgot; None where there is no such run."""
    runs = {name: record["few"] for name, record in content.tuned.items() if record.get("few")}
    if not runs:
        return None
    places = {"images": "given images", "held_out": "held-out views", "generic": "generic scenes"}
    rows = []
    for name, found in runs.items():
        row = [name, str(found["images"]), {"views": "the other views"}.get(found["teacher"], found["teacher"])]
        for kind in ("loss", "abs_rel"):
            for place in places:
                before, after = (found[when].get(f"{kind}_{place}") for when in ("before", "after"))
                row.append("" if before is None else f"{number(before)} → {number(after)}")
        rows.append([*row, f"{found['best_step']} of {found['steps']}"])
    header = ["run", "images", "taught by"]
    header += [f"{kind}, {words}" for kind in ("loss", "AbsRel") for words in places.values()]
    note = (
        "Before → after. Held-out views are of the same scenes and were not trained on; generic scenes are of another "
        "kind, and what rises there was forgotten. The weights kept are those of the step with the least held-out loss."
    )
    return section(
        "few", "A few images", table([*header, "step kept"], rows, label="few"), element("p", note, class_="note")
    )


def _least_error(measured: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The method with the least depth error, beside the base; nothing where the methods' means are of other scenes."""
    if not is_comparable(measured["methods"].values(), "abs_rel"):
        return []
    errors = {name: method["mean"].get("abs_rel") for name, method in measured["methods"].items()}
    known = {name: value for name, value in errors.items() if value is not None}
    if not known:
        return []
    best = min(known, key=lambda name: known[name])
    text = f"{best}, {number(known[best])}"
    if best != "base" and "base" in known:
        text += f" (base {number(known['base'])})"
    return [("Least AbsRel", text)]


def backbones(content: RunContent) -> list[str]:
    records = list(content.tuned.values())
    if content.results is not None:
        records += content.results.value["methods"].values()
    return _unique(_backbone(record).get("name") for record in records)


def _about_backbone(content: RunContent) -> list[tuple[str, str]]:
    """Which weights, their licence, and what the model does not predict itself."""
    records = [_backbone(record) for record in content.tuned.values()]
    if content.results is not None:
        records.append(_backbone(content.results.value))
    items = [("Weights", "; ".join(_unique(map(_source, records))))]
    items += [("Licence of the weights", ", ".join(_unique(record.get("licence") for record in records)))]
    lacks = [
        f"{_KINDS.get(what, what)}: {how}" for record in records for what, how in (record.get("lacks") or {}).items()
    ]
    items.append(("Not predicted by the model", "; ".join(_unique(lacks))))
    return [(name, text) for name, text in items if text]


def _source(backbone: Mapping[str, Any]) -> str | None:
    """Where the weights are from; the name of a file alone, as the page may be passed on."""
    from subspace3d.backbones.record import RANDOM, SHIPPED

    source, digest = backbone.get("weights"), str(backbone.get("sha256") or "")
    if source is None:
        return None
    if source == RANDOM:
        return f"random, seed {backbone.get('seed', 0)}: the numbers say nothing of a trained model"
    place = "shipped with the package" if source == SHIPPED else PurePath(str(source)).name
    return f"{place} ({digest[:_FINGERPRINT]})" if digest else place


def _backbone(record: Mapping[str, Any]) -> Mapping[str, Any]:
    backbone = record.get("backbone") or {}
    return backbone if isinstance(backbone, dict) else {"name": str(backbone)}


def _environment(record: Mapping[str, Any]) -> Mapping[str, Any]:
    return record.get("environment") or {}


def _unique(values: Iterable[Any]) -> list[str]:
    return sorted({str(value) for value in values if value is not None})


def provenance(content: RunContent) -> Html:
    """Versions, machines, seeds, settings and hashes."""
    newest = max(
        (item.path.stat().st_mtime for item in (content.results, content.analysis) if item is not None),
        default=None,
    )
    date = "not recorded" if newest is None else f"{datetime.datetime.fromtimestamp(newest):%Y-%m-%d %H:%M}"
    records = list(content.tuned.values())
    environments = [_environment(record) for record in records]
    items = [
        ("Run folder", str(content.run)),
        ("Results written", date),
        ("Last tuned", max(_unique(item.get("finished") for item in environments), default="not recorded")),
        ("Tuned on", _listed(item.get("device") for item in environments)),
        ("Tuned with", _listed(_versions(item) for item in environments)),
        ("Page written with", f"subspace3d {__version__} and PyTorch {version('torch')}"),
        ("Training seed", _listed((record.get("settings") or {}).get("seed") for record in records)),
        ("Weights", _listed(_weights(record) for record in records)),
    ]
    if content.settings is None:
        settings = element("p", "The run folder has no config.yaml, so its settings are not known.", class_="missing")
    else:
        settings = details("Settings (config.yaml)", element("pre", content.settings, tabindex="0"))
    return section("provenance", "Provenance", definitions(items), _settings_table(content), settings, _hashes(content))


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(_unique(values)) or "not recorded"


def _versions(environment: Mapping[str, Any]) -> str | None:
    labels = {"subspace3d": "subspace3d", "torch": "PyTorch"}
    return " and ".join(f"{label} {environment[key]}" for key, label in labels.items() if key in environment) or None


def _weights(record: Mapping[str, Any]) -> str | None:
    backbone = _backbone(record)
    if "name" not in backbone:
        return None
    digest = f", sha256 {backbone['sha256'][:_FINGERPRINT]}…" if backbone.get("sha256") else ""
    return f"{backbone['name']} {backbone.get('weights') or ''}".strip() + digest


def _settings_table(content: RunContent) -> Html | None:
    """The settings in which the runs may differ, one row per run."""
    rows = {name: record.get("settings") or {} for name, record in content.tuned.items()}
    shown = [(key, label) for key, label in _SETTINGS if any(key in settings for settings in rows.values())]
    if not shown:
        return None
    body = [[name, *(_setting(settings.get(key)) for key, _ in shown)] for name, settings in rows.items()]
    header = ["run", *(label for _, label in shown)]
    return join([element("h3", "Fine-tuning runs"), table(header, body, label="settings")])


def _setting(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return " to ".join(map(str, value)) if len(value) == 2 else ", ".join(map(str, value))
    return str(value)


def _hashes(content: RunContent) -> Html | None:
    rows = []
    if content.analysis is not None:
        rows += [[f"subspace {name}", digest] for name, digest in content.analysis.value.get("inputs", {}).items()]
    for name, record in content.tuned.items():
        rows += [[f"{name}: {file}", digest] for file, digest in (record.get("files") or {}).items()]
    if not rows:
        return None
    cells = [[name, element("code", str(digest))] for name, digest in rows]
    return details("Files this page rests on (sha256)", table(["file", "sha256"], cells, label="hashes"))


def reading() -> Html:
    """What the numbers mean and what they do not."""
    texts = (
        "Acc is the mean distance from predicted to true points and Comp the mean distance back, in scene units, after "
        "a similarity alignment and ICP; NC is the mean agreement of normals, 1 at best. AbsRel is the mean relative "
        "depth error after one scale per scene; raw columns are without any alignment. Rotation and translation errors "
        "are angles between relative camera poses.",
        "A mean over few scenes moves by chance. Before believing a difference, look at the scenes one by one, and at "
        "how many of them improved.",
        "An eigenvalue of 1 says that two attributes change a module in orthogonal directions, 0 that they share one. "
        "In few dimensions random subspaces are not orthogonal either, so the random level beside it is the measure.",
    )
    return section("reading", "How to read this", *(element("p", text) for text in texts))
