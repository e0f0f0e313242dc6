"""torch.save's zip archives, in a file or in a part of one: their tree, and tensors of which rows are read when they are asked for."""

import io
import math
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from gigatrain.errors import CheckpointError
from gigatrain.importing.opcodes import Known, Name, Record, read

_DTYPES = {
    "Double": torch.float64, "Float": torch.float32, "BFloat16": torch.bfloat16, "Half": torch.float16, "Long": torch.int64, "Int": torch.int32,
    "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool,
}  # fmt: skip
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _DTYPES.values()}
# Classes that other systems keep beside the tensors: their attributes are read as data or passed over.
RECORDS = (
    "argparse.Namespace",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
    "deepspeed.runtime.bf16_optimizer.BF16_Optimizer",
    "torch.utils._pytree.TreeSpec",
)


@dataclass(frozen=True)
class Bytes:
    """A storage: `count` elements of `dtype` from byte `at` of a file on."""

    path: Path
    at: int
    count: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Stored:
    """A tensor of an archive: a view of a storage, checked to lie within it."""

    storage: Bytes
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Of its elements."""
        return self.storage.dtype

    @property
    def contiguous(self) -> bool:
        """Whether rows follow one another."""
        expected = 1
        for size, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and step != expected:
                return False
            expected *= size
        return True

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows along dim 0, all of a scalar."""
        if not self.contiguous:
            last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
            flat = _elements(self.storage, self.offset, last + 1)
            return flat.as_strided(self.shape, self.stride)[start:stop]
        if not self.shape:
            return _elements(self.storage, self.offset, 1).view(())
        row = math.prod(self.shape[1:])
        return _elements(self.storage, self.offset + start * row, (stop - start) * row).view(stop - start, *self.shape[1:])

    def flat(self, start: int, count: int) -> Tensor:
        """Elements of a contiguous tensor, in its order."""
        if not self.contiguous or start + count > math.prod(self.shape):
            raise CheckpointError(
                f"{self.storage.path} holds a tensor of {list(self.shape)} of which {count} elements from {start} are needed"
            )
        return _elements(self.storage, self.offset + start, count)


def _elements(storage: Bytes, start: int, count: int) -> Tensor:
    data = torch.empty(count * storage.dtype.itemsize, dtype=torch.uint8)
    with storage.path.open("rb") as file:
        file.seek(storage.at + start * storage.dtype.itemsize)
        if file.readinto(data.numpy().data) != len(data):
            raise CheckpointError(f"{storage.path} is cut short")
    return data.view(storage.dtype)


def opened(path: Path, at: int = 0, length: int | None = None) -> Any:
    """The tree of an archive that is all of a file, or `length` bytes of it from `at` on. Raises CheckpointError for whatever it should not hold."""
    try:
        with path.open("rb") as file:
            whole = file.seek(0, io.SEEK_END)
            length = whole - at if length is None else length
            if at < 0 or length < 0 or at + length > whole:
                raise CheckpointError(f"{path} has {whole} bytes, and something in bytes {at} to {at + length} is asked for")
            return _read(file, path, at, length)
    except OSError as failure:
        raise CheckpointError(f"{path} cannot be read: {failure.strerror}") from None
    except (zipfile.BadZipFile, struct.error, NotImplementedError, EOFError, UnicodeDecodeError) as failure:
        raise CheckpointError(
            f"{path} is no archive of torch.save ({failure}); files from before torch 1.6 and other pickles are refused: save it again with a newer torch"
        ) from None


def _read(file: BinaryIO, path: Path, at: int, length: int) -> Any:
    with zipfile.ZipFile(_Part(file, at, length)) as archive:  # type: ignore[arg-type]
        entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if len(entries) != len(archive.infolist()):
            raise CheckpointError(f"{path} holds an entry twice")
        if bad := [info.filename for info in entries.values() if info.compress_type != zipfile.ZIP_STORED or info.file_size > length]:
            raise CheckpointError(f"{path}: {bad[0]} is compressed, which torch.save never does")
        if "data.pkl" not in entries:
            raise CheckpointError(f"{path} is a zip archive and none of torch.save: it has no data.pkl")
        if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
            raise CheckpointError(f"{path} is of a big-endian machine; save it again on another")
        data = archive.read(entries["data.pkl"])

    def storage(key: Any) -> Bytes:
        kind, dtype, name, _, count = key
        info = entries.get(f"data/{name}")
        if kind != "storage" or not isinstance(dtype, torch.dtype) or info is None:
            raise CheckpointError(f"{path} names a storage that it does not hold: {str(name)[:80]}")
        file.seek(at + info.header_offset)
        header = file.read(30)
        if header[:4] != b"PK\3\4":
            raise CheckpointError(f"{path}: {info.filename} is not where the archive says")
        begins = at + info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        if type(count) is not int or count * dtype.itemsize > info.file_size or begins + info.file_size > at + length:
            raise CheckpointError(f"{path}: {info.filename} has {info.file_size} bytes, less than its {count} elements of {dtype}")
        return Bytes(path, begins, count, dtype)

    return read(data, _known(storage), f"{path}")


