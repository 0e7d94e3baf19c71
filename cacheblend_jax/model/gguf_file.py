"""GGUF files: their metadata and where their tensors lie, with every count and size checked before it is believed."""

from __future__ import annotations

import math
import mmap
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from cacheblend_jax.errors import CheckpointError, one_line
from cacheblend_jax.model.config_fields import shown

SUFFIX, MAGIC, VERSIONS = ".gguf", b"GGUF", (2, 3)
INSTALL = "pip install 'cacheblend-jax[gguf]'"
QUANTISATIONS = tuple("F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K".split())
FLOATS = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
# By the format's number of a type. Text (8) and arrays (9) have no fixed size.
SCALARS = dict(enumerate("B b H h I i f ? - - Q q d".split()))
TEXT, ARRAY = 8, 9
# The least bytes that a key with its value takes, a tensor's description, and a text.
PAIR_BYTES, TENSOR_BYTES, TEXT_BYTES = 13, 32, 8
MAX_DIMENSIONS, MAX_SIZE, MAX_ALIGNMENT, MAX_PARTS = 4, 2**40, 2**20, 10_000
PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


class StoredTensor(NamedTuple):
    """A tensor as it lies in a file: `shape` has the longest stride first, as in numpy."""

    path: Path
    quantisation: str
    shape: tuple[int, ...]
    offset: int
    row_bytes: int

    @property
    def end(self) -> int:
        """Where its bytes end."""
        return self.offset + math.prod(self.shape[:-1]) * self.row_bytes


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file, or all parts of one: values of `metadata` are Python scalars, text, lists of text and arrays."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


def is_gguf(path: Path) -> bool:
    """Returns whether a path is to be read as GGUF: by its name or, since Ollama names no format, by how it begins."""
    if path.suffix.lower() == SUFFIX:
        return not os.path.isdir(path)
    try:
        if not os.path.isfile(path):
            return False
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_gguf(path: Path) -> GgufFile:
    """Reads a file's header, and those of the other parts where it is one of several.

    Raises:
        CheckpointError: the package `gguf` or a part is missing, or a file is damaged or holds what isn't supported.
    """
    parts = _part_paths(path)
    files = [_read_part(part) for part in parts]
    count = files[0].metadata.get("split.count", 0)
    if count not in (0, len(files)):
        raise CheckpointError(
            f"{path} is one of {shown(count)} parts; their names must end in -00001-of-{len(files):05}.gguf and so on"
        )
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        if twice := tensors.keys() & file.tensors.keys():
            raise CheckpointError(f"{file.path} holds the tensor {min(twice)}, which another part holds, too")
        tensors |= file.tensors
    wanted = files[0].metadata.get("split.tensors.count", len(tensors))
    if wanted != len(tensors):
        raise CheckpointError(f"{path}: its parts should hold {shown(wanted)} tensors, they hold {len(tensors)}")
    return GgufFile(files[0].path, files[0].metadata, tensors)


