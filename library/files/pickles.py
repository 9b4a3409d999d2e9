"""Torch checkpoints (.ckpt, .pt, .bin) read without executing anything in them.

A pickle is a program that names functions and calls them. Here no name ever resolves to anything real: the few
functions that rebuild tensors are replaced by ones that note where the tensor lies, and every other name becomes an
inert stub. So the file of an old Lightning run loads without Lightning, and a malicious file does nothing.

Formats: torch/serialization.py, `_save` (a zip archive, since torch 1.6) and `_legacy_save`.
"""

from __future__ import annotations

import logging
import math
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeGuard

from library.errors import UserError
from library.files.tensors import ITEM_SIZE, TensorEntry, WeightsIndex

logger = logging.getLogger(__name__)

_STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool",
}  # fmt: skip
_COMMAND_MODULES = frozenset(
    ("os", "posix", "nt", "subprocess", "sys", "socket", "shutil", "runpy", "pty", "importlib", "ctypes", "webbrowser")
)
_CODE_FUNCTIONS = frozenset(("eval", "exec", "execfile", "compile", "open", "__import__", "input", "breakpoint"))
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


# A pickle can alter any object that has a __dict__ or a __setstate__ of its own: these have neither.
class _Storage(NamedTuple):
    key: str
    dtype: str
    length: int  # elements
    shift: int  # the element at which a view begins (legacy format only)


class _Tensor(NamedTuple):
    storage: object
    start: object
    shape: object
    stride: object


class _StorageType(NamedTuple):
    dtype: str


class _Stub:
    """Stands for any object of the file that is not a tensor. Accepts any use and does nothing."""

    def __new__(cls, *_args: object, **_kwargs: object) -> _Stub:
        return super().__new__(cls)

    def __init__(self, *_args: object, **_kwargs: object) -> None: ...

    def __call__(self, *_args: object, **_kwargs: object) -> _Stub:
        return _Stub()

    def __setstate__(self, _state: object) -> None: ...

    def __setitem__(self, _key: object, _value: object) -> None: ...

    def append(self, _item: object) -> None: ...

    def extend(self, _items: object) -> None: ...

    def add(self, _item: object) -> None: ...


class _Dict(dict[object, object]):
    """Stands for OrderedDict."""

    __slots__ = ()

    def __setstate__(self, _state: object) -> None: ...


class _RebuildTensor:
    """Stands for torch._utils._rebuild_tensor, …_v2 and …_v3, whose first four arguments are the same."""

    __slots__ = ()  # nothing that a pickle could set

    def __call__(self, storage: object, start: object, shape: object, stride: object, *_rest: object) -> _Tensor:
        return _Tensor(storage, start, shape, stride)


class _RebuildParameter:
    """Stands for torch._utils._rebuild_parameter and …_with_state: returns the parameter's data only."""

    __slots__ = ()

    def __call__(self, data: object, *_rest: object) -> object:
        return data


_KNOWN: dict[str, Callable[[], object]] = {
    "collections.OrderedDict": lambda: _Dict,
    "torch._utils._rebuild_tensor": _RebuildTensor,
    "torch._utils._rebuild_tensor_v2": _RebuildTensor,
    "torch._utils._rebuild_tensor_v3": _RebuildTensor,
    "torch._utils._rebuild_parameter": _RebuildParameter,
    "torch._utils._rebuild_parameter_with_state": _RebuildParameter,
}


