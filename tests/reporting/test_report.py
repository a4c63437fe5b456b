"""The report of a run folder: everything on one page, nothing taken from strings, gaps named."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from reporting.synthetic_run import METHODS

from subspace3d.commands import report
from subspace3d.commands.report import ReportConfig
from subspace3d.evaluation import pictures
from subspace3d.reporting import depth_section, result_figures, space_section
from subspace3d.reporting.analysis_figures import DRAWERS
from subspace3d.reporting.collect import collect
from subspace3d.reporting.figures import to_png
from subspace3d.reporting.html import Html, data_block, element, table


class _Page(HTMLParser):
    """Checks that tags are balanced and collects what the tests ask for."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.images, self.rows, self.urls = [], [], [], [], []
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append(tag)
        self.urls += [attributes[name] for name in ("src", "href") if name in attributes]
        if tag == "img":
            self.images.append(attributes)
        if tag == "tr":
            self.rows.append([])
        if tag not in ("img", "input", "meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "tr" in self.open:
            self.rows[-1].append(data)


@pytest.fixture(scope="module")
def text(run_folder):
    return report.run(ReportConfig(run_folder)).read_text(encoding="utf-8")


def test_the_page_is_whole_and_needs_nothing_else(run_folder, text):
    page = _Page(text)
    assert (run_folder / "report" / "index.html").is_file()
    assert all(url.startswith(("data:", "#")) for url in page.urls)
    # what is said in words or data may hold an address, what the page itself is made of may not
    assert not re.search(r"https?:|//\w+\.|@import|url\(", re.sub(r'src="data:[^"]*"', "", text))
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', text)[1]
    assert policy.startswith("default-src &#x27;none&#x27;; img-src data:;")
    assert "unsafe" not in policy
    anchors = set(re.findall(r'<section id="([^"]+)"', text))
    assert {url[1:] for url in page.urls if url.startswith("#")} == anchors


def test_table_has_all_methods_best_values_and_costs(text):
    rows = {row[0]: row for row in _Page(text).rows if row and row[0] in METHODS}
    assert rows.keys() == METHODS.keys()
    main = text[text.index('id="results"') : text.index("All other metrics")]
    assert main.count("<strong>") == 8
    best = main[main.index('<th scope="row">subspace</th>') :]
    assert best[: best.index("</tr>")].count("<strong>") == 8
    for shown in ("61,440", "↓", "↑", "subspace in 3 of 3 scenes", "lora failed on scene&lt;9&gt;"):
        assert shown in main
    costs = text[text.index('id="costs"') : text.index('id="space"')]
    for shown in ("61,440", "0.626 %", "1:11", f"{71.4 / 120:.2f}", "1.50 GiB", "0.25"):
        assert shown in costs


def test_pictures_and_figures_are_inside_with_alt_texts(text):
    images = _Page(text).images
    assert all(image["src"].startswith("data:image/png;base64,") for image in images)
    # the figures of the analysis, 3 of the results, the training curves; of 2 frames of 3 scenes image, truth, and
    # depth and error of each method; 4 samples of colour, whose meaning is said beside them
    assert sum(bool(image["alt"]) for image in images) == len(DRAWERS) + 4 + 2 * 3 * (2 + 2 * len(METHODS))
    assert sum(not image["alt"] for image in images) == 4


def test_points_in_space_are_those_of_the_files(run_folder, text):
    data = json.loads(re.search(r'<script type="application/json" id="space-data">(.*?)</script>', text)[1])
    assert data["names"] == ["truth", *METHODS]
    assert [scene["name"] for scene in data["scenes"]] == ["scene<b>&0", "scene_0001", "scene_0002"]
    scene = data["scenes"][1]
    true = pictures.load(run_folder / "evaluation" / "pictures" / "scene_0001" / "true.safetensors")
    valid = true.views.depths > 0
    # 5 layers, of which 4 have confidences, stay below the bound, so every pixel with depth is there
    assert scene["points"] == valid.sum()
    blob = base64.b64decode(scene["data"])
    assert len(blob) == scene["points"] * (4 + 3 + 5 * 2 + 4)
    pixels = np.frombuffer(blob, "<u4", scene["points"])
    assert np.array_equal(pixels, np.flatnonzero(valid))
    codes = np.frombuffer(blob, "<u2", scene["points"], offset=7 * scene["points"]).astype(np.float64)
    layer = scene["layers"][0]
    depths = layer["low"] * (layer["high"] / layer["low"]) ** ((codes - 1) / 65534)
    step = np.log(layer["high"] / layer["low"]) / 65534
    np.testing.assert_allclose(depths, true.views.depths[valid], rtol=0.51 * step)


def test_the_bytes_of_all_points_are_bounded():
    for scenes, layers in ((1, 2), (4, 5), (40, 12)):
        points = space_section._points_per_scene(scenes, layers)
        assert 0 < points <= space_section.MOST_POINTS
        assert scenes * points * (7 + 3 * layers) <= space_section.MOST_BYTES


def test_colours_of_depth_tell_nearer_farther_and_nothing_apart():
    values = np.array([[0.0, 1.0, 1.5, 2.0, 3.0, 1.5]])
    valid = np.array([[True, True, True, True, True, False]])
    drawn = Image.open(io.BytesIO(depth_section.paint(values, 1.0, 2.0, "turbo_r", valid))).convert("RGBA")
    pixels = np.array(drawn)[0]
    assert pixels[:, 3].tolist() == [255, 255, 255, 255, 255, 0]
    assert tuple(pixels[0, :3]) == depth_section.NEARER
    assert tuple(pixels[4, :3]) == depth_section.FARTHER
    near, middle, far = pixels[1:4, :3].astype(int)
    assert near[0] > near[2]  # red
    assert far[2] > far[0]  # blue
    assert middle[1] > 200  # green


def test_the_cut_out_is_a_square_around_what_has_depth():
    valid = np.zeros((40, 60), bool)
    valid[2:7, 50:58] = True
    rows, columns = depth_section.cut_out(valid)
    assert rows.stop - rows.start == columns.stop - columns.start == 20
    assert valid[rows, columns].sum() == valid.sum()
    assert depth_section.cut_out(np.ones((40, 60), bool)) == (slice(0, 40), slice(0, 60))


def test_a_frame_that_is_off_as_a_whole_keeps_its_shape():
    true = np.linspace(2.0, 3.0, 12).reshape(3, 4)
    assert depth_section.fit_scale(true / 7, true) == pytest.approx(7)
    np.testing.assert_allclose(depth_section.relative_error(1.5 * true, true), 0.5)


def test_strings_of_the_run_are_escaped(text):
    assert "scene<b>" not in text
    assert "scene&lt;b&gt;&amp;0" in text
    assert "<title>subspace3d: a &lt;run&gt; &amp; more</title>" in text


def test_settings_and_seeds_are_named(text):
    assert "command: subspace3d demo" in text
    summary = text[text.index('id="run"') : text.index('id="results"')]
    for shown in ("vggt-nano", "base, full, lora, subspace", "Least AbsRel", "3 runs, 3:34 in all"):
        assert shown in summary
    section = text[text.index('id="provenance"') :]
    for shown in ("<dt>Training seed</dt><dd>0</dd>", "a &lt;small&gt; machine", "2 to 4", "0123456789abcdef"):
        assert shown in section


def test_missing_parts_are_named(run_folder, tmp_path):
    analysis_only = tmp_path / "only"
    shutil.copytree(run_folder / "analysis", analysis_only / "analysis")
    (analysis_only / "analysis" / "spectra.png").unlink()
    text = report.run(ReportConfig(analysis_only, tmp_path / "page.html")).read_text(encoding="utf-8")
    assert "There is no results.json" in text
    assert "no training curves" in text
    assert "no config.yaml" in text
    # a figure that is gone is drawn anew from the JSON
    assert len(_Page(text).images) == len(DRAWERS)

    analysis = json.loads((run_folder / "analysis" / "analysis.json").read_text())
    (analysis_only / "analysis" / "analysis.json").write_text(json.dumps({**analysis, "version": 1}))
    text = report.run(ReportConfig(analysis_only, tmp_path / "page.html")).read_text(encoding="utf-8")
    assert "There is no analysis.json of this version" in text

    results_only = tmp_path / "nested" / "deep"
    shutil.copytree(run_folder / "evaluation", results_only)
    shutil.rmtree(results_only / "pictures" / "scene_0001")
    text = report.run(ReportConfig(tmp_path / "nested")).read_text(encoding="utf-8")
    assert "There is no analysis.json" in text
    assert "no such file" in text
    assert "pictures/scene_0001/true.safetensors" in text


def test_scenes_kept_by_an_earlier_version_are_named(run_folder, tmp_path):
    shutil.copytree(run_folder / "evaluation", tmp_path / "evaluation")
    results = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    old = {"depth": "pictures/old/base.png", "error": "pictures/old/error_base.png"}
    results["pictures"] = [{"scene": "old", "image": "i.png", "true": "t.png", "methods": {"base": old}}]
    (tmp_path / "evaluation" / "results.json").write_text(json.dumps(results))
    text = report.run(ReportConfig(tmp_path)).read_text(encoding="utf-8")
    assert text.count("what is kept of old is from an earlier version; evaluate again") == 2


def test_other_metrics_are_grouped_by_their_alignment(run_folder, tmp_path):
    results = json.loads((run_folder / "evaluation" / "results.json").read_text())
    for name, metric in results["metrics"].items():
        metric["alignment"] = "raw" if name.endswith("raw") else "scale"
    results["protocol"]["alignments"] = {"raw": "nothing is <fitted>", "scale": "one scale"}
    (tmp_path / "results.json").write_text(json.dumps(results | {"pictures": []}))
    text = report.run(ReportConfig(tmp_path)).read_text(encoding="utf-8")
    others = text[text.index("All other metrics") : text.index("Every scene (")]
    first, second = others.split('<p class="note">Alignment: one scale.')
    assert "Acc median" in first
    assert "raw" not in first
    assert "Acc raw" in second
    assert "Alignment: nothing is &lt;fitted&gt;." in second


def test_files_outside_the_run_are_not_shown(run_folder, tmp_path):
    shutil.copytree(run_folder / "evaluation", tmp_path / "evaluation")
    shutil.copytree(run_folder / "evaluation" / "pictures" / "scene_0001", tmp_path / "elsewhere")
    results = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    results["pictures"] = [{"scene": "x", "true": "../elsewhere/true.safetensors", "methods": {}}]
    (tmp_path / "evaluation" / "results.json").write_text(json.dumps(results))
    text = report.run(ReportConfig(tmp_path)).read_text(encoding="utf-8")
    assert text.count("what is kept of x must stay inside") == 2


def test_one_finetuning_run_is_a_run_folder_too(run_folder, tmp_path):
    shutil.copytree(run_folder / "tuned" / "lora", tmp_path / "lora")
    text = report.run(ReportConfig(tmp_path / "lora")).read_text(encoding="utf-8")
    assert len(_Page(text).images) == 1


def test_runs_are_found_wherever_they_stand_and_adapters_are_none(run_folder, tmp_path):
    for place in ("a", "later/a", "b"):
        shutil.copytree(run_folder / "tuned" / "lora", tmp_path / place)
    shutil.copytree(run_folder / "tuned" / "lora", tmp_path / "adapters/texture_00")
    (tmp_path / "adapters/texture_00/adapt.json").write_text("{}")
    shutil.rmtree(tmp_path / "adapters/texture_00/tuned", ignore_errors=True)
    assert set(collect(tmp_path).curves) == {"a", "later/a", "b"}


def test_nothing_to_report_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing to report"):
        report.run(ReportConfig(tmp_path))
    with pytest.raises(FileNotFoundError, match="no such folder"):
        report.run(ReportConfig(tmp_path / "missing"))
    assert not (tmp_path / "report").exists()


def test_foreign_and_broken_files_are_refused(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(ValueError, match=r"results\.json: format must be 'subspace3d-results'"):
        report.run(ReportConfig(tmp_path))
    (tmp_path / "results.json").unlink()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is not valid JSON"):
        report.run(ReportConfig(tmp_path))


def test_half_a_last_line_of_a_run_still_going_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}\n{"step": 3, "lo')
    assert "0.5 after 2 steps" in report.run(ReportConfig(tmp_path)).read_text(encoding="utf-8")


def test_elements_escape_text_and_attributes():
    paragraph = element("p", "a < b", Html("<i>"), None, title='"', hidden=True)
    assert paragraph == '<p title="&quot;" hidden>a &lt; b<i></p>'
    assert "&lt;x&gt;" in table(["<x>"], [["row", "cell"]])


def test_data_cannot_end_its_block():
    block = data_block("x", {"name": "</script><!--&"})
    assert block.count("<") == 2
    assert json.loads(block[block.index(">") + 1 : block.rindex("<")]) == {"name": "</script><!--&"}


@pytest.fixture
def changed(run_folder, tmp_path):
    """A page of the results after a change to them, and of a run that is named as given."""

    def page(change):
        shutil.copytree(run_folder / "evaluation", tmp_path / "evaluation")
        file = tmp_path / "evaluation" / "results.json"
        record = json.loads(file.read_text())
        change(record)
        file.write_text(json.dumps(record))
        return report.run(ReportConfig(tmp_path)).read_text(encoding="utf-8")

    return page


def test_how_many_frames_were_measured_is_said(text):
    assert "3, up to 4 frames each" in text and "None" not in text[text.index('id="run"') : text.index('id="results"')]


def test_means_over_other_scenes_are_not_compared(changed, text):
    def without_one_scene(record):
        lora = record["methods"]["lora"]
        lora["per_scene"]["scene_0001"]["abs_rel"] = None
        lora["mean"]["abs_rel"] = 1e-3  # the least of all

    page = changed(without_one_scene)
    main = page[page.index('id="results"') : page.index("All other metrics")]
    assert "means of lora are over 2 of 3 scenes in AbsRel: not to be compared" in main
    assert main.count("<strong>") == 7 and "<strong>0.001000</strong>" not in main
    assert "Least AbsRel" in text and "Least AbsRel" not in page
    assert "Error over size" in text and "Error over size" not in page


def test_lengths_are_in_the_scenes_unit(changed, text):
    assert "<small>scene units</small>" in text

    page = changed(lambda record: record.update(units=dict.fromkeys(record["scenes"], "mm")))
    assert "<small>mm</small>" in page and "<small>scene units</small>" not in page


def test_lengths_in_several_units_have_no_mean(changed):
    page = changed(lambda record: record.update(units=dict(zip(record["scenes"], ("m", "mm", "m")))))
    assert "distances have no mean: the scenes are in m and mm" in page


def test_a_frame_that_one_method_gets_no_scale_for_is_shown_of_the_others(run_folder, tmp_path, text):
    shutil.copytree(run_folder / "evaluation", tmp_path / "evaluation")
    file = tmp_path / "evaluation" / "pictures" / "scene_0001" / "lora.safetensors"
    shown = pictures.load(file)
    shown.views.depths[0] = 0
    pictures.save(file, shown)
    page = report.run(ReportConfig(tmp_path)).read_text(encoding="utf-8")
    assert "lora: pred must not be 0 everywhere" in page
    for method, count in (("lora", 5), ("full", 6)):
        assert len(re.findall(rf'alt="depth of [^"]*, frame \d by {method}"', page)) == count
    assert len(re.findall(r'alt="depth of [^"]*, frame \d by lora"', text)) == 6


def test_a_run_that_was_tuned_after_it_was_measured_is_named(run_folder, tmp_path):
    for name in ("evaluation", "tuned"):
        shutil.copytree(run_folder / name, tmp_path / name)
    results = tmp_path / "evaluation" / "results.json"
    record = json.loads(results.read_text())
    for name in ("lora", "full"):
        tuned = json.loads((tmp_path / "tuned" / name / "tuned" / "tuned.json").read_text())
        record["methods"][name]["training"] = tuned["training"] | ({"seconds": 3.5} if name == "lora" else {})
    results.write_text(json.dumps(record))
    page = report.run(ReportConfig(tmp_path)).read_text(encoding="utf-8")
    assert "lora was tuned anew after it was evaluated" in page and "full was tuned anew" not in page


@pytest.mark.parametrize("name", ["a$^$b", "_first"])
def test_names_are_drawn_as_they_are(run_folder, tmp_path, name):
    """The first is no TeX and would be taken for it, the second would be left out of the legend."""
    shutil.copytree(run_folder / "tuned" / "lora", tmp_path / name)
    shutil.copytree(run_folder / "tuned" / "full", tmp_path / "full")
    assert f"{name} 0." in report.run(ReportConfig(tmp_path)).read_text(encoding="utf-8")
    curves = {name: [(1, 10.0), (2, 0.1)], "full": [(1, 1.0), (2, 2.0)]}
    figure = result_figures.draw_training(curves)
    to_png(figure)
    drawn = figure.axes[0]
    assert [text.get_text() for text in drawn.get_legend().get_texts()] == list(curves)
    assert not any(text.get_parse_math() for text in drawn.get_legend().get_texts())
    # the numbers of a logarithmic axis are powers of ten
    assert drawn.get_yscale() == "log" and all(label.get_parse_math() for label in drawn.get_yticklabels())


def test_a_first_prediction_that_takes_long_is_not_the_cost_of_a_method(changed):
    def slow_start(record):
        record["methods"]["base"]["details"]["scene_0001"]["inference_seconds"] = 90.0

    page = changed(slow_start)
    costs = page[page.index('id="costs"') : page.index('id="space"')]
    assert "0.25" in costs and "30." not in costs


def test_results_that_are_not_shown_are_named(run_folder, tmp_path):
    for name in ("on_a", "on_b"):
        shutil.copytree(run_folder / "evaluation", tmp_path / name)
    page = report.run(ReportConfig(tmp_path)).read_text(encoding="utf-8")
    assert "on_b/results.json is not shown: this page is about on_a/results.json" in page
    # at its usual place it needs no choice
    (tmp_path / "on_a").rename(tmp_path / "evaluation")
    assert "is not shown" not in report.run(ReportConfig(tmp_path)).read_text(encoding="utf-8")
