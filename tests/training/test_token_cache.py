from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from training.plane_scenes import write_plane_scenes
from training.tiny import CONFIG, TINY, read_metrics, tiny_model, without_time

from subspace3d.backbones.patch_embed import ImageEncoder
from subspace3d.commands.finetune import FinetuneConfig
from subspace3d.datasets.multiview import MultiViewDataset
from subspace3d.training.config import TrainConfig
from subspace3d.training.loop import train
from subspace3d.training.token_cache import TokenCache


@pytest.fixture
def encoder() -> ImageEncoder:
    torch.manual_seed(0)
    encoder = ImageEncoder(TINY).requires_grad_(False).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.normal_()
    return encoder


def test_tokens_are_those_of_the_encoder_and_each_image_is_encoded_once(encoder: ImageEncoder, tmp_path: Path) -> None:
    images = torch.rand(3, 3, 28, 28)
    expected = encoder(images)
    alone = torch.stack([encoder(image[None])[0] for image in images])
    cache = TokenCache(tmp_path, encoder)
    with cache.attached():
        first, second = encoder(images), encoder(images.flip(0)).flip(0)
        assert (cache.misses, cache.hits) == (3, 3)
    assert torch.equal(first, alone) and torch.equal(second, alone)
    torch.testing.assert_close(first, expected)
    encoder(images)
    assert cache.hits == 3  # detached
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3
    again = TokenCache(tmp_path, encoder)
    with again.attached():
        assert torch.equal(encoder(images), alone)
    assert (again.misses, again.hits) == (0, 3)


def test_other_weights_images_sizes_and_types_have_other_tokens(encoder: ImageEncoder, tmp_path: Path) -> None:
    image = torch.rand(1, 3, 28, 28)

    def misses() -> int:
        cache = TokenCache(tmp_path, encoder)
        with cache.attached():
            encoder(image)
        return cache.misses

    assert (misses(), misses()) == (1, 0)
    with torch.autocast("cpu", torch.bfloat16):
        assert (misses(), misses()) == (1, 0)
    image[0, 0, 0, 0] += 1e-6
    assert misses() == 1
    image = torch.zeros(1, 3, 14, 28)
    assert misses() == 1
    image = torch.zeros(1, 3, 28, 14)  # the same bytes in another shape
    assert misses() == 1
    encoder.norm.bias += 1e-6
    assert misses() == 1


def test_cache_is_bounded_and_damaged_files_are_made_again(
    encoder: ImageEncoder, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    images = torch.rand(4, 3, 28, 28)
    with TokenCache(tmp_path, encoder).attached():
        encoder(images[:2])
    files = sorted(tmp_path.rglob("*.safetensors"))
    used = sum(file.stat().st_size for file in files)
    bounded = TokenCache(tmp_path, encoder, gigabytes=(used + 2000) / 1e9)  # room for one more
    with bounded.attached():
        expected = encoder(images)
    assert sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors")) <= used + 2000
    assert capsys.readouterr().err.count("further images are encoded every time") == 1
    files[0].write_bytes(files[0].read_bytes()[:-8])
    mended = TokenCache(tmp_path, encoder)
    with mended.attached():
        assert torch.equal(encoder(images), expected)
    assert mended.misses == 2  # the damaged one and the one that did not fit


def test_a_file_that_goes_while_they_are_counted_is_no_error(encoder: ImageEncoder, tmp_path: Path) -> None:
    cache = TokenCache(tmp_path, encoder)
    with cache.attached():
        encoder(torch.rand(1, 3, 28, 28))
    (whole,) = tmp_path.rglob("*.safetensors")
    # listed and not there, as a file that another process has just deleted
    whole.with_name("gone.safetensors").symlink_to(tmp_path / "nowhere")
    unfinished = whole.parent / ".other.safetensors.s3d-abcdefgh.tmp"
    unfinished.mkdir()
    (unfinished / "other.safetensors").write_bytes(b"half")
    assert cache._count() == whole.stat().st_size


def test_training_with_a_full_cache_is_training_with_an_empty_one(tmp_path: Path) -> None:
    dataset = MultiViewDataset(write_plane_scenes(tmp_path / "scenes", scenes=2, views=3), image_size=28)
    config = dataclasses.replace(CONFIG, augment=False, steps=4)
    lines = []
    for out in ("empty", "full", "none"):
        model = tiny_model()
        encoder = model.get_submodule("base_model.model.aggregator.patch_embed")
        cache = TokenCache(tmp_path / "tokens", encoder)
        if out == "none":
            train(model, dataset, config, tmp_path / out)
        else:
            with cache.attached():
                train(model, dataset, config, tmp_path / out)
            assert cache.misses == (6 if out == "empty" else 0)
        lines.append(without_time(read_metrics(tmp_path / out)))
    assert lines[0] == lines[1]
    for cached, plain in zip(lines[0], lines[2]):
        assert cached["loss"] == pytest.approx(plain["loss"], rel=1e-4)


def test_what_does_not_go_with_a_cache(encoder: ImageEncoder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="augment must be off with cache_tokens"):
        FinetuneConfig(scenes=tmp_path, out=tmp_path, cache_tokens=tmp_path, train=TrainConfig(augment=True))
    encoder.norm.bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"frozen image encoder, but norm\.bias is trained"):
        TokenCache(tmp_path, encoder)
