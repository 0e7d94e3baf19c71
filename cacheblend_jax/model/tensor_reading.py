"""Reading a checkpoint's tensors on the host: checked by their headers, cast, and put where they belong in a leaf."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError

from cacheblend_jax.errors import CheckpointError
from cacheblend_jax.model.config import ModelConfig
from cacheblend_jax.model.fused_tensors import RowsAlone, TensorSource
from cacheblend_jax.model.params import Params
from cacheblend_jax.model.quantised import refuse_quantised_tensors
from cacheblend_jax.model.tensor_names import EMBEDDING, HEAD, OTHER_TOWERS, is_kernel, numbered, stored_name
from cacheblend_jax.runtime.host_buffers import aligned_empty

STORED_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
HEAD_ROWS = 4096  # of embedding and output projection, compared at a time
EXPONENT_BITS = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000, "float64": 0x7FF << 52}
# Elements: what is read, dequantised and cast at a time. So few stay in the processor's cache, in memory that is used
# again and again; for larger blocks the system hands out new memory each time.
COPIED_BLOCK = 2**16
FINITE_BLOCK = 2**16  # elements, so that a block stays in the processor's cache
STRIP = 16  # rows that are transposed at a time, so that the lines they are written to stay in the cache


Share = tuple[slice, ...]  # of an array: a slice of each axis


class Part(NamedTuple):
    """What a tensor of the checkpoint, or each layer's, is in a leaf: so many columns, after those of the part before.

    In `name`, `{}` is the layer, and a second one the expert.
    """

    name: str
    columns: int


def check_tensors(checkpoint: TensorSource, config: ModelConfig, names: Params, wanted: Params) -> None:
    """Checks by the files' headers that they hold each tensor and no others, in the right shapes and dtypes."""
    location, files = checkpoint.location, checkpoint.tensor_files()
    shapes: dict[str, tuple[int, ...]] = {}
    for name, leaf in zip(jax.tree.leaves(names), jax.tree.leaves(wanted), strict=True):
        shape = leaf.shape[name.count("{}") :]
        shape = shape[::-1] if is_kernel(name) else shape
        shapes |= {each: shape for each, _ in numbered(name, leaf.shape)}
    if missing := sorted(shapes.keys() - files.keys()):
        refuse_quantised_tensors(location, sorted(files))
        raise CheckpointError(f"{location}: {len(missing)} tensors are missing, among them {missing[0]}")
    redundant = {stored_name(HEAD, files)} if config.tied_embeddings else set()
    others = files.keys() - shapes - redundant
    if stored_name(EMBEDDING, files) != EMBEDDING:  # a multimodal checkpoint
        others = {name for name in others if not name.startswith(OTHER_TOWERS)}
    if extra := sorted(name for name in others if not name.endswith("rotary_emb.inv_freq")):
        refuse_quantised_tensors(location, extra)
        raise CheckpointError(
            f"{location}: {len(extra)} tensors have no place in {config.architecture}, among them {extra[0]!r}"
        )
    for file, in_file in _by_file(files, shapes):
        with checkpoint.open_tensors(file) as tensors:
            for name in in_file:
                _check_tensor(file, tensors, name, shapes[name])


def _check_tensor(file: Path, tensors: Any, name: str, shape: tuple[int, ...]) -> None:
    try:
        view = tensors.get_slice(name)
    except SafetensorError as error:
        raise CheckpointError(f"{file} lacks the tensor {name}: {error}") from error
    if view.get_dtype() not in STORED_DTYPES:
        raise CheckpointError(f"{file}: {name} has dtype {view.get_dtype()}, which is not supported (float only)")
    if tuple(view.get_shape()) != shape:
        raise CheckpointError(
            f"{file}: {name} has shape {list(view.get_shape())}, the configuration asks for {list(shape)}"
        )


def read_leaf(
    checkpoint: TensorSource,
    parts: tuple[Part, ...],
    leaf: jax.ShapeDtypeStruct,
    advance: Callable[[int], None],
    first: int = 0,
    share: Share | None = None,
) -> np.ndarray:
    """Reads a leaf on the host; of stacked ones, as many layers as it has, from `first` on.

    Args:
        advance: called with the bytes of each tensor.
        share: what to read of a leaf that has but one part; all, where that is `None`.
    """
    whole = tuple(slice(0, size) for size in leaf.shape)
    out = aligned_empty(tuple(each.stop - each.start for each in share or whole), leaf.dtype)
    places: dict[str, _Place] = {}
    begin = 0
    for part in parts:
        place = out if share else out[..., begin : begin + part.columns]
        of_part = share or (*whole[:-1], slice(0, part.columns))
        for name, at in numbered(part.name, leaf.shape, first):
            if all(of.start <= number < of.stop for number, of in zip(at, of_part, strict=False)):
                inside = tuple(number - of.start for number, of in zip(at, of_part, strict=False))
                found = _Place(place[inside], of_part[len(at) :])
                places[name] = found.transposed() if is_kernel(name) else found
        begin += part.columns
    for file, in_file in _by_file(checkpoint.tensor_files(), places):
        # Opened anew for each leaf: the pages that a memory map has touched count as ours until it is closed.
        with checkpoint.open_tensors(file) as tensors:
            for tensor_name in in_file:
                _copy_tensor(file, tensors, tensor_name, *places[tensor_name])
                advance(places[tensor_name].rows.nbytes)
    return out