def _part_paths(path: Path) -> list[Path]:
    """Returns the paths of all parts, the first one first."""
    match = PART.fullmatch(path.name)
    if match is None:
        return [path]
    stem, count = match[1], int(match[3])
    if not 1 <= count <= MAX_PARTS:
        raise CheckpointError(f"{path}: the number of parts must be in [1, {MAX_PARTS}], got {count}")
    parts = [path.with_name(f"{stem}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    for part in parts:
        if not part.is_file():
            raise CheckpointError(f"{part} is missing: the model is in {count} parts, all in one directory")
    return parts


def _read_part(path: Path) -> GgufFile:
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Header(path, content).read()
    except (OSError, ValueError) as error:  # an empty file can't be mapped
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is not a readable GGUF file: {one_line(error)}") from error


class _Header:
    """Reads a header from its beginning on."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self._path, self._content, self._size, self._at = path, content, len(content), 0

    def read(self) -> GgufFile:
        """Returns the file that the header describes."""
        if self._bytes(4) != MAGIC:
            raise self._damaged("it does not begin with GGUF")
        version = self._scalar("I")
        if version not in VERSIONS:
            raise self._damaged(f"its version must be one of {VERSIONS}, got {version} (of the other byte order?)")
        tensor_count, pair_count = self._scalar("Q"), self._scalar("Q")
        self._check_count("tensors", tensor_count, TENSOR_BYTES)
        self._check_count("keys", pair_count, PAIR_BYTES)
        metadata: dict[str, Any] = {}
        for _ in range(pair_count):
            key = self._text()
            if key in metadata:
                raise self._damaged(f"it has the key {shown(key)} twice")
            metadata[key] = self._value(self._scalar("I"))
        tensors = self._tensors(tensor_count, metadata.get("general.alignment", 32))
        return GgufFile(self._path, metadata, tensors)

    def _tensors(self, count: int, alignment: object) -> dict[str, StoredTensor]:
        if not isinstance(alignment, int) or not 1 <= alignment <= MAX_ALIGNMENT:
            raise self._damaged(f"general.alignment must be in [1, {MAX_ALIGNMENT}], got {shown(alignment)}")
        described: dict[str, StoredTensor] = {}
        for _ in range(count):
            name, tensor = self._tensor()
            if name in described:
                raise self._damaged(f"it has the tensor {shown(name)} twice")
            described[name] = tensor
        begin = -(-self._at // alignment) * alignment
        tensors = {name: tensor._replace(offset=begin + tensor.offset) for name, tensor in described.items()}
        for name, tensor in tensors.items():
            if tensor.end > self._size:
                raise self._damaged(f"{shown(name)} ends at byte {tensor.end} of {self._size}: it is cut off")
        return tensors

    def _tensor(self) -> tuple[str, StoredTensor]:
        name, dimensions = self._text(), self._scalar("I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise self._damaged(f"{shown(name)} must have 1 to {MAX_DIMENSIONS} dimensions, got {dimensions}")
        shape = tuple(self._scalar("Q") for _ in range(dimensions))[::-1]
        if min(shape) < 1 or math.prod(shape) > MAX_SIZE:
            raise self._damaged(f"{shown(name)} has the shape {list(shape)}")
        kind, offset = self._scalar("I"), self._scalar("Q")
        quantisation, block, block_bytes = self._quantisation(name, kind)
        if shape[-1] % block:
            raise self._damaged(f"{shown(name)}: rows of {shape[-1]} are no multiple of {quantisation}'s {block}")
        return name, StoredTensor(self._path, quantisation, shape, offset, shape[-1] // block * block_bytes)

    def _quantisation(self, name: str, kind: int) -> tuple[str, int, int]:
        gguf = _gguf_package(self._path)
        try:
            found = gguf.GGMLQuantizationType(kind)
        except ValueError:
            found = None
        if found is None or found.name not in QUANTISATIONS:
            quantisation = f"number {kind}" if found is None else found.name
            raise CheckpointError(
                f"{self._path}: quantisation {quantisation} of {shown(name)} is not supported; "
                f"supported: {', '.join(QUANTISATIONS)}"
            )
        return found.name, *gguf.GGML_QUANT_SIZES[found]

    def _value(self, kind: int) -> Any:
        if kind == TEXT:
            return self._text()
        if kind == ARRAY:
            return self._array()
        return self._scalar(self._format(kind))

    def _array(self) -> Any:
        kind, count = self._scalar("I"), self._scalar("Q")
        if kind == TEXT:
            self._check_count("texts", count, TEXT_BYTES)
            return [self._text() for _ in range(count)]
        dtype = np.dtype(self._format(kind)).newbyteorder("<")
        self._check_count("numbers", count, dtype.itemsize)
        return np.frombuffer(self._bytes(count * dtype.itemsize), dtype)

    def _format(self, kind: int) -> str:
        if SCALARS.get(kind, "-") == "-":  # arrays of arrays are in the format, and in no model
            raise self._damaged(f"a value has the type {kind}")
        return SCALARS[kind]

    def _scalar(self, kind: str) -> Any:
        return struct.unpack("<" + kind, self._bytes(struct.calcsize("<" + kind)))[0]

    def _text(self) -> str:
        return self._bytes(self._scalar("Q")).decode("utf-8")

    def _bytes(self, count: int) -> bytes:
        if count > self._size - self._at:
            raise self._damaged(f"it has {self._size} bytes, its header asks for more: it is cut off")
        self._at += count
        return self._content[self._at - count : self._at]

    def _check_count(self, what: str, count: int, least_bytes: int) -> None:
        if count > (self._size - self._at) // least_bytes:
            raise self._damaged(f"its header counts {count} {what}, more than its {self._size} bytes can hold")

    def _damaged(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self._path} is not a readable GGUF file: {reason}")


def _gguf_package(path: Path) -> Any:
    try:
        import gguf
    except ImportError:
        raise CheckpointError(f"{path} needs the package gguf: install it with {INSTALL}") from None
    return gguf


def dequantised(tensor: StoredTensor, rows: np.ndarray) -> np.ndarray:
    """Returns the values of some of a tensor's rows, given their bytes `[rows, row_bytes]`.

    In the dtype that they are stored in; quantised ones in float32.
    """
    if tensor.quantisation in FLOATS:
        return np.ascontiguousarray(rows).view(FLOATS[tensor.quantisation])
    gguf = _gguf_package(tensor.path)
    # As one row: the package takes 16 rows at a time, each time by a dozen small steps.
    values = gguf.dequantize(rows.reshape(1, -1), gguf.GGMLQuantizationType[tensor.quantisation])
    return values.reshape(len(rows), -1)
