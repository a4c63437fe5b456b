"""The report in a headless Chromium: nothing loaded, nothing complained about, points drawn, usable by all."""

from __future__ import annotations

import numpy as np
import pytest
from reporting import browser
from reporting.synthetic_run import ALIGNMENT, METHODS

from subspace3d.commands import report
from subspace3d.commands.report import ReportConfig
from subspace3d.evaluation import pictures
from subspace3d.reporting.analysis_figures import DRAWERS

# share of the canvas' pixels that differ from its background
_DRAWN = """
const viewer = window.sceneViewer, gl = viewer.gl, {width, height} = viewer.canvas;
viewer.draw();
const pixels = new Uint8Array(4 * width * height);
gl.readPixels(0, 0, width, height, gl.RGBA, gl.UNSIGNED_BYTE, pixels);
const paper = getComputedStyle(viewer.canvas).backgroundColor.match(/\\d+/g).map(Number);
let drawn = 0;
for (let i = 0; i < pixels.length; i += 4) drawn += [0, 1, 2].some((k) => Math.abs(pixels[i + k] - paper[k]) > 2);
return drawn / (width * height);
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    reason = browser.missing()
    if reason is not None:
        pytest.skip(reason)
    driver = browser.start(tmp_path_factory.mktemp("profile"))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def address(run_folder):
    return report.run(ReportConfig(run_folder)).resolve().as_uri()


@pytest.fixture
def page(driver, address):
    """The page at laptop width in light colours, loaded anew; its console must stay without errors."""
    browser.show(driver, 1280, 900)
    driver.get(address)
    driver.execute_script("localStorage.clear(); delete document.documentElement.dataset.theme")
    driver.get_log("browser")
    driver.refresh()
    yield driver
    assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_everything_is_there_and_nothing_is_loaded(page):
    found = page.execute_script(
        "document.querySelectorAll('img').forEach((image) => { image.loading = 'eager'; });"
        "return Promise.all([...document.images].map((image) => image.decode())).then(() => ({"
        " images: document.images.length, tables: document.querySelectorAll('main table').length,"
        " loaded: performance.getEntriesByType('resource').map((entry) => entry.name)"
        "   .filter((name) => !name.startsWith('data:')),"
        " heading: document.querySelector('h1').textContent,"
        " levels: [...document.querySelectorAll('h1, h2, h3')].map((heading) => Number(heading.tagName[1])),"
        " bold: document.querySelectorAll('section b').length }))"
    )
    # 8 figures, 4 samples of colour; of 2 frames of 3 scenes image, truth, and depth and error of each method
    assert found["images"] == len(DRAWERS) + 8 + 2 * 3 * (2 + 2 * len(METHODS))
    assert found["tables"] >= 7
    assert found["loaded"] == []
    assert found["heading"] == "subspace3d: a <run> & more"
    # no level is left out on the way down
    assert all(after - before <= 1 for before, after in zip(found["levels"], found["levels"][1:]))
    # the scene named scene<b>&0 is shown by name
    assert found["bold"] == 0


def test_the_points_are_drawn_and_follow_the_switches(page):
    both = page.execute_script(_DRAWN)
    assert 0.05 < both < 0.95
    switch = "document.querySelector('[data-{}]').click();"
    without_cameras = page.execute_script(switch.format("cameras") + _DRAWN)
    assert 0 < without_cameras < both
    nothing = page.execute_script(switch.format('layer="0"') + switch.format(f'layer="{len(METHODS)}"') + _DRAWN)
    assert nothing == 0
    assert "Nothing is switched on" in page.find_element("css selector", "[data-status]").text
    assert page.execute_script(switch.format('layer="1"') + _DRAWN) > 0.01


def test_the_points_stand_where_the_metrics_put_them(page, run_folder):
    folder = run_folder / "evaluation" / "pictures" / "scene_0001"
    true, base = pictures.load(folder / "true.safetensors"), pictures.load(folder / "base.safetensors")
    valid = true.views.depths > 0
    script = (
        "const viewer = window.sceneViewer; viewer.openScene(1);"
        "return Array.from(layerPositions(viewer.scene, arguments[0], arguments[1]))"
    )
    # depths are stored in steps of 5e-5 and drawn in float32, a few units away
    drawn = np.array(page.execute_script(script, 0, "true")).reshape(-1, 3)
    np.testing.assert_allclose(drawn, true.views.points(valid), atol=3e-4)
    drawn = np.array(page.execute_script(script, 1, "predicted")).reshape(-1, 3)
    np.testing.assert_allclose(drawn, ALIGNMENT.apply(base.views.points(valid)), atol=3e-4)
    # the made-up cameras are the true ones in another world, so both ways of placing agree
    by_true = np.array(page.execute_script(script, 1, "true")).reshape(-1, 3)
    np.testing.assert_allclose(by_true, drawn, atol=3e-4)


def test_the_least_confident_points_can_be_hidden(page):
    script = (
        "const viewer = window.sceneViewer; viewer.find('confidence').value = arguments[0]; viewer.rebuild();"
        "return viewer.layers.map((layer) => layer.count)"
    )
    truth, everything = page.execute_script(script, 0)
    same, some = page.execute_script(script, 50)
    assert same == truth == everything
    # a row of pixels has one confidence, and there are 56 rows
    assert some / everything == pytest.approx(0.5, abs=1 / 56 + 1 / 255)


def test_mouse_and_fingers_move_the_view(page):
    from selenium.webdriver import ActionChains

    state = "const v = window.sceneViewer; return [v.yaw, v.pitch, v.distance, ...v.target]"
    canvas = page.find_element("css selector", "canvas")
    page.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", canvas)
    start = page.execute_script(state)
    ActionChains(page).move_to_element(canvas).click_and_hold().move_by_offset(60, 20).release().perform()
    turned = page.execute_script(state)
    assert turned[0] < start[0]
    assert turned[1] > start[1]
    assert turned[2:] == start[2:]
    box = page.execute_script("const b = arguments[0].getBoundingClientRect(); return [b.x, b.y]", canvas)

    def touch(kind, *places):
        points = [{"x": box[0] + x, "y": box[1] + y, "id": index} for index, (x, y) in enumerate(places)]
        page.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    touch("touchStart", (100, 100), (200, 100))
    touch("touchMove", (100, 100), (300, 100))
    touch("touchEnd")
    pinched = page.execute_script(state)
    assert pinched[2] == pytest.approx(turned[2] / 2, rel=0.02)
    assert pinched[3:] != turned[3:]


def test_the_keyboard_reaches_everything(page):
    from selenium.webdriver import ActionChains, Keys

    def press(key):
        ActionChains(page).send_keys(key).perform()
        return page.switch_to.active_element

    link = press(Keys.TAB)
    assert link.text == "Skip to the content"
    assert page.execute_script("return arguments[0].getBoundingClientRect().left >= 0", link)
    outline = page.execute_script("return getComputedStyle(arguments[0]).outlineStyle", link)
    assert outline == "solid"
    reached = {page.execute_script("return arguments[0].tagName", press(Keys.TAB)) for _ in range(40)}
    assert {"BUTTON", "A", "SUMMARY", "CANVAS", "SELECT", "INPUT"} <= reached
    canvas = page.find_element("css selector", "canvas")
    page.execute_script("arguments[0].focus()", canvas)
    state = "const v = window.sceneViewer; return [v.yaw, v.distance]"
    yaw, distance = page.execute_script(state)
    press(Keys.ARROW_RIGHT)
    press("+")
    assert page.execute_script(state) == pytest.approx([yaw + 0.1, distance * 0.9])
    press(Keys.HOME)
    assert page.execute_script(state) == [yaw, distance]


@pytest.mark.parametrize("width", [320, 390, 768])
def test_narrow_screens_scroll_tables_and_not_the_page(page, width):
    browser.show(page, width, 844)
    page.execute_script("document.querySelectorAll('details').forEach((item) => { item.open = true; })")
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    table = "const table = document.querySelector('.scroll'); return table.scrollWidth > table.clientWidth"
    assert page.execute_script(table)
    assert page.execute_script(_DRAWN) > 0.02


def test_dark_follows_the_system_until_the_switch_is_used(page, address):
    brightness = "return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)"
    assert min(page.execute_script(brightness)) > 200
    browser.show(page, 1280, 900, dark=True)
    assert max(page.execute_script(brightness)) < 60
    assert page.execute_script(_DRAWN) > 0.05
    button = page.find_element("css selector", "[data-theme-switch]")
    assert button.text == "Light"
    button.click()
    assert min(page.execute_script(brightness)) > 200
    page.refresh()
    assert min(page.execute_script(brightness)) > 200
