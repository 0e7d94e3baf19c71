"""gpt-oss's experts, which its checkpoints hold in tensors of all experts of a layer, as projections of each.

Its gate and up projections are every other output of one projection. Matrices are stored [in, out], or in MXFP4 [out,
in]: in groups of 32 numbers of four bits that share an exponent. Those are dequantised when they are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from cacheblend_jax.errors import CheckpointError
from cacheblend_jax.model.config import ModelConfig
from cacheblend_jax.model.fused_tensors import RowsAlone, TensorSource

ARCHITECTURE = "GptOssForCausalLM"
# Of each stored projection, the outputs that are each of ours.
OUTPUTS = {
    "gate_up_proj": {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)},
    "down_proj": {"down_proj": slice(None)},
}
BLOCKS, SCALES = "_blocks", "_scales"
GROUP_BYTES, GROUP = 16, 32  # of numbers that share an exponent
POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP4 = np.array([*POSITIVE, *(-value for value in POSITIVE)], np.float32)
EXPONENT_BIAS = 127


class ExpertPart(NamedTuple):
    """Where an expert's projection, or its bias, is: some outputs of a stored one."""

    tensor: str
    expert: int
    outputs: slice
    is_bias: bool


def separate_gpt_oss(checkpoint: TensorSource, config: ModelConfig) -> TensorSource:
    """Returns a checkpoint of gpt-oss with each expert's projections as tensors of their own; any other as it is."""
    return GptOssTensors(checkpoint, dict(_parts(config))) if config.architecture == ARCHITECTURE else checkpoint


def fuse_gpt_oss(tensors: dict[str, np.ndarray], config: ModelConfig) -> dict[str, np.ndarray]:
    """Returns tensors as checkpoints of gpt-oss hold them, in no MXFP4: the reverse of `separate_gpt_oss`."""
    if config.architecture != ARCHITECTURE:
        return tensors
    fused = dict(tensors)
    for name, part in _parts(config):
        rows = fused.pop(name)
        columns = rows if part.is_bias else rows.T
        step = part.outputs.step or 1
        sizes = (config.num_experts, *columns.shape[:-1], columns.shape[-1] * step)
        whole = fused.setdefault(part.tensor, np.empty(sizes, rows.dtype))
        whole[part.expert][..., part.outputs] = columns
    return fused


def dequantised_mxfp4(
    blocks: UInt8[np.ndarray, "rows groups 16"], scales: UInt8[np.ndarray, "rows groups"]
) -> Float[np.ndarray, "rows columns"]:
    """Returns the numbers of MXFP4, in float32.

    Source: Open Compute Project, Microscaling Formats (MX) 1.0, sections 5.3 and 6.
    """
    values = FP4[np.stack([blocks & 15, blocks >> 4], axis=-1)].reshape(*scales.shape, GROUP)
    exponents = scales.astype(np.int32) - EXPONENT_BIAS
    return np.ldexp(values, exponents[..., None]).reshape(len(blocks), -1)


def _parts(config: ModelConfig) -> Iterator[tuple[str, ExpertPart]]:
    for layer in range(config.num_layers):
        at = f"model.layers.{layer}.mlp.experts."
        for tensor, projections in OUTPUTS.items():
            for (name, outputs), expert in product(projections.items(), range(config.num_experts)):
                ours = f"{at}{expert}.{name}"
                yield f"{ours}.weight", ExpertPart(f"{at}{tensor}", expert, outputs, is_bias=False)
                yield f"{ours}.bias", ExpertPart(f"{at}{tensor}_bias", expert, outputs, is_bias=True)


class GptOssTensors:
    """A checkpoint whose experts' projections stand under names of their own."""

    def __init__(self, checkpoint: TensorSource, parts: dict[str, ExpertPart]) -> None:
        self.location = checkpoint.location
        self._checkpoint, files = checkpoint, checkpoint.tensor_files()
        stored = {part.tensor for part in parts.values()}
        self._quantised = {name for name in stored if {name + BLOCKS, name + SCALES} <= files.keys()}
        names = {name: name + BLOCKS if name in self._quantised else name for name in stored}
        self._parts = {name: part for name, part in parts.items() if names[part.tensor] in files}
        held = {*names.values(), *(name + SCALES for name in self._quantised)}
        self._files = {name: file for name, file in files.items() if name not in held}
        self._files |= {name: files[names[part.tensor]] for name, part in self._parts.items()}

    def tensor_files(self) -> dict[str, Path]:
        """Returns the file of every tensor."""
        return self._files

    def open_tensors(self, path: Path) -> _Opened:
        """Opens the tensors of one file, to be used in a `with` statement."""
        return _Opened(self._checkpoint, path, self._parts, self._quantised)


