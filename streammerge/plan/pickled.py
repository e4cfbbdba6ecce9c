"""Weights as torch.save leaves them (`pytorch_model.bin`): where every tensor's bytes lie, without reading them.

Such a file is a zip archive, uncompressed: a pickle that names storages, and the storages. torch unpickles it with the
few functions that rebuild tensors (`weights_only`), on tensors without memory; a pickle that needs others is refused.
What it says is then compared with the archive's own table. From there on it is read as any other checkpoint.
"""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash

from streammerge.base.dtypes import DTYPES
from streammerge.base.errors import InputError
from streammerge.storage.checkpoint import INDEX_NAME, Checkpoint, Layout, open_checkpoint, open_directory, open_single
from streammerge.storage.header import Entry, Header

_MAX_PICKLE_BYTES = 100_000_000
_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt"}
# What a zip archive has before each member: signature, version, and 26 bytes later the lengths of name and extra field.
_LOCAL_HEADER = 30
# Some keep the weights in a map of a checkpoint.
_INNER = ("state_dict", "model")


def open_model(path: Path) -> Checkpoint:
    """The checkpoint at `path`: of safetensors where there are any, else of pickled weights. Raises InputError."""
    if path.is_file() and path.suffix in _SUFFIXES:
        return open_single(path, open_pickled)
    if path.is_dir() and not (path / INDEX_NAME).exists() and not any(path.glob("*.safetensors")):
        layout = Layout("pytorch_model.bin.index.json", "pytorch_model.bin", "pytorch_model-*.bin", open_pickled)
        checkpoint = open_directory(path, layout)
        if checkpoint is not None:
            return checkpoint
    return open_checkpoint(path)


class _Refused(Exception):
    """Why a file is refused; becomes an InputError that names it."""


def open_pickled(path: Path) -> tuple[Header, os.stat_result]:
    """Where the tensors of a file of torch.save lie, and the file's status. Raises InputError, naming the file."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            try:
                places, table = _members(file)
            except (zipfile.BadZipFile, ValueError, OverflowError, NotImplementedError) as error:
                raise _Refused(
                    f"it is no archive of torch.save since 1.6 ({error}); load it and save it again"
                ) from None
        entries = tuple(sorted(_entries(path, places), key=lambda entry: (entry.start, entry.stop, entry.name)))
    except _Refused as refused:
        raise InputError(f"{path}: not usable as pickled weights: {refused}.") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}.") from error
    return Header(entries, {}, 0, table), status


def _members(file: Any) -> tuple[dict[int, int], str]:
    """The size of the data of every member by where it begins, and a fingerprint of the archive."""
    places: dict[int, int] = {}
    hashing = xxhash.xxh3_128()
    with zipfile.ZipFile(file) as archive:
        pickles = [info for info in archive.infolist() if info.filename.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise _Refused("it holds no data.pkl")
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
                raise _Refused(f"its member {info.filename!r} is compressed or encrypted")
            file.seek(info.header_offset)
            local = file.read(_LOCAL_HEADER)
            lengths = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
            begin = info.header_offset + _LOCAL_HEADER + lengths
            places[begin] = info.file_size
            hashing.update(repr((info.filename, begin, info.file_size, info.CRC)).encode("utf-8", "surrogatepass"))
            if info.filename.rpartition("/")[2] == "byteorder" and archive.read(info) != b"little":
                raise _Refused("its numbers are big-endian")
        if pickles[0].file_size > _MAX_PICKLE_BYTES:
            raise _Refused(f"its pickle has {pickles[0].file_size} bytes; {_MAX_PICKLE_BYTES} are allowed")
        hashing.update(archive.read(pickles[0]))
    return places, hashing.hexdigest()


def _entries(path: Path, places: Mapping[int, int]) -> Iterator[Entry]:
    """The tensors that the pickle names, each within the member that holds it."""
    import torch

    names = {getattr(torch, dtype.torch_name): dtype.name for dtype in DTYPES.values() if dtype.torch_name}
    for name, tensor in _load(path).items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise _Refused(f"its entry {str(name)[:100]!r} is a {type(tensor).__name__}, not a tensor with a name")
        dtype = names.get(tensor.dtype)
        altered = tensor.is_neg() or tensor.is_conj()
        if dtype is None or tensor.layout != torch.strided or tensor.is_quantized or altered:
            raise _Refused(f"its tensor {name!r} is of {tensor.dtype}, {tensor.layout}, which cannot be merged")
        if not tensor.is_contiguous():
            raise _Refused(f"its tensor {name!r} has the strides {tensor.stride()}; save a contiguous copy of it")
        size = tensor.element_size()
        nbytes = math.prod(tensor.shape) * size
        storage = tensor.untyped_storage()
        begin: int | None = getattr(storage, "_checkpoint_offset", None)
        start = int(tensor.storage_offset()) * size
        if nbytes and (start < 0 or start + nbytes > places.get(-1 if begin is None else begin, 0)):
            raise _Refused(f"its tensor {name!r} does not lie within what the archive holds of it")
        yield Entry(name, dtype, tuple(tensor.shape), (begin or 0) + start, (begin or 0) + start + nbytes)


def _load(path: Path) -> Mapping[Any, Any]:
    """The map of tensors in a file, on tensors that have no memory."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with FakeTensorMode():
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 - a pickle can make torch raise anything, and has run nothing
        lines = str(error).strip().splitlines() or [type(error).__name__]
        found = next((line.strip() for line in lines if "Unsupported" in line or "GLOBAL" in line), lines[0])
        raise _Refused(f"its pickle asks for more than tensors ({found[:200]})") from None
    if not isinstance(content, Mapping):
        raise _Refused(f"it holds a {type(content).__name__}, not a map of tensors")
    for key in _INNER:
        if isinstance(content.get(key), Mapping):
            return dict(content[key])
    return content
