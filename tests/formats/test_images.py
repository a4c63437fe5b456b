"""Images and depth maps: 16-bit grey, orientation, and which channel of an EXR is the depth."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from subspace3d.formats.images import read_raw_depth, read_rgb
from subspace3d.mitsuba_variant import load_mitsuba


def _write_exr(path, **channels):
    mitsuba = load_mitsuba()
    bitmap = mitsuba.Bitmap(
        mitsuba.Bitmap.PixelFormat.MultiChannel, mitsuba.Struct.Type.Float32, [3, 2], len(channels), list(channels)
    )
    pixels = np.array(bitmap, copy=False)
    pixels[:] = np.stack([np.full((2, 3), value) for value in channels.values()], axis=-1).reshape(pixels.shape)
    bitmap.write(str(path))


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, suffix):
    values = np.array([[0, 128, 129, 257, 32896, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / f"g.{suffix}")
    expected = np.floor(values / 257 + 0.5).astype(np.uint8)
    np.testing.assert_array_equal(read_rgb(tmp_path / f"g.{suffix}"), expected[..., None].repeat(3, -1))


def test_grey_of_floating_point_is_refused(tmp_path):
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "f.tiff")
    with pytest.raises(ValueError, match=r"f\.tiff must have 8 or 16 bits a channel, got mode F"):
        read_rgb(tmp_path / "f.tiff")


@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", [1, 2, 3, 6, 8])
def test_images_that_are_stored_turned_are_refused(tmp_path, suffix, orientation):
    image = Image.fromarray(np.zeros((4, 6, 3), np.uint8))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / f"i.{suffix}", exif=exif)
    if orientation == 1:
        assert read_rgb(tmp_path / f"i.{suffix}").shape == (4, 6, 3)
        return
    with pytest.raises(ValueError, match=rf"must be stored upright, its EXIF orientation is {orientation}"):
        read_rgb(tmp_path / f"i.{suffix}")


@pytest.mark.parametrize(
    ("channels", "depth"),
    [
        ({"R": 1, "G": 2, "B": 3, "A": 1, "Z": 7}, 7),
        ({"R": 1, "G": 1, "B": 1, "depth.Z": 5}, 5),
        ({"R": 4, "G": 4, "B": 4}, 4),
        ({"R": 4, "G": 4, "B": 4, "A": 1}, 4),
        ({"V": 6}, 6),
        ({"a": 1, "Depth": 9, "b": 2}, 9),
    ],
)
def test_the_depth_of_an_exr_is_found_by_its_name(tmp_path, channels, depth):
    _write_exr(tmp_path / "d.exr", **channels)
    np.testing.assert_array_equal(read_raw_depth(tmp_path / "d.exr", 1.0), np.full((2, 3), depth, np.float32))


@pytest.mark.parametrize("channels", [{"R": 1, "G": 2, "B": 3}, {"a": 1, "b": 2}, {"a.Z": 1, "b.Z": 2}])
def test_an_exr_without_a_clear_depth_is_refused(tmp_path, channels):
    _write_exr(tmp_path / "d.exr", **channels)
    with pytest.raises(ValueError, match=r"d\.exr must have (a|one) channel"):
        read_raw_depth(tmp_path / "d.exr", 1.0)