class _Opened:
    def __init__(self, checkpoint: TensorSource, path: Path, parts: dict[str, ExpertPart], quantised: set[str]) -> None:
        self._checkpoint, self._path, self._parts, self._quantised = checkpoint, path, parts, quantised

    def __enter__(self) -> _Opened:
        self._stack = ExitStack()
        self._files = {self._path: self._stack.enter_context(self._checkpoint.open_tensors(self._path))}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def keys(self) -> Iterable[str]:
        """Returns the names of the tensors as they are stored."""
        return self._files[self._path].keys()

    def get_slice(self, name: str) -> Any:
        """Returns a view of a tensor, which reads the rows that are taken from it."""
        part = self._parts.get(name)
        if part is None:
            return self._stored(name)
        if part.tensor in self._quantised:
            blocks, scales = (self._stored(part.tensor + ending) for ending in (BLOCKS, SCALES))
            self._check(part, blocks, 4, "U8", last=GROUP_BYTES)
            self._check(part, scales, 3, "U8", last=blocks.get_shape()[2])
            return _QuantisedRows(blocks, scales, part)
        view = self._stored(part.tensor)
        self._check(part, view, 2 if part.is_bias else 3)
        return _Rows(view, part)

    def _stored(self, name: str) -> Any:
        path = self._checkpoint.tensor_files().get(name, self._path)  # scales may be in another file than their blocks
        if path not in self._files:
            self._files[path] = self._stack.enter_context(self._checkpoint.open_tensors(path))
        return self._files[path].get_slice(name)

    def _check(self, part: ExpertPart, view: Any, rank: int, dtype: str | None = None, last: int | None = None) -> None:
        shape = list(view.get_shape())
        if len(shape) != rank or shape[0] <= part.expert:
            raise CheckpointError(
                f"{self._path}: {part.tensor} has shape {shape}, which is none of {rank} dimensions with expert "
                f"{part.expert} among the first"
            )
        if (dtype is not None and view.get_dtype() != dtype) or (last is not None and shape[-1] != last):
            raise CheckpointError(
                f"{self._path}: {part.tensor} is {view.get_dtype()} of shape {shape}, which is no MXFP4: that is "
                f"{dtype}, the last dimension {last}"
            )


class _Rows(RowsAlone):
    """An expert's projection, stored [in, out], or its bias: some of its outputs as rows."""

    def __init__(self, view: Any, part: ExpertPart) -> None:
        self._view, self._part = view, part
        self._read: np.ndarray | None = None

    def get_dtype(self) -> str:
        return self._view.get_dtype()

    def get_shape(self) -> list[int]:
        _, *inputs, outputs = self._view.get_shape()
        return [len(range(outputs)[self._part.outputs]), *inputs]

    def __getitem__(self, rows: slice) -> np.ndarray:
        if self._read is None:  # rows are columns there: all of them are read at once
            expert = self._part.expert
            self._read = self._view[expert : expert + 1][0][..., self._part.outputs].T
        return np.ascontiguousarray(self._read[rows])


class _QuantisedRows(RowsAlone):
    """An expert's projection, stored [out, in] in MXFP4: some of its outputs, dequantised."""

    def __init__(self, blocks: Any, scales: Any, part: ExpertPart) -> None:
        self._blocks, self._scales, self._part = blocks, scales, part

    def get_dtype(self) -> str:
        return "F32"

    def get_shape(self) -> list[int]:
        _, outputs, groups, _ = self._blocks.get_shape()
        return [len(range(outputs)[self._part.outputs]), groups * GROUP]

    def __getitem__(self, rows: slice) -> np.ndarray:
        wanted = range(self._blocks.get_shape()[1])[self._part.outputs][rows]
        expert = slice(self._part.expert, self._part.expert + 1)
        between = slice(wanted.start, wanted[-1] + 1)
        blocks, scales = (view[expert, between][0][:: wanted.step] for view in (self._blocks, self._scales))
        return dequantised_mxfp4(blocks, scales)
