"""The sections of the report about the mined subspaces: spectra, strength by layer, disentanglement, weights."""

from __future__ import annotations

from typing import TypeGuard

from subspace3d.files import stays_inside
from subspace3d.reading import read_bytes
from subspace3d.reporting.collect import Document
from subspace3d.reporting.html import Html, details, element, plot, section, table

_LARGEST_FIGURE = 1 << 26


def _missing(anchor: str, title: str, what: str) -> Html:
    return section(anchor, title, element("p", what, class_="missing"))


def _no_analysis(anchor: str, title: str) -> Html:
    return _missing(
        anchor, title, "There is no analysis.json of this version: run subspace3d analyze on the subspaces of this run."
    )


def _readable(analysis: Document | None) -> TypeGuard[Document]:
    """Whether there is an analysis, and one of the version that the sections show."""
    from subspace3d.mining.analyze import VERSION

    return analysis is not None and analysis.value.get("version") == VERSION


def _figure(analysis: Document, name: str, alt: str, caption: str) -> Html:
    """The PNG beside analysis.json; drawn anew when it is gone, because the JSON holds all of it. Nothing if it cannot
    be drawn from this analysis.
    """
    from subspace3d.reporting import analysis_figures
    from subspace3d.reporting.figures import to_png

    path = analysis.path.with_name(f"{name}.png")
    # of a link that leads out of the folder nothing is shown
    if path.is_file() and stays_inside(path.parent, path):
        image = read_bytes(path, _LARGEST_FIGURE)
    else:
        figure = analysis_figures.DRAWERS[name](analysis.value)
        if figure is None:
            return Html("")
        image = to_png(figure)
    return plot(image, alt, caption)


def spectra(analysis: Document | None) -> Html:
    title = "Do the adapters of an attribute share a subspace?"
    if not _readable(analysis):
        return _no_analysis("spectra", title)
    shared = "shared" in analysis.value["models"].values()
    caption = (
        "Over the largest one, each attribute's singular values. Model mean: of the weighted mean of the adapters; a "
        "drop right after the adapters' rank r says that they share one subspace of that size. Model shared: of the "
        "adapters between the k input directions found, stacked, whose output directions are these; what falls off "
        "slowly after k, k directions leave out."
        if shared
        else "Singular values of the weighted mean of the adapters, over the largest one. A drop right after the "
        "adapters' rank r says that they share one subspace of that size."
    )
    return section(
        "spectra",
        title,
        *_explained(analysis),
        _figure(
            analysis,
            "spectra",
            "Normalised singular values, one panel per attribute and kind of module, one line per module coloured by "
            "layer.",
            caption,
        ),
        *_behaviours(analysis),
    )


def _behaviours(analysis: Document) -> list[Html]:
    """Where the spectra drop, which says what is shared of the model mean alone."""
    counts: dict[str, dict[str, int]] = {
        attribute: counts
        for attribute, counts in analysis.value["behaviours"].items()
        if analysis.value["models"][attribute] == "mean"
    }
    if not counts:
        return []
    names = list(next(iter(counts.values())))
    return [
        _figure(
            analysis,
            "behaviours",
            "Every module coloured by where its spectrum drops, one panel per attribute, layers from left to right.",
            "Where in the network the spectra drop: at the adapters' rank r only (one shared subspace), at r and "
            "again later, later than r only (a shared subspace larger than one adapter), or nowhere.",
        ),
        table(
            ["drop of the spectrum", *names],
            [[attribute, *(str(row[name]) for name in names)] for attribute, row in counts.items()],
            "Modules by where the spectrum drops, counted at and beyond the rank: a step of at least 1.5 times, and "
            "three times the usual step around it.",
        ),
    ]


def largest(analysis: Document | None) -> Html:
    title = "Where are the updates strong?"
    if not _readable(analysis):
        return _no_analysis("largest", title)
    figure = _figure(
        analysis,
        "largest",
        "Largest singular value of the weighted mean update over the layers, one panel per kind of module, one colour "
        "per attribute.",
        "Largest singular value by layer: of the weighted mean of the adapters or, model shared, of all of them.",
    )
    return section("largest", title, figure)


