"""The page says what the numbers say."""

from __future__ import annotations

import json

import pytest
from experiment_results import CHOSEN, write_results

from experiments import page, tables
from experiments.claims import Check, Claim, Comparison, further_claims, paper_claims
from experiments.jobs import RECORD
from experiments.layout import Layout
from experiments.plan import Run, rate_runs
from experiments.rates import Choice, read_choices
from experiments.results import Outcome, RowResult, Stat, compare, load
from experiments.scale import NANO
from subspace3d.files import read_json, write_json

NOISE = (-0.001, 0.0, 0.001)  # of the seeds: standard deviation 0.001


def subspaces_win(run: Run, split: str) -> float:
    """Subspaces are better than all others, more so with growing k; all others are equal."""
    gain = 0.0 if run.row.mined is None else 0.01 + 0.001 * run.row.mined.k
    return 0.08 - gain + NOISE[run.seed] + (0.05 if split == "cross" else 0)


def nothing_differs(run: Run, split: str) -> float:
    return 0.08 + NOISE[run.seed]


def subspaces_lose(run: Run, split: str) -> float:
    return 0.16 - subspaces_win(run, split) + (0.1 if split == "cross" else 0)


def verdicts(claims: list[Claim]) -> dict[str, str]:
    return {f"{claim.source} {claim.text}": claim.verdict for claim in claims}


@pytest.mark.parametrize(
    ("error", "expected"),
    [(subspaces_win, "holds"), (nothing_differs, "not shown"), (subspaces_lose, "does not hold")],
)
def test_verdicts_follow_from_the_numbers(tmp_path, error, expected):
    layout = Layout(tmp_path)
    write_results(layout, NANO, error)
    found = verdicts(paper_claims(load(layout, NANO), NANO, None))
    for claim in (
        "Table 1 printed faces: subspace tuning is better than full tuning, LoRA, PiSSA and AdaLoRA",
        "Table 3 transparent objects: with about as many parameters, subspace tuning is better than LoRA",
        "Table 4 clothed bodies: mined subspaces are better than singular vectors of the weights, same K",
        "Tables 2, 4 clothed bodies: a larger k is better than a small one",
    ):
        assert found[claim] == expected, claim
    # the rows of both ranks have equal numbers, and LoRA does not depend on its rank
    assert (
        found["Table 5 clothed bodies: adapters of rank 16 instead of 4 give subspaces that are about as good"]
        == "holds"
    )
    assert found["Table 2 clothed bodies: PiSSA degrades as its rank grows"] == "not shown"
    (angles,) = (verdict for claim, verdict in found.items() if claim.startswith("Figure 6"))
    assert angles == "not run"


def row(values: list[list[float]], metric: str = "accuracy", is_base: bool = False) -> RowResult:
    """Of values by seed and scene."""
    some_row = None if is_base else rate_runs(NANO, ["tasks"])[0].row
    scenes = {
        seed: {"test": {f"scene_{number}": {metric: value} for number, value in enumerate(each)}}
        for seed, each in enumerate(values)
    }
    return RowResult(some_row, 1e-3, scenes=scenes)


SCENES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.9]


def shifted(*shifts: float) -> list[list[float]]:
    """A seed per shift of all scenes."""
    return [[value + shift for value in SCENES] for shift in shifts]


def test_a_difference_counts_where_all_scenes_and_seeds_agree():
    second = row(shifted(0.0, 0.02))
    outcome = compare(row(shifted(-0.01, 0.0)), second, "test", "accuracy")
    # however far apart the scenes and the seeds are
    assert (outcome.word, outcome.difference) == ("better", pytest.approx(0.015))
    assert (outcome.low, outcome.high) == (pytest.approx(0.015), pytest.approx(0.015))
    assert compare(second, row(shifted(-0.01, 0.0)), "test", "accuracy").word == "worse"
    higher = (row(values, "normal_consistency") for values in (shifted(-0.01, 0.0), shifted(0.0, 0.02)))
    assert compare(*higher, "test", "normal_consistency").word == "worse"
    # one seed the other way round
    assert compare(row(shifted(-0.05, 0.03)), second, "test", "accuracy").word == "level"
    # one scene the other way round
    first = shifted(-0.01, 0.0)
    for seed in first:
        seed[3] += 0.04
    assert compare(row(first), second, "test", "accuracy").word == "level"


