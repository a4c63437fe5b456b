"""State dicts in ``.pt`` files as `torch.save` writes them, read without unpickling; tensors are maps of the file."""

from __future__ import annotations

import math
import struct
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from subspace3d.plain_pickle import Call, Name, Reference, parse
from subspace3d.reading import open_regular, open_zip

_DTYPES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
_TENSOR, _PARAMETER = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
_NAMES = frozenset({_TENSOR, _PARAMETER, "collections.OrderedDict", "torch.Size", *(f"torch.{n}" for n in _DTYPES)})
_LARGEST_PICKLE = 1 << 26
_LOCAL_HEADER = 30  # bytes before the name of a member


def read_state_dict(path: Path) -> dict[str, Any]:
    """What a ``.pt`` file holds: tensors by name, and dicts and plain values where it holds more than a state dict.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a whole file of `torch.save`, one from before PyTorch 1.6, or one that holds anything but
            tensors and plain values; the message names what.
    """
    with open_regular(path) as file:
        try:
            if file.read(4) != b"PK\x03\x04":
                raise ValueError(
                    "it is no zip archive; files of torch.save from before PyTorch 1.6 are pickles through and "
                    "through: load it where you trust it, and save it again as safetensors"
                )
            with open_zip(file) as archive:
                return _Reader(path, file, archive).read()
        except MemoryError:
            raise
        except Exception as error:  # a broken archive makes its parser run into anything
            raise ValueError(f"{path} is not a whole PyTorch weights file: {error}") from error


class _Reader:
    def __init__(self, path: Path, file: IO[bytes], archive: zipfile.ZipFile) -> None:
        self.path, self.file, self.archive = path, file, archive
        self._storages: dict[str, torch.Tensor] = {}
        pickles = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("it must hold one data.pkl")
        self.pickle, self.root = pickles[0], pickles[0].removesuffix("data.pkl")

    def read(self) -> dict[str, Any]:
        order = self.root + "byteorder"
        if order in self.archive.namelist() and self._member(order, 16) != b"little":
            raise ValueError("its byte order must be little")
        content = parse(self._member(self.pickle, _LARGEST_PICKLE), _NAMES)
        if not isinstance(content, dict):
            raise ValueError(f"it must hold a plain state dict (name -> tensor), got {type(content).__name__}")
        return self._build(content)

    def _member(self, name: str, largest: int) -> bytes:
        if self.archive.getinfo(name).file_size > largest:
            raise ValueError(f"{name} has more than {largest} bytes")
        return self.archive.read(name)

    def _build(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._build(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._build(item) for item in value]
        if isinstance(value, Call):
            return self._tensor(value)
        if isinstance(value, Name | Reference):
            raise ValueError(f"it holds a {value.name if isinstance(value, Name) else 'storage'} of its own")
        return value

    def _tensor(self, call: Call) -> torch.Tensor:
        if call.name == _PARAMETER and len(call.arguments) == 3 and isinstance(call.arguments[0], Call):
            call = call.arguments[0]
        if call.name != _TENSOR or call.has_state or len(call.arguments) not in (6, 7):
            raise ValueError(f"it holds a {call.name}, which is no plain tensor")
        reference, offset, size, stride = call.arguments[:4]
        sizes = (size, stride)
        if not all(isinstance(each, tuple) and all(type(n) is int and n >= 0 for n in each) for each in sizes):
            raise ValueError("it holds a tensor without a size")
        if len(size) != len(stride) or len(size) > 32 or type(offset) is not int or offset < 0:
            raise ValueError("it holds a tensor without a size")
        storage = self._storage(reference)
        empty = 0 in size
        last = offset + sum((n - 1) * step for n, step in zip(size, stride))
        if not empty and (last >= len(storage) or math.prod(size) > len(storage)):
            raise ValueError(f"it holds a tensor {list(size)} that reaches beyond its storage of {len(storage)}")
        if empty:
            if math.prod(n or 1 for n in size) > 1 << 40:
                raise ValueError(f"it holds a tensor {list(size)}")
            return storage.new_zeros(size)
        return storage.as_strided(size, stride, storage.storage_offset() + offset)

    def _storage(self, reference: Any) -> torch.Tensor:
        key = reference.key if isinstance(reference, Reference) else ()
        if len(key) != 5 or key[0] != "storage" or not isinstance(key[1], Name) or not isinstance(key[2], str):
            raise ValueError("it holds a tensor without a storage")
        dtype = _DTYPES.get(key[1].name.removeprefix("torch."))
        if dtype is None:
            raise ValueError(f"it holds a storage of {key[1].name}")
        if key[2] not in self._storages:
            info = self.archive.getinfo(f"{self.root}data/{key[2]}")
            self._storages[key[2]] = self._map(info, dtype)
        storage = self._storages[key[2]]
        if storage.dtype != dtype or type(key[4]) is not int or key[4] != len(storage):
            raise ValueError(f"storage {key[2]} must have {key[4]} numbers of {dtype}")
        return storage

    def _map(self, info: zipfile.ZipInfo, dtype: torch.dtype) -> torch.Tensor:
        """The bytes of an uncompressed member, as a private map of the file."""
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise ValueError(f"{info.filename} must not be compressed")
        self.file.seek(info.header_offset)
        header = self.file.read(_LOCAL_HEADER)
        if len(header) < _LOCAL_HEADER or header[:4] != b"PK\x03\x04":
            raise ValueError(f"{info.filename} is not where the list of members says")
        start = info.header_offset + _LOCAL_HEADER + sum(struct.unpack_from("<2H", header, 26))
        length = self.file.seek(0, 2)
        if start + info.file_size > length or info.file_size % dtype.itemsize:
            raise ValueError(f"{info.filename} of {info.file_size} bytes does not fit")
        if not info.file_size:
            return torch.zeros(0, dtype=dtype)
        data = torch.from_file(str(self.path), shared=False, size=length, dtype=torch.uint8)
        part = data[start : start + info.file_size]
        return (part if start % dtype.itemsize == 0 else part.clone()).view(dtype)
