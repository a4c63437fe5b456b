"""Contact sheets."""

from pathlib import Path

import numpy as np
from PIL import Image

from subspace3d.choices import ATTRIBUTES
from subspace3d.commands.generate import GenerateConfig, previews
from subspace3d.formats.scene import write_scene
from subspace3d.scenes.preview import draw_sheet


def test_previews_are_small_runs_of_every_attribute_or_of_the_task():
    runs = previews(GenerateConfig(out=Path("x"), preview=True, preset="release", regime="room", scenes=900))
    assert [small.attribute for small in runs] == list(ATTRIBUTES) == [small.name for small in runs]
    assert all(small.preset == "release" and small.regime == "room" and small.scenes < 10 for small in runs)
    paper = previews(GenerateConfig(out=Path("x"), preview=True))
    assert len({small.out for small in runs}) == 1 and runs[0].out != paper[0].out
    (small,) = previews(GenerateConfig(out=Path("x"), preview=True, task="glass"))
    assert small.task == "glass" and small.out == Path("x/preview")


def test_a_sheet_has_a_row_per_data_set_and_every_view_of_its_scenes(tmp_path):
    shade = 0
    for dataset in range(2):
        for scene in range(3):
            shade += 40
            images = np.full((2, 24, 32, 3), shade, np.uint8)
            camera = np.tile([[20.0, 0, 16], [0, 20, 12], [0, 0, 1]], (2, 1, 1)), np.tile(np.eye(4)[:3], (2, 1, 1))
            write_scene(tmp_path / f"texture_{dataset:02d}/scene_{scene}", images, np.ones((2, 24, 32)), *camera, {})
    draw_sheet(tmp_path / "sheet.jpg", "texture", [tmp_path / "texture_00", tmp_path / "texture_01"])
    sheet = np.array(Image.open(tmp_path / "sheet.jpg").convert("L")).astype(int)
    for dataset, row in enumerate((44, 44 + 28)):
        for scene in range(3):
            block = sheet[row + 2 : row + 22, 96 + scene * 68 + 2 : 96 + scene * 68 + 62]
            assert np.abs(block - 40 * (3 * dataset + scene + 1)).max() < 12


def test_a_task_shows_depth_behind_the_views(tmp_path):
    images = np.full((1, 24, 32, 3), 100, np.uint8)
    depths = np.ones((1, 24, 32), np.float32)
    depths[:, :, 16:] = 2.0
    depths[:, :12, 16:] = 0.0
    camera = np.array([[[20.0, 0, 16], [0, 20, 12], [0, 0, 1]]]), np.eye(4)[None, :3]
    write_scene(tmp_path / "glass_test/scene_0", images, depths, *camera, {})
    draw_sheet(tmp_path / "sheet.jpg", "glass", [tmp_path / "glass_test"])
    sheet = np.array(Image.open(tmp_path / "sheet.jpg").convert("L")).astype(int)[44:68, 96 + 32 : 96 + 64]
    assert sheet[:, 2:14].min() > 240  # near
    assert np.abs(sheet[14:22, 18:30] - 38).max() < 12 and sheet[2:10, 18:30].max() < 12  # far; nothing
