"""A safe reader of the archives that `torch.save` writes: it never calls what they name.

Such an archive is a zip file of one pickle and one record of bytes per storage. The pickle is a program; only the
operations that build plain values and tensors are carried out here, and no size it states is believed beyond its
record's.
"""

import os
import pickletools
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

DIRECTORY_BYTES = 64 * 2**20  # of the list of records: some 500,000 tensors
PIECE_BYTES = 2**20
OPERATIONS = 10**6  # of the pickle: some 40,000 tensors
DEPTH = 64  # of values in values
DTYPES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexDouble": torch.complex128,
    "ComplexFloat": torch.complex64,
}


class UnsafeArchive(ValueError):
    """The archive holds, or asks for, something other than plain values and tensors."""


class DamagedArchive(ValueError):
    """The archive is cut off or altered, or the file is not an archive."""


class Name(NamedTuple):
    """A class or function that the pickle names; it is never looked up."""

    name: str


class Storage(NamedTuple):
    """The numbers of one record."""

    numbers: Tensor


ORDERED_DICT, REBUILD = Name("collections OrderedDict"), Name("torch._utils _rebuild_tensor_v2")


def read(path: Path) -> Any:
    """The value that `torch.save` wrote: dicts, lists, tuples, strings, numbers, booleans, None and CPU tensors.

    An OrderedDict comes back as a dict. Raises OSError if there is no such file, Damaged or Refused for what it holds.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        _check_directory(file, size)
        try:
            with zipfile.ZipFile(file) as archive:
                return _Reader(archive, size).value()
        except (UnsafeArchive, DamagedArchive):
            raise
        except (zipfile.BadZipFile, EOFError, struct.error, NotImplementedError) as error:
            raise DamagedArchive(str(error) or "it is cut off") from error
        except (IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise UnsafeArchive(f"its pickle is not one that torch.save writes, {type(error).__name__}") from error


def _check_directory(file: BinaryIO, size: int) -> None:
    """Raise Damaged unless the file ends as torch.save ends one, with a list of records of bearable size."""
    file.seek(max(size - 42, 0))
    end = file.read(42)  # and no more, for a device has no end
    if len(end) < 22 or end[-22:-18] != b"PK\x05\x06" or end[-2:] != b"\0\0":
        raise DamagedArchive("it does not end as a zip file does")
    length = struct.unpack("<L", end[-10:-6])[0]
    if end[-42:-38] == b"PK\x06\x07":  # the end of a large archive stands at another place
        file.seek(struct.unpack("<Q", end[-34:-26])[0])
        large = file.read(56)
        length = struct.unpack("<Q", large[40:48])[0] if len(large) == 56 else sys.maxsize
    if length > DIRECTORY_BYTES:
        raise DamagedArchive(f"its list of records has {length} bytes")


class _Reader:
    """One archive, its records checked against the size of the file before any is read."""

    def __init__(self, archive: zipfile.ZipFile, size: int):
        records = archive.infolist()
        for record in records:
            if record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1:
                raise UnsafeArchive(f"{record.filename} is compressed, and torch.save compresses nothing")
        if sum(record.file_size for record in records) > size:
            raise UnsafeArchive(f"its records claim more bytes than the file's {size}")
        self.archive, self.records = archive, {record.filename: record for record in records}
        if len(self.records) != len(records):
            raise UnsafeArchive("it has two records of one name")
        pickles = [name for name in self.records if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise DamagedArchive("it has no data.pkl")
        self.root = pickles[0].removesuffix("data.pkl")
        self.storages: dict[str, Storage] = {}

    def value(self) -> Any:
        order = f"{self.root}byteorder"
        if order in self.records and self.archive.read(order).decode() != sys.byteorder:
            raise UnsafeArchive("its numbers are stored in another byte order than this machine's")
        program = self.archive.read(f"{self.root}data.pkl")
        return _check_nesting(self.run(program), len(program))

    def run(self, program: bytes) -> Any:
        """Carry out the pickle. Raises UnsafeArchive at the first thing in it that is more than data."""
        stack: list[Any] = []
        marks: list[int] = []
        memo: dict[int, Any] = {}

        def since_mark() -> list[Any]:
            at = marks.pop()
            items = stack[at:]
            del stack[at:]
            return items

        argument: Any
        for i, (operation, argument, _) in enumerate(pickletools.genops(program)):
            name = operation.name
            if i > OPERATIONS:
                raise UnsafeArchive(f"its pickle has more than {OPERATIONS:,} operations")
            if name in _VALUES:
                stack.append(argument)
            elif name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name == "EMPTY_DICT":
                stack.append({})
            elif name == "EMPTY_LIST":
                stack.append([])
            elif name == "MARK":
                marks.append(len(stack))
            elif name == "TUPLE":
                stack.append(tuple(since_mark()))
            elif name in _TUPLES:
                n = _TUPLES[name]
                stack[-n:] = [tuple(stack[-n:])]
            elif name in ("SETITEM", "SETITEMS"):
                items = since_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
                _check_type(stack[-1], dict)
                for key, value in zip(items[::2], items[1::2], strict=True):
                    if type(key) not in (str, int):  # a tuple of tuples may take for ever to hash
                        raise UnsafeArchive(f"a dict has a key that is a {type(key).__name__}")
                    stack[-1][key] = value
            elif name in ("APPEND", "APPENDS"):
                items = since_mark() if name == "APPENDS" else [stack.pop()]
                _check_type(stack[-1], list)
                stack[-1].extend(items)
            elif name == "GLOBAL":
                stack.append(_resolve_name(argument))
            elif name == "BINPERSID":
                stack.append(self.storage(*_check_type(stack.pop(), tuple)))
            elif name == "REDUCE":
                arguments, function = _check_type(stack.pop(), tuple), stack.pop()
                stack.append(self.call(function, arguments))
            elif name == "BUILD":  # of the attributes of an OrderedDict, versions of modules, nothing is kept
                stack.pop()
                _check_type(stack[-1], dict)
            elif name == "STOP":
                return stack.pop()
            elif name != "PROTO":
                raise UnsafeArchive(f"its pickle uses {name}")
        raise DamagedArchive("its pickle is cut off")

    def call(self, function: object, arguments: tuple) -> Any:
        if function == ORDERED_DICT and not arguments:
            return {}
        if function == REBUILD and len(arguments) == 6:
            return _tensor(*arguments[:4])
        raise UnsafeArchive(f"it calls {function.name if type(function) is Name else type(function).__name__}")

    def storage(self, kind: object, dtype: object, key: object, location: object, numel: object) -> Storage:
        if kind != "storage" or type(dtype) is not Name or type(key) is not str or type(numel) is not int:
            raise UnsafeArchive("it refers to something other than the numbers of a tensor")
        of = DTYPES[dtype.name.removeprefix("torch ").removesuffix("Storage")]
        record = self.records[f"{self.root}data/{key}"]
        if key not in self.storages:
            if record.file_size != numel * of.itemsize:
                raise UnsafeArchive(
                    f"record {key} has {record.file_size} bytes, and not the {numel} numbers of a tensor"
                )
            numbers = torch.empty(numel, dtype=of)
            array: Any = numbers.view(torch.uint8).numpy()
            view, at = memoryview(array), 0
            with self.archive.open(record) as file:  # its checksum is compared at its end
                while piece := file.read(PIECE_BYTES):
                    view[at : at + len(piece)] = piece
                    at += len(piece)
            if at != record.file_size:
                raise DamagedArchive(f"record {key} is cut off")
            self.storages[key] = Storage(numbers)
        if self.storages[key].numbers.dtype != of:
            raise UnsafeArchive(f"record {key} is of two kinds of numbers")
        return self.storages[key]


_VALUES = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE")
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _check_type(value: object, kind: type) -> Any:
    if type(value) is not kind:
        raise UnsafeArchive(f"its pickle treats a {type(value).__name__} as a {kind.__name__}")
    return value


def _resolve_name(name: str) -> Name:
    storages = [f"torch {kind}Storage" for kind in DTYPES]
    if name not in (ORDERED_DICT.name, REBUILD.name, *storages):
        raise UnsafeArchive(f"it names {name.replace(' ', '.')}")
    return Name(name)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> Tensor:
    """Return a tensor over a storage. Raises UnsafeArchive if it would have more numbers than that."""
    numbers, sizes = (
        _check_type(storage, Storage).numbers,
        (offset, *_check_type(shape, tuple), *_check_type(strides, tuple)),
    )
    if any(type(n) is not int or not 0 <= n < 2**62 for n in sizes) or len(shape) != len(strides):
        raise UnsafeArchive("a tensor has an invalid size")
    count, last = 1, offset
    for n, stride in zip(shape, strides, strict=True):
        count, last = count * n, last + max(n - 1, 0) * stride
    if count and (count > numbers.numel() or last >= numbers.numel()):
        raise UnsafeArchive(f"a tensor of shape {list(shape)} lies on {numbers.numel()} numbers")
    return torch.empty(0, dtype=numbers.dtype).set_(numbers.untyped_storage(), offset, shape, strides)


def _check_nesting(value: object, limit: int) -> Any:
    """Return the value. Raises UnsafeArchive if it is nested too deep, or as a tree is larger than the bytes that
    spell it."""
    seen, waiting = 0, [(value, 0)]
    while waiting:
        item, depth = waiting.pop()
        seen += 1
        if depth > DEPTH or seen > limit:
            raise UnsafeArchive("it holds values that hold themselves, or one another without end")
        if isinstance(item, dict):
            waiting.extend((v, depth + 1) for v in item.values())
        elif isinstance(item, list | tuple) and type(item) not in (Name, Storage):
            waiting.extend((v, depth + 1) for v in item)
        elif type(item) is int and not -(2**63) <= item < 2**64:
            raise UnsafeArchive("it holds a number of more than 64 bits")
        elif isinstance(item, Name | Storage):
            raise UnsafeArchive(f"it holds {item[0]} as a value")
    return value