class _Part(io.RawIOBase):
    """`length` bytes of a file from `at` on, as a file."""

    def __init__(self, file: BinaryIO, at: int, length: int) -> None:
        self.file, self.start, self.length, self.position = file, at, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.length}[whence]
        if base + offset < 0:
            raise OSError(22, "before the beginning")
        self.position = base + offset
        return self.position

    def tell(self) -> int:
        return self.position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.length - self.position)
        self.file.seek(self.start + self.position)
        data = self.file.read(left if size < 0 else min(size, left))
        self.position += len(data)
        return data


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> Stored:
    if not isinstance(storage, Bytes) or not isinstance(shape, tuple) or not isinstance(stride, tuple):
        raise ValueError("a tensor of no storage")
    if len(shape) != len(stride) or len(shape) > 64 or any(type(n) is not int or n < 0 for n in (offset, *shape, *stride)):
        raise ValueError("a tensor of no shape")
    elements = math.prod(shape)
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if elements else offset
    if elements and (last >= storage.count or elements > storage.count):
        raise ValueError(f"a tensor of {list(shape)} that reaches beyond its storage of {storage.count} elements")
    return Stored(storage, offset, shape, stride)


def _ordered(*items: Any) -> dict[Any, Any]:
    return dict(items[0]) if items else {}


def _known(storage: Callable[[Any], Any] | None) -> Known:
    reduce: dict[Name, Callable[..., Any]] = {
        Name("collections", "OrderedDict"): _ordered,
        Name("collections", "defaultdict"): lambda *_: {},
        Name("torch._utils", "_rebuild_tensor_v2"): _tensor,
        Name("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
        Name("torch._utils", "_rebuild_parameter_with_state"): lambda data, *_: data,
        Name("torch", "Size"): tuple,
        Name("torch", "device"): lambda kind, *index: str(kind),
        Name("torch.serialization", "_get_layout"): str,
        Name("pathlib", "PosixPath"): lambda *parts: "/".join(str(part) for part in parts),
        Name("pathlib._local", "PosixPath"): lambda *parts: "/".join(str(part) for part in parts),
    }

    def of_type(rebuild: Any, kind: Any, made_of: Any, _: Any) -> Any:
        """A parameter with attributes, as ZeRO-3 saves them: the tensor alone."""
        if rebuild not in (Name("torch._utils", "_rebuild_tensor_v2"), Name("torch._utils", "_rebuild_parameter")) or not isinstance(
            made_of, tuple
        ):
            raise ValueError(f"a {kind} made by {rebuild}")
        return reduce[rebuild](*made_of)

    reduce[Name("torch._tensor", "_rebuild_from_type_v2")] = of_type
    values: dict[Name, Any] = {Name("torch", f"{kind}Storage"): dtype for kind, dtype in _DTYPES.items()}
    values |= {Name("torch", name): dtype for name, dtype in DTYPES.items()}
    values |= {Name("torch.nn.parameter", "Parameter"): Record("Parameter"), Name("torch", "Tensor"): Record("Tensor")}
    values |= {Name("builtins", kind): Record(kind) for kind in ("int", "float", "dict", "list")}  # of a defaultdict
    records = frozenset(Name(*name.rsplit(".", 1)) for name in (*RECORDS, *METADATA))
    return Known(reduce, records, values, storage)


_DCP = "torch.distributed.checkpoint"
METADATA = (
    *(
        f"{_DCP}.metadata.{name}"
        for name in (
            "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "BytesStorageMetadata", "MetadataIndex", "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    f"{_DCP}.filesystem._StorageInfo",
    f"{_DCP}.filesystem._StoragePrefix",
)  # fmt: skip


def plain(data: bytes, where: str) -> Any:
    """A pickle without tensors: DCP's .metadata."""
    return read(data, _known(None), where)
