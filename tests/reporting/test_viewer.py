"""The live viewer: served, and drawing what an evaluation kept or a model predicts."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from evaluation.analytic_scene import ball_and_wall, write_analytic_scene
from reporting.synthetic_run import ALIGNMENT, METHODS, predicted_views, write_results

from subspace3d.commands.view import ViewConfig
from subspace3d.evaluation import pictures
from subspace3d.formats.scene import write_scene
from subspace3d.reporting.viewer import Viewer, place
from subspace3d.reporting.viewer_server import is_own, start_server
from subspace3d.reporting.viewer_sources import Prediction, align, open_source


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    write_results(run / "evaluation", ["scene_0000", "scene_0001"])
    return run


@pytest.fixture
def server():
    server = start_server("localhost", 8090)
    yield server
    server.stop()


def _handshake(port: int, **headers: str) -> str:
    """First line of the answer to a request for a websocket."""
    lines = ["GET / HTTP/1.1", "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"]
    lines += ["Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==", "Sec-WebSocket-Protocol: viser-v0"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    with socket.create_connection(("localhost", port), timeout=10) as connection:
        connection.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
        return connection.recv(4096).decode("latin-1").partition("\r\n")[0]


def test_pages_of_other_sites_get_no_websocket(server):
    port = server.get_port()
    own = f"localhost:{port}"
    assert " 101 " in _handshake(port, Host=own, Origin=f"http://{own}")
    for origin in (
        "http://attacker.example",
        f"http://localhost:{port + 1}",
        "null",
        "file://",
        f"http://{own}.evil.com",
    ):
        assert " 403 " in _handshake(port, Host=own, Origin=origin), origin
    # a name of the attacker's that points at this machine
    assert " 403 " in _handshake(port, Host=f"attacker.example:{port}", Origin=f"http://attacker.example:{port}")


def test_whose_requests_are_answered():
    assert is_own(None, "127.0.0.1:8080", "localhost") and is_own("http://[::1]:8080", "[::1]:8080", "localhost")
    assert is_own("https://scenes.example", "scenes.example", "scenes.example")
    assert not is_own("http://[", "localhost:8080", "localhost")
    assert not is_own(None, None, "localhost") and not is_own("http://localhost:99999", "localhost:99999", "localhost")


def drawn_points(viewer: Viewer) -> dict[str, np.ndarray]:
    return {name: handle.points for name, handle in viewer.clouds.items()}


def test_the_command_serves_on_localhost_until_interrupted(run_folder):
    command = [str(Path(sys.executable).with_name("subspace3d")), "view", str(run_folder), "--port", "8091"]
    # a shell starts what runs in the background with interrupts ignored, and its children inherit that
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        line = next((line for line in process.stdout if line.startswith("view ->")), "")
        address = re.search(r"http://localhost:\d+", line)[0]
        with urllib.request.urlopen(address) as answer:
            assert answer.status == 200
            assert b"<html" in answer.read()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.communicate()


def test_controls_choose_scene_method_and_confidence(run_folder, server):
    viewer = Viewer(open_source(run_folder, Prediction()), server)
    assert viewer.scene.options == ("scene_0000", "scene_0001")
    assert viewer.method.options == tuple(METHODS)
    viewer.scene.value, viewer.method.value = "scene_0001", "base"
    folder = run_folder / "evaluation" / "pictures" / "scene_0001"
    true, base = pictures.load(folder / "true.safetensors"), pictures.load(folder / "base.safetensors")
    valid = true.views.depths > 0
    points = drawn_points(viewer)
    # float32, a few units away
    np.testing.assert_allclose(points["truth"], true.views.points(valid), atol=1e-6)
    np.testing.assert_allclose(points["prediction"], ALIGNMENT.apply(base.views.points(valid)), atol=1e-5)
    everything = len(points["prediction"])
    viewer.confidence.value = 50
    # a row of pixels has one confidence, and there are 56 rows
    assert len(drawn_points(viewer)["prediction"]) == pytest.approx(everything / 2, abs=everything / 56)
    viewer.truth.value = False
    assert set(drawn_points(viewer)) == {"prediction"}
    viewer.predicted.value = False
    assert drawn_points(viewer) == {}


def test_both_placements_agree_where_the_cameras_are_right(run_folder):
    source = open_source(run_folder, Prediction())
    true, shown = source.truth("scene_0000"), source.prediction("scene_0000", "subspace")
    predicted, aligned = place(shown, true, "predicted cameras, aligned")
    assert aligned
    np.testing.assert_allclose(predicted, place(shown, true, "true cameras")[0], atol=1e-5)


def test_scene_folders_are_predicted_when_opened(tmp_path, server):
    write_analytic_scene(tmp_path / "one", views=3)
    images, true = ball_and_wall(views=3)
    nothing = np.zeros(true.depths.shape, np.float32)
    write_scene(tmp_path / "without_depth", images, nothing, true.intrinsics, true.extrinsics, provenance={})
    source = open_source(tmp_path, Prediction(weights=Path("random"), frames=2, device="cpu"))
    assert (source.scenes, source.methods) == (["one", "without_depth"], ["base"])
    viewer = Viewer(source, server)
    points = drawn_points(viewer)
    assert points["truth"].shape == points["prediction"].shape
    assert source.prediction("one", "base") is source.prediction("one", "base")
    viewer.scene.value = "without_depth"
    assert set(drawn_points(viewer)) == {"prediction"}


def test_alignment_of_a_prediction_is_found():
    _, true = ball_and_wall()
    shown = align(predicted_views(true, 0.0), true)
    assert shown.depth_scale == pytest.approx(ALIGNMENT.scale)
    np.testing.assert_allclose(shown.alignment.rotation, ALIGNMENT.rotation, atol=1e-9)
    np.testing.assert_allclose(shown.alignment.translation, ALIGNMENT.translation, atol=1e-9)


def test_a_broken_file_is_said_in_the_panel(run_folder, tmp_path, server):
    shutil.copytree(run_folder, tmp_path / "run")
    viewer = Viewer(open_source(tmp_path / "run", Prediction()), server)
    (tmp_path / "run/evaluation/pictures/scene_0001/true.safetensors").write_bytes(b"half")
    viewer.scene.value = "scene_0001"
    assert "is not a whole safetensors file" in viewer.status.content


def test_bad_settings_are_refused(run_folder, tmp_path):
    with pytest.raises(ValueError, match="tuned must not be given with an evaluated run"):
        open_source(run_folder, Prediction(tuned=(tmp_path,)))
    with pytest.raises(FileNotFoundError, match="no such folder of scenes"):
        open_source(tmp_path / "missing", Prediction())
    results = json.loads((run_folder / "evaluation/results.json").read_text())
    (tmp_path / "results.json").write_text(json.dumps({**results, "pictures": []}))
    with pytest.raises(ValueError, match="evaluate with --kept-scenes 1 or more"):
        open_source(tmp_path, Prediction())
    with pytest.raises(ValueError, match="frames must be 1 to 8, got 9"):
        ViewConfig(run_folder, frames=9)
    with pytest.raises(ValueError, match="port must be 1 to 65535, got 0"):
        ViewConfig(run_folder, port=0)
