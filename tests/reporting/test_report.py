"""The report of a run folder: everything on one page, nothing taken from strings, gaps named."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from reporting.synthetic_run import METHODS, write_run

from subspace3d.configs import ReportConfig
from subspace3d.reporting import report
from subspace3d.reporting.analysis_figures import DRAWERS
from subspace3d.reporting.html import Html, element, table


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
        if tag not in ("img", "meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "tr" in self.open:
            self.rows[-1].append(data)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "a <run> & more", ("texture", "camera"), layers=2, scenes=3)


@pytest.fixture(scope="module")
def text(run_folder):
    return report.run(ReportConfig(run_folder)).read_text(encoding="utf-8")


def test_the_page_is_whole_and_needs_nothing_else(run_folder, text):
    page = _Page(text)
    assert (run_folder / "report" / "index.html").is_file()
    assert all(url.startswith(("data:", "#")) for url in page.urls)
    assert "script" not in page.tags
    assert "http" not in re.sub(r'src="data:[^"]*"', "", text)
    anchors = set(re.findall(r'<section id="([^"]+)"', text))
    assert {url[1:] for url in page.urls if url.startswith("#")} == anchors


def test_table_has_all_methods_best_values_and_costs(text):
    rows = {row[0]: row for row in _Page(text).rows if row and row[0] in METHODS}
    assert rows.keys() == METHODS.keys()
    main = text[text.index('id="results"') : text.index("All other metrics")]
    assert main.count("<strong>") == 8
    best = main[main.index('<th scope="row">subspace</th>') :]
    assert best[: best.index("</tr>")].count("<strong>") == 8
    for shown in ("61,440", "1:11", "1.50 GiB", "↓", "↑", "subspace in 3 of 3 scenes", "lora failed on scene&lt;9&gt;"):
        assert shown in main


def test_pictures_and_figures_are_inside_with_alt_texts(text):
    images = _Page(text).images
    assert all(image["src"].startswith("data:image/png;base64,") and image["alt"] for image in images)
    # the figures of the analysis, the training curves, and per scene image, truth, and depth and error of each method
    assert len(images) == len(DRAWERS) + 1 + 3 * (2 + 2 * len(METHODS))


def test_strings_of_the_run_are_escaped(text):
    assert "scene<b>" not in text
    assert "scene&lt;b&gt;&amp;0" in text
    assert "<title>subspace3d: a &lt;run&gt; &amp; more</title>" in text


def test_settings_and_seeds_are_named(text):
    assert "command: subspace3d demo" in text
    section = text[text.index('id="run"') :]
    for shown in ("vggt-nano", "<dt>Training seed</dt><dd>0</dd>", "<dt>PyTorch</dt>"):
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
    assert "pictures/scene_0001/image.png is missing" in text


def test_one_finetuning_run_is_a_run_folder_too(run_folder, tmp_path):
    shutil.copytree(run_folder / "tuned" / "lora", tmp_path / "lora")
    text = report.run(ReportConfig(tmp_path / "lora")).read_text(encoding="utf-8")
    assert len(_Page(text).images) == 1


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