def test_rows_are_alike_where_the_interval_is_narrow_not_where_it_is_wide():
    second = row(shifted(0.0, 0.0))  # 0.4 in the mean, so 0.04 is the margin
    near = compare(row(shifted(0.01, 0.03)), second, "test", "accuracy")
    assert near.word == "worse" and near.alike
    far = compare(row([[0.3, 0.0, 0.5, 0.2, 0.7, 0.7]] * 2), second, "test", "accuracy")
    assert far.word == "level" and not far.alike


def test_scenes_that_one_run_lacks_are_in_no_difference():
    first, second = row(shifted(-0.01, -0.01)), row(shifted(0.0, 0.0))
    first.scenes[1]["test"] = {key: value for key, value in first.scenes[1]["test"].items() if key != "scene_5"}
    assert compare(first, second, "test", "accuracy").word == "level"  # five scenes cannot show it
    first.scenes[1]["test"] = {}
    assert compare(first, second, "test", "accuracy").word == "unknown"


def test_one_seed_decides_nothing_and_the_base_stands_beside_every_seed():
    assert compare(row(shifted(0.0)), row(shifted(0.1)), "test", "accuracy").word == "unknown"
    assert compare(row(shifted(0.0, 0.02)), row(shifted(0.1), is_base=True), "test", "accuracy").word == "better"
    assert compare(row(shifted(0.1), is_base=True), row(shifted(0.0, 0.02)), "test", "accuracy").word == "worse"
    assert compare(row(shifted(0.0, 0.02)), row([]), "test", "accuracy").word == "unknown"


@pytest.mark.parametrize(
    ("words", "expected", "verdict"),
    [
        (["better", "level"], "better", "holds"),
        (["worse", "level"], "better", "contradicted"),
        (["better", "worse"], "better", "mixed"),
        (["level", "level"], "better", "open"),
        (["alike", "unknown"], "alike", "holds"),
        (["alike", "level"], "alike", "open"),
        (["alike", "better"], "alike", "contradicted"),
        (["unknown", "unknown"], "better", "unknown"),
    ],
)
def test_verdict_of_a_comparison(words, expected, verdict):
    outcomes = {str(i): Outcome(word, alike=word == "alike") for i, word in enumerate(words)}
    assert Comparison("", outcomes, expected).verdict == verdict


@pytest.mark.parametrize(
    ("holds", "verdict"),
    [([True, True], "holds"), ([True, False], "holds in part"), ([False], "does not hold"), ([], "not run")],
)
def test_verdict_of_a_claim(holds, verdict):
    assert Claim("", "", checks=[Check("", value) for value in holds]).verdict == verdict


def test_the_rate_of_least_validation_error_is_chosen_once_the_grid_is_complete(tmp_path):
    layout = Layout(tmp_path)
    write_results(layout, NANO, nothing_differs, ["psv"], seeds=1)
    (choices,) = read_choices(layout, NANO, ["psv"]).values()
    assert {name: choice.rate for name, choice in choices.items()} == {"psv": CHOSEN, "subspace": CHOSEN}
    assert not choices["psv"].at_edge
    best, *others = sorted(
        (run for run in rate_runs(NANO, ["psv"]) if run.row.family == "psv"), key=lambda run: run.rate != CHOSEN
    )
    record = layout.run(best) / RECORD
    write_json(record, read_json(record) | {"diverged": "loss was not finite"})
    (choices,) = read_choices(layout, NANO, ["psv"]).values()
    assert choices["psv"].errors[CHOSEN] == {0: None} and choices["psv"].rate == 3e-4
    layout.record("bodies", "validation", others[0].name).unlink()
    (choices,) = read_choices(layout, NANO, ["psv"]).values()
    assert choices["psv"].rate is None


def test_all_seeds_decide_between_the_best_rates_of_the_first():
    first = {1e-4: 0.5, 3e-4: 0.30, 1e-3: 0.31, 3e-3: 0.32, 1e-2: None}
    choice = Choice("psv", {rate: {0: error} for rate, error in first.items()}, tuple(first), 3)
    assert choice.finalists == (3e-4, 1e-3, 3e-3) and choice.rate == 3e-4
    for rate, error in ((3e-4, 0.40), (1e-3, 0.30), (3e-3, None)):
        choice.errors[rate][1] = error
    # a rate that was not among the best takes no part, however well it did with another seed
    choice.errors[1e-4][1] = 0.0
    assert choice.rate == 1e-3
    # a seed that not all finalists have decides nothing
    choice.errors[3e-4][2] = 0.0
    assert choice.rate == 1e-3
    del choice.errors[1e-2]
    assert not choice.complete and choice.finalists == () and choice.rate is None