class _Place(NamedTuple):
    """Where a tensor, or some of it, belongs."""

    rows: np.ndarray
    of_tensor: Share

    def transposed(self) -> _Place:
        return _Place(self.rows.T, self.of_tensor[::-1])


def _by_file(files: dict[str, Path], names: Collection[str]) -> Iterator[tuple[Path, list[str]]]:
    for file in sorted({files[name] for name in names}):
        yield file, [name for name in names if files[name] == file]


def _copy_tensor(file: Path, tensors: Any, name: str, place: np.ndarray, wanted: Share) -> None:
    view = tensors.get_slice(name)
    rows, *columns = wanted
    block = max(1, COPIED_BLOCK * len(place) // place.size)
    for begin in range(0, len(place), block):
        end = min(begin + block, len(place))
        tensor = _read_rows(view, slice(rows.start + begin, rows.start + end), columns)
        if not all_finite(tensor):
            raise CheckpointError(
                f"{file}: {name} holds NaN or infinity; the file is damaged, or its training diverged"
            )
        _write_rows(place[begin : begin + len(tensor)], tensor.astype(place.dtype, copy=False))


def _read_rows(view: Any, rows: slice, columns: list[slice]) -> np.ndarray:
    if all(of.stop - of.start == size for of, size in zip(columns, view.get_shape()[1:], strict=True)):
        return view[rows]
    reads_columns = not isinstance(view, RowsAlone)
    return view[rows, *columns] if reads_columns else view[rows][:, *columns]


def _write_rows(place: np.ndarray, rows: np.ndarray) -> None:
    """Copies rows to where they belong: strip by strip where they are columns in memory, several times as fast."""
    strip = len(rows) if place.flags.c_contiguous else STRIP
    for begin in range(0, len(rows), strip):
        place[begin : begin + strip] = rows[begin : begin + strip]


def all_finite(tensor: np.ndarray) -> bool:
    """Whether no value is infinite or NaN.

    Looks at exponents, block by block: several times as fast as `np.isfinite` for bfloat16, in little memory.
    """
    bits = tensor.reshape(-1).view(f"u{tensor.dtype.itemsize}")
    exponent = EXPONENT_BITS[tensor.dtype.name]
    blocks = (bits[begin : begin + FINITE_BLOCK] for begin in range(0, bits.size, FINITE_BLOCK))
    return all((block & exponent).max() != exponent for block in blocks)


def largest_dtype(checkpoint: TensorSource) -> str:
    """Returns the dtype of the checkpoint's largest tensor: what it is stored in, where nothing states it."""
    sizes: dict[str, int] = {}
    dtypes: dict[str, str] = {}
    for file in sorted(set(checkpoint.tensor_files().values())):
        with checkpoint.open_tensors(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                view = tensors.get_slice(name)
                dtypes[name] = STORED_DTYPES.get(view.get_dtype(), "float32")  # others are refused when they are read
                sizes[name] = int(np.prod(view.get_shape()))
    return dtypes[max(sizes, key=lambda name: sizes[name])] if sizes else "float32"


def has_own_head(checkpoint: TensorSource) -> bool:
    """Returns whether an output projection is stored that is not the embedding."""
    files, open_tensors = checkpoint.tensor_files(), checkpoint.open_tensors
    embedding, head = stored_name(EMBEDDING, files), stored_name(HEAD, files)
    if embedding not in files or head not in files:
        return False
    with open_tensors(files[embedding]) as at_embedding, open_tensors(files[head]) as at_head:
        one, other = at_embedding.get_slice(embedding), at_head.get_slice(head)
        if one.get_shape() != other.get_shape():
            return True
        rows = one.get_shape()[0]
        blocks = (slice(begin, min(begin + HEAD_ROWS, rows)) for begin in range(0, rows, HEAD_ROWS))
        return any(not np.array_equal(one[block], other[block]) for block in blocks)