def disentanglement(analysis: Document | None) -> Html:
    title = "Are the attributes disentangled?"
    if not _readable(analysis):
        return _no_analysis("disentanglement", title)
    result = analysis.value["disentanglement"]
    if not result["output"]:
        return _missing("disentanglement", title, "This run has one attribute only, so there is nothing to compare.")
    rows = [
        [
            " / ".join(out["attributes"]),
            _level(out["mean_smallest"]),
            _level(out["mean_smallest_random"]),
            _level(into["mean_smallest"]),
            _level(into["mean_smallest_random"]),
        ]
        for out, into in zip(result["output"], result["input"])
    ]
    return section(
        "disentanglement",
        title,
        _figure(
            analysis,
            "disentanglement",
            "Eigenvalues 1 - cos(theta) between the subspaces of every pair of attributes, output and input side, with "
            "the range of random subspaces.",
            "Eigenvalues 1 − cos θ over the principal angles θ between two attributes: 1 is orthogonal, 0 a shared "
            "direction. Left: the smallest one of every module (points), their mean (bar) and the mean expected of "
            "random subspaces of the same sizes (grey bar). Others: all eigenvalues of single modules, and the 5 to "
            "95 % range of random subspaces.",
        ),
        _figure(
            analysis,
            "disentanglement_layers",
            "Smallest eigenvalue of every pair of attributes over the layers, by side, kind of module and frame or "
            "global blocks, with the range of random subspaces.",
            "Smallest eigenvalue of every pair, layer by layer; grey: 5 to 95 % of random subspaces of the same sizes.",
        ),
        table(
            ["attributes", "output side", "random", "input side", "random"],
            rows,
            "Smallest eigenvalue, mean over modules.",
        ),
    )


def _level(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def weights(analysis: Document | None) -> Html:
    title = "Which adapters were trusted?"
    if not _readable(analysis):
        return _no_analysis("weights", title)
    rows = []
    for attribute, entry in analysis.value["weights"].items():
        for name, mean, low in zip(entry["adapters"], entry["mean"], entry["below_half"]):
            note = "down-weighted" if name in entry["down_weighted"] else ""
            rows.append([attribute, name, f"{mean:.2f}", f"{100 * low:.0f} %", note])
    return section(
        "weights",
        title,
        _figure(
            analysis,
            "weights",
            "Weight of each adapter over the mean weight of its attribute, one point per module.",
            "Weight of each adapter in the mean, over the mean weight: a point per module, a bar at their mean. An "
            "adapter that does not fit what the others share gets less than 1.",
        ),
        details(
            "All weights",
            table(["attribute", "adapter", "mean relative weight", "modules below half of the mean", ""], rows),
        ),
        *_stability(analysis),
    )


def _explained(analysis: Document) -> list[Html]:
    """What the others of an attribute share holds of an adapter that was left out: the plainest answer there is."""
    from subspace3d.mining.cross_validation import own_and_nearest

    validation = analysis.value["cross_validation"]
    if not validation:
        return []
    rows = []
    for attribute, explained in validation["explained"].items():
        held_out, nearest = own_and_nearest(explained, attribute)
        shares = [
            explained["subspaces"][attribute]["mean"],
            held_out,
            nearest and nearest[1],
            explained["random"]["mean"],
        ]
        rows.append([attribute] + ["–" if share is None else f"{100 * share:.1f} %" for share in shares])
    return [
        _figure(
            analysis,
            "explained",
            "Share of the energy of each adapter inside the subspaces of its own and of the other attributes.",
            "Energy of the adapters inside the subspaces. Held out: the subspace was mined from the other adapters of "
            "the attribute. Random: what subspaces of the same sizes hold by chance.",
        ),
        table(
            ["attribute", "own", "own, held out", "best of others", "random"],
            rows,
            "Energy of an adapter inside a subspace, mean over adapters.",
        ),
    ]


def _stability(analysis: Document) -> list[Html]:
    validation = analysis.value["cross_validation"]
    if not validation:
        return []
    rows = []
    for attribute, stability in validation["stability"].items():
        sides = stability or {"output": {"mean": None}, "input": {"mean": None}}
        rows.append([attribute] + [_level(sides[side]["mean"]) for side in ("output", "input")])
    return [
        _figure(
            analysis,
            "stability",
            "Overlap between the subspace of all adapters and those mined without one of them, over the layers.",
            "Overlap (mean cos² of the principal angles) between the subspace of all adapters and the one mined "
            "without one of them; line: mean, shade: least to largest over the adapter left out.",
        ),
        table(
            ["attribute", "overlap, output", "overlap, input"],
            rows,
            "Overlap with the subspace mined without one adapter, mean over adapters and modules.",
        ),
    ]
