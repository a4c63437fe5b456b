"""The section of the report about the fit of the basis to the scenes of the task."""

from __future__ import annotations

from subspace3d.reporting.collect import Document
from subspace3d.reporting.html import Html, element, plot, section, table

_ROWS = {
    "basis": "the basis",
    "psv": "singular vectors of the weights",
    "random": "random directions",
    "gradient": "this gradient's own leading directions",
}


def fit(document: Document | None) -> Html:
    title = "Does the basis suit the task?"
    if document is None:
        return section("fit", title, element("p", "There is no fit.json: run subspace3d fit.", class_="missing"))
    from subspace3d.reporting.fit_figure import fit_png

    record = document.value
    shares = record["shares"]
    rows = [[label, *(_percent(shares[name][side]) for side in ("core", "U", "V"))] for name, label in _ROWS.items()]
    return section(
        "fit",
        title,
        element("p", record["sentence"]),
        plot(
            fit_png(record),
            "Share of the gradient's energy by the number of directions, by side, and by block.",
            "Share of the energy of the loss's gradient on the task's scenes that directions hold before anything is "
            "trained. Those of the gradient itself come from one half of the batches; all are measured on the other "
            "half.",
        ),
        table(
            [f"directions, K = {record['K']}", "both sides", "output side alone", "input side alone"],
            rows,
            "Share of the gradient's energy.",
        ),
    )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2g} %"