class _InertUnpickler(pickle.Unpickler):
    """Resolves every name to a stand-in; notes foreign names in `foreign`, the storages' element types in `dtypes`."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="utf-8", errors="replace")
        self.foreign: set[str] = set()
        self.dtypes: dict[str, str] = {}

    def find_class(self, module: str, name: str) -> object:
        full = f"{module}.{name}"
        if full in _KNOWN:
            return _KNOWN[full]()
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _StorageType(_STORAGES[name])
        if module.split(".")[0] not in ("torch", "numpy", "_codecs"):  # sizes, dtypes and numbers are nothing to report
            self.foreign.add(full)
        return type("Stub", (_Stub,), {})

    def persistent_load(self, pid: object) -> object:
        """("storage", type, key, device, number of elements[, view]), as both formats name a storage."""
        if not isinstance(pid, tuple):
            return _Stub  # the legacy format also refers to the classes of pickled modules
        try:
            tag, kind, key, _device, count, *view = pid
            shift = view[0][1] if view and view[0] is not None else 0
        except (TypeError, ValueError, IndexError, KeyError):
            return _Stub
        known = tag == "storage" and type(kind) is _StorageType and type(key) is str
        if not (known and _are_naturals((count, shift))):
            return _Stub  # an element type that no weight has: an error if one has it
        self.dtypes[key] = kind.dtype
        return _Storage(key, kind.dtype, count, shift)


def read_pickle_index(path: Path) -> WeightsIndex:
    """The weights in a torch checkpoint of either format: those under "state_dict" if there is one, else at the top.

    Raises UserError if the file is damaged, is no torch checkpoint, or has no weights.
    """
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"PK"
            file.seek(0)
            if zipped:
                content, positions, foreign = _read_zip(file)
            else:
                content, positions, foreign = _read_legacy(file)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle can fail in any way
        raise UserError(f"{path}: damaged, or no torch checkpoint ({type(error).__name__}: {error})") from None
    if hostile := {name for name in foreign if _runs_commands(name)}:
        raise UserError(
            f"{path}: names {_few(hostile)}, which no model needs and which programs that open such files carelessly "
            "would execute: delete the file. Nothing in it was executed"
        )
    if foreign:
        logger.info("%s names foreign classes or functions, which are not executed: %s", path, _few(foreign))
    weights = content.get("state_dict", content) if isinstance(content, dict) else None
    tensors = {k: v for k, v in weights.items() if type(v) is _Tensor} if isinstance(weights, dict) else {}
    tensors = tensors or _of_the_web_ui(content)
    if not tensors:
        others = f", but objects of {_few(foreign)}" if foreign else ""
        raise UserError(f"{path}: holds no table of weights{others}")
    size = path.stat().st_size
    entries = {str(name): _entry(path, str(name), tensor, positions, size) for name, tensor in tensors.items()}
    return WeightsIndex(path, entries, {})


def _of_the_web_ui(content: object) -> dict[str, _Tensor]:
    """The tensors of A1111's embeddings, {"string_to_param": {"*": tensor}}, and hypernetworks, {width: (layers, …)}.

    They are read only so that such files can be recognised."""
    if not isinstance(content, dict):
        return {}
    tables = [("string_to_param", content.get("string_to_param"))]
    for width, halves in content.items():
        if type(width) is int and isinstance(halves, tuple):
            tables += [(f"{width}.{number}", half) for number, half in enumerate(halves)]
    return {
        f"{name}.{key}": tensor
        for name, table in tables
        if isinstance(table, dict)
        for key, tensor in table.items()
        if type(tensor) is _Tensor
    }


def _read_zip(file: BinaryIO) -> tuple[object, Callable[[str], int], set[str]]:
    """The unpickled content, a function from a storage's key to its byte position, and the foreign names."""
    archive = zipfile.ZipFile(file)
    members = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in members if name.endswith("data.pkl")]
    if len(pickles) != 1:
        raise UserError("a zip archive, but not one that torch wrote")
    root = pickles[0][: -len("data.pkl")]
    if any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
        raise UserError("a compressed archive; torch writes uncompressed ones: load it and save it again with torch")
    if f"{root}byteorder" in members and archive.read(f"{root}byteorder") != b"little":
        raise UserError("written on a big-endian machine, which is not supported")
    with archive.open(pickles[0]) as stream:
        unpickler = _InertUnpickler(stream)  # type: ignore[arg-type]
        content = unpickler.load()
    positions: dict[str, int] = {}
    for name, info in members.items():
        if name.startswith(f"{root}data/"):
            file.seek(info.header_offset + 26)  # the local header: 30 bytes, a name and an extra field of own lengths
            name_length, extra_length = struct.unpack("<HH", file.read(4))
            positions[name[len(root) + 5 :]] = info.header_offset + 30 + name_length + extra_length
    return content, positions.__getitem__, unpickler.foreign


def _read_legacy(file: BinaryIO) -> tuple[object, Callable[[str], int], set[str]]:
    """As `_read_zip`, for the format before torch 1.6: five pickles, then each storage as a length and its elements."""
    if _InertUnpickler(file).load() != _LEGACY_MAGIC or _InertUnpickler(file).load() != _LEGACY_PROTOCOL:
        raise UserError("a pickle, but not one that torch wrote")
    system = _InertUnpickler(file).load()
    if not (isinstance(system, dict) and system.get("little_endian") is True):
        raise UserError("written on a big-endian machine, which is not supported")
    unpickler = _InertUnpickler(file)
    content = unpickler.load()
    positions: dict[str, int] = {}
    for key in _InertUnpickler(file).load():
        (count,) = struct.unpack("<q", file.read(8))
        if key not in unpickler.dtypes or count < 0:
            raise UserError("holds elements of a type that is not supported")
        positions[key] = file.tell()
        file.seek(count * ITEM_SIZE[unpickler.dtypes[key]], 1)
    return content, positions.__getitem__, unpickler.foreign


def _entry(path: Path, name: str, tensor: _Tensor, position: Callable[[str], int], size: int) -> TensorEntry:
    """Check the pickle's description of a tensor, which can be arbitrary."""
    storage, start, shape, stride = tensor
    if type(storage) is not _Storage:
        raise UserError(f"{path}: '{name}' has an element type that is not supported")
    if not (_are_naturals(shape) and _are_naturals(stride) and len(shape) == len(stride) and _is_natural(start)):
        raise UserError(f"{path}: damaged: '{name}' has the shape {shape!r} with the strides {stride!r}")
    last = sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) if math.prod(shape) else -1
    try:
        offset = position(storage.key) + (storage.shift + start) * ITEM_SIZE[storage.dtype]
    except KeyError:
        raise UserError(f"{path}: damaged: the elements of '{name}' are missing") from None
    if storage.shift + start + last >= storage.length or offset + (last + 1) * ITEM_SIZE[storage.dtype] > size:
        raise UserError(f"{path}: cut off or damaged: '{name}' reaches beyond its elements")
    rows = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    contiguous = all(n <= 1 or step == row for n, step, row in zip(shape, stride, rows, strict=True))
    return TensorEntry(path, offset, storage.dtype, shape, None if contiguous else stride)


def _runs_commands(name: str) -> bool:
    """Whether a name in a pickle serves to run commands or code; Lightning and others never name these."""
    module, _, function = name.rpartition(".")
    return module.partition(".")[0] in _COMMAND_MODULES or (
        module in ("builtins", "__builtin__") and function in _CODE_FUNCTIONS
    )


def _is_natural(value: object) -> TypeGuard[int]:
    return type(value) is int and value >= 0


def _are_naturals(value: object) -> TypeGuard[tuple[int, ...]]:
    return isinstance(value, tuple) and all(map(_is_natural, value))


def _few(names: set[str]) -> str:
    """The first names, those of other packages before those of Python itself."""
    listed = sorted(names, key=lambda name: (name.split(".")[0] in sys.stdlib_module_names, name))
    return ", ".join(listed[:4]) + (f" and {len(listed) - 4} more" if len(listed) > 4 else "")
