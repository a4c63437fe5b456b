"""True and predicted points and cameras of a scene, live in a browser, by viser."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from subspace3d.evaluation.pictures import IDENTITY, ShownViews
from subspace3d.evaluation.scene_metrics import Views
from subspace3d.log import logger
from subspace3d.reporting.viewer_server import start_server
from subspace3d.reporting.viewer_sources import Source

if TYPE_CHECKING:
    import viser

Placement = Literal["predicted cameras, aligned", "true cameras"]
_PLACEMENTS: tuple[Placement, ...] = ("predicted cameras, aligned", "true cameras")
_TRUE_COLOUR, _PREDICTED_COLOUR = (138, 138, 138), (0, 158, 115)


def serve(source: Source, host: str, port: int) -> None:
    """Serve until interrupted.

    Raises:
        ModuleNotFoundError: viser is not installed.
    """
    viewer = Viewer(source, start_server(host, port))
    logger.info(f"view -> {viewer.url}  (Ctrl-C ends it)")
    try:
        viewer.server.sleep_forever()
    except KeyboardInterrupt:
        logger.info("")
    finally:
        viewer.server.stop()


def place(shown: ShownViews, truth: ShownViews, placement: Placement) -> tuple[NDArray[np.float64], bool]:
    """World positions [S, H, W, 3] of every pixel, and whether they lie in the true world.

    With the true cameras, and where a model predicts none, the predicted depth is taken after its one scale per scene.
    A prediction that could not be aligned stays in its own world.
    """
    everywhere = np.ones(shown.views.depths.shape, bool)
    if placement == "true cameras" or shown.views.not_predicted():
        true = truth.views
        seen = Views(shown.depth_scale * shown.views.depths, true.intrinsics, true.extrinsics)
        return seen.points(everywhere).reshape(*everywhere.shape, 3), True
    points = shown.views.points(everywhere).reshape(*everywhere.shape, 3)
    return (points, False) if shown.alignment is None else (shown.alignment.apply(points), True)


class Viewer:
    """One scene and one method at a time, drawn on a viser server; all browsers that look at it see the same.

    Args:
        source (Source): the scenes.
        server (viser.ViserServer): an empty server.
    """

    def __init__(self, source: Source, server: viser.ViserServer) -> None:
        self.source, self.server = source, server
        self.clouds: dict[str, viser.PointCloudHandle] = {}  # "truth", "prediction": those that are drawn
        self._drawing = threading.Lock()
        gui = server.gui
        self.scene = gui.add_dropdown("Scene", source.scenes)
        self.method = gui.add_dropdown("Method", source.methods, initial_value=source.methods[-1])
        self.placement = gui.add_dropdown("Placed by", _PLACEMENTS)
        self.truth = gui.add_checkbox("Truth", True)
        self.predicted = gui.add_checkbox("Prediction", True)
        self.cameras = gui.add_checkbox("Cameras", True)
        self.masked = gui.add_checkbox("Only pixels with true depth", True)
        self.tinted = gui.add_checkbox("Tint prediction", True)
        self.confidence = gui.add_slider("Hide the least confident, %", 0, 95, 5, 0)
        self.size = gui.add_slider("Size of points", 0.1, 3.0, 0.1, 1.0)
        self.status = gui.add_markdown("")
        for control in (
            self.scene, self.method, self.placement, self.truth, self.predicted, self.cameras, self.masked,
            self.tinted, self.confidence, self.size,
        ):  # fmt: skip
            control.on_update(lambda _: self.draw())
        server.on_client_connect(self._aim)
        self.draw()

    @property
    def url(self) -> str:
        return f"http://{self.server.get_host()}:{self.server.get_port()}"

    def draw(self) -> None:
        """Draw what the controls say; what goes wrong is said in the panel, because the browser has no console."""
        with self._drawing:
            try:
                self._draw()
            except (OSError, ValueError) as error:
                self.status.content = f"**{error}**"

    def _draw(self) -> None:
        self.server.scene.reset()
        self.clouds.clear()
        truth = self.source.truth(self.scene.value)
        valid = truth.views.depths > 0
        self._frame(truth, valid)
        said = []
        if self.truth.value and valid.any() and truth.views.translation_known:
            points, _ = place(truth, truth, "true cameras")
            said.append(self._add_points("truth", points[valid], truth.rgb[valid]))
        if self.cameras.value and truth.views.translation_known:
            self._add_cameras("truth", truth, truth, _TRUE_COLOUR)
        if self.predicted.value:
            said.append(self._draw_prediction(truth, valid))
        self.status.content = "  \n".join(said)

    def _draw_prediction(self, truth: ShownViews, valid: NDArray[np.bool_]) -> str:
        name = self.method.value
        self.status.content = f"predicting with {name} …"
        shown = self.source.prediction(self.scene.value, name)
        if shown is None:
            return f"{name} failed on this scene"
        points, aligned = place(shown, truth, self.placement.value)
        kept = valid.copy() if self.masked.value and valid.any() else np.ones(valid.shape, bool)
        if shown.views.confidence is not None and self.confidence.value > 0:
            kept &= shown.views.confidence >= np.percentile(shown.views.confidence[kept], self.confidence.value)
        colours = truth.rgb[kept].astype(np.float64)
        if self.tinted.value:
            colours = 0.45 * colours + 0.55 * np.array(_PREDICTED_COLOUR)
        text = self._add_points("prediction", points[kept], np.rint(colours).astype(np.uint8), name)
        if shown.views.not_predicted():
            return f"{text}, seen from the true cameras: it predicts no {' and no '.join(shown.views.not_predicted())}"
        if self.cameras.value and self.placement.value != "true cameras":
            self._add_cameras("prediction", shown, truth, _PREDICTED_COLOUR)
        return text if aligned else f"{text}, in its own world: no alignment to the truth"

    def _add_points(self, node: str, points: NDArray[Any], colours: NDArray[np.uint8], name: str = "") -> str:
        size = 0.006 * self.size.value * self._radius
        self.clouds[node] = self.server.scene.add_point_cloud(
            f"/{node}/points", points.astype(np.float32), colours, point_size=size, point_shape="circle",
            precision="float32",
        )  # fmt: skip
        return f"{name or node}: {len(points):,} points"

    def _add_cameras(self, node: str, shown: ShownViews, truth: ShownViews, colour: tuple[int, int, int]) -> None:
        import viser.transforms

        alignment = shown.alignment or IDENTITY
        height, width = shown.views.depths.shape[1:]
        centres = alignment.apply(shown.views.centres())
        for index, number in enumerate(shown.frames):
            camera_to_world = alignment.rotation @ shown.views.poses[index, :, :3].T
            self.server.scene.add_camera_frustum(
                f"/{node}/cameras/{number:04d}",
                fov=2 * float(np.arctan2(height / 2, shown.views.calibration[index, 1, 1])),
                aspect=width / height,
                scale=0.2 * self._radius,
                thickness=1.5,
                thickness_units="screen",
                color=colour,
                image=truth.rgb[index],
                wxyz=viser.transforms.SO3.from_matrix(camera_to_world).wxyz,
                position=centres[index],
            )

    def _frame(self, truth: ShownViews, valid: NDArray[np.bool_]) -> None:
        """What a browser looks at first: the middle of the true points, from beside and above the first camera."""
        views = truth.views
        centres, forward = views.centres(), views.poses[0, 2, :3]
        points = views.points(valid) if valid.any() else centres[:1] + forward
        self._middle = np.median(points, axis=0)
        self._radius = float(np.percentile(np.linalg.norm(points - self._middle, axis=1), 95)) or 1.0
        # the y axes of the cameras point down
        up = -views.poses[:, 1, :3].mean(axis=0)
        self._up = up / max(float(np.linalg.norm(up)), 1e-9)
        back = centres[0] - self._middle
        distance = max(float(np.linalg.norm(back)), 2.5 * self._radius)
        aside = back + 0.6 * np.cross(self._up, back)  # so that the first camera does not hide the points
        direction = aside / np.linalg.norm(aside) + 0.3 * self._up
        self._eye = self._middle + distance * direction / np.linalg.norm(direction)
        self.server.scene.set_up_direction(self._up)

    def _aim(self, client: viser.ClientHandle) -> None:
        client.camera.up_direction = self._up
        client.camera.position, client.camera.look_at = self._eye, self._middle