def test_a_part_is_named_as_a_part(tmp_path):
    layout = Layout(tmp_path / "run")
    write_results(layout, NANO, subspaces_win, ["psv"], seeds=1)
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("\n".join(page._README))
    text = page.write(layout, NANO, {"bodies/full_lr0.001_s0": "disk full"}, tmp_path).read_text(encoding="utf-8")
    assert "have not been run" in (tmp_path / "README.md").read_text()
    assert "- printed faces: nothing" in text
    assert "more than one seed" in text
    assert "- bodies/full_lr0.001_s0: disk full" in text
    assert "**holds**" not in text and "**does not hold**" not in text


def test_pages_are_written_into_a_checkout_and_notes_survive(tmp_path):
    layout, checkout = Layout(tmp_path / "run"), tmp_path / "checkout"
    (checkout / "docs").mkdir(parents=True)
    readme = "# Head\n\n<!-- results: written by make experiments -->\nold\n<!-- /results -->\ntail\n"
    (checkout / "README.md").write_text(readme)
    page.write(layout, NANO, {}, checkout)
    results, images = checkout / "docs" / "results.md", checkout / "docs" / "images"
    assert "have not been run" in (checkout / "README.md").read_text()
    assert not list(images.glob("*"))

    marker = "<!-- notes: kept when this page is written again -->\n"
    results.write_text(results.read_text().replace(marker, f"{marker}We looked at k.\n"))
    write_results(layout, NANO, subspaces_win)
    write_json(
        layout.out / "experiments.json",
        {
            "weights": "0123456789abcdef",
            "starts": [{"command": "make", "commit": "c0ffee", "time": "now", "device": "CPU", "torch": "2"}],
        },
    )
    page.write(layout, NANO, {}, checkout)
    text, front = results.read_text(), (checkout / "README.md").read_text()
    assert f"{marker}We looked at k.\n<!-- /notes -->" in text
    assert "c0ffee" in text and "Not run" not in text
    assert front.startswith("# Head\n") and front.endswith("<!-- /results -->\ntail\n") and "\nold\n" not in front
    # subspace k = 8: 0.08 - 0.018; of k = 16 only the page speaks
    assert "**0.0620 ± 0.0010**" in front and "0.0540 ± 0.0010" in text
    assert "–" not in front  # all three tasks have the rows that are shown
    for name in page.FIGURES:
        assert (images / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"(images/{name}.png)" in text
    assert f"docs/images/{next(iter(page.FIGURES))}.png" in front


def test_a_readme_without_its_place_is_an_error():
    with pytest.raises(ValueError, match="results: written by"):
        page.replace_block("# Head\n", page._README, "text")


@pytest.mark.parametrize(
    ("stat", "text"),
    [
        (Stat(0.04123, 0.00072, 3), "0.0412 ± 0.0007"),
        (Stat(12.345, 0.5, 3), "12.3 ± 0.5"),
        (Stat(0.5, None, 1), "0.500"),
        (Stat(0.0, 0.0, 2), "0.00 ± 0.00"),
        (None, "–"),
    ],
)
def test_numbers_have_three_digits(stat, text):
    assert tables.number(stat) == text


def test_subspaces_that_are_not_disentangled_are_said_to_be_so(tmp_path):
    layout = Layout(tmp_path)
    pair = {"attributes": ["texture", "camera"], "mean_smallest": 0.4, "mean_smallest_random": 0.7}
    analysis = json.loads(json.dumps({"disentanglement": {"output": [pair], "random": {}}}))
    found = verdicts(paper_claims(load(layout, NANO), NANO, analysis))
    assert [verdict for claim, verdict in found.items() if claim.startswith("Figure 6")] == ["does not hold"]


def test_adapters_that_any_attribute_explains_as_well_are_said_to_be_so(tmp_path):
    shares = {"texture": {"mean": 0.8}, "camera": {"mean": 0.2}}
    explained = {name: {"subspaces": shares, "held_out": {"mean": 0.3}} for name in shares}
    analysis = {"cross_validation": {"explained": explained}}
    found = verdicts(further_claims(load(Layout(tmp_path), NANO), NANO, None, analysis, None))
    energy = [verdict for claim, verdict in found.items() if claim.startswith("energy")]
    assert energy == ["holds in part", "not run"]  # of adapters with a random start and of those from the gradient
