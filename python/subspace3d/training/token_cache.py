"""The frozen image encoder's tokens on disk: every image is encoded once, whatever run and step it is seen in."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from subspace3d.backbones.find import backbone_of
from subspace3d.files import load_tensors, save_tensors
from subspace3d.log import logger

_RECOUNT = 100
_LARGEST_HEADER = 1024


class TokenCache:
    """Tokens by the hash of the encoder's weights, of the image and by its size.

    ``folder/<weights>-<device>-<type>/<height>x<width>/<image>.safetensors`` holds ``tokens [patches, dim]`` in the
    type the encoder gives them, so a run with the cache computes the same as one with an empty cache. An image is
    always encoded alone: its tokens do not depend on what else is in the batch. When ``gigabytes`` are reached,
    nothing is added any more; further images are encoded every time.

    Args:
        folder (Path): shared by all runs, whatever their backbone; several processes may use it at a time.
        encoder (nn.Module): frozen; maps ``[N, 3, H, W]`` to ``[N, patches, dim]``.
        gigabytes (float): bound on all of ``folder``, in 1e9 bytes. Every process counts it anew after 100 images.

    Raises:
        ValueError: the encoder has trainable parameters.
    """

    def __init__(self, folder: Path, encoder: nn.Module, gigabytes: float = 20.0) -> None:
        trained = next((name for name, p in encoder.named_parameters() if p.requires_grad), None)
        if trained is not None:
            raise ValueError(f"cache_tokens needs a frozen image encoder, but {trained} is trained")
        self.folder, self.encoder = folder, encoder
        self.hits = self.misses = 0
        self._bound = int(gigabytes * 1e9)
        self._weights = _hash(encoder.state_dict())[:16]
        self._plain_forward = encoder.forward
        self._bytes, self._stored, self._closed = self._count(), 0, False

    @classmethod
    def of_backbone(cls, folder: Path, model: nn.Module, gigabytes: float = 20.0) -> TokenCache:
        """Of the image encoder of a backbone's network.

        Raises:
            ValueError: it has none whose tokens can be kept, or the encoder has trainable parameters.
        """
        backbone = backbone_of(model)
        if backbone.encoder is None:
            raise ValueError(f"cache_tokens must be off for {backbone.name}: it has no frozen image encoder of its own")
        return cls(folder, model.get_submodule(backbone.encoder), gigabytes)

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Within it, calling the encoder goes through the cache."""
        self.encoder.forward = self._forward
        try:
            yield
        finally:
            del self.encoder.forward  # the class's method shows again

    def _forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.stack([self._tokens(image) for image in images])

    def _tokens(self, image: torch.Tensor) -> torch.Tensor:
        path = self._path(image)
        with contextlib.suppress(FileNotFoundError, KeyError, ValueError):  # a damaged file is made again
            tokens = load_tensors(path)[0]["tokens"].to(image.device, copy=True)
            self.hits += 1
            return tokens
        self.misses += 1
        tokens = self._plain_forward(image[None])[0]
        self._store(path, tokens)
        return tokens

    def _path(self, image: torch.Tensor) -> Path:
        device = image.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else image.dtype
        kind = f"{self._weights}-{device}-{str(dtype).removeprefix('torch.')}"
        size = f"{image.shape[-2]}x{image.shape[-1]}"
        return self.folder / kind / size / f"{_hash({'image': image})}.safetensors"

    def _store(self, path: Path, tokens: torch.Tensor) -> None:
        size = tokens.numel() * tokens.element_size() + _LARGEST_HEADER
        if self._closed or self._bytes + size > self._bound:
            self._close(f"holds its {self._bound / 1e9:g} GB")
            return
        try:
            save_tensors(path, {"tokens": tokens})
        except OSError as error:
            self._close(f"cannot be written ({error})")
            return
        self._stored += 1
        self._bytes = self._count() if self._stored % _RECOUNT == 0 else self._bytes + size

    def _close(self, reason: str) -> None:
        if not self._closed:
            self._closed = True
            logger.warning(f"cache_tokens: {self.folder} {reason}; further images are encoded every time")

    def _count(self) -> int:
        total = 0
        for path in self.folder.glob("*/*/*.safetensors"):
            with contextlib.suppress(FileNotFoundError):  # another process shares the folder, or someone empties it
                total += path.stat().st_size
        return total


def _hash(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
