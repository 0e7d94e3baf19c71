"""Projections that a family's checkpoints hold in one tensor, each shown as a tensor of its own, and put back."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from cacheblend_jax.errors import CheckpointError
from cacheblend_jax.model.config import ModelConfig

# The tensors of a layer that hold others, one after another, by architecture.
FUSED = {
    "Phi3ForCausalLM": {
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    }
}


class RowsAlone:
    """A view of a tensor that reads whole rows; those of safetensors also read some columns of them."""


@runtime_checkable
class TensorSource(Protocol):
    """What holds a model's tensors."""

    @property
    def location(self) -> Path:
        """What messages name."""

    def tensor_files(self) -> dict[str, Path]:
        """Returns the file of every tensor."""

    def open_tensors(self, path: Path) -> Any:
        """Opens the tensors of one file, to be used in a `with` statement."""


class Part(NamedTuple):
    """Where a projection is: `rows` of a `tensor` that should have `height`.

    Of a tensor of three dimensions, the first two count as one: its rows are those of all experts.
    """

    tensor: str
    rows: Int[np.ndarray, " rows"] | range
    height: int


def separate(checkpoint: TensorSource, config: ModelConfig) -> TensorSource:
    """Returns the checkpoint with each projection a tensor of its own."""
    parts = _parts(config)
    return SeparateTensors(checkpoint, parts) if parts else checkpoint


def fuse(tensors: dict[str, np.ndarray], config: ModelConfig) -> dict[str, np.ndarray]:
    """Returns tensors as the family's checkpoints hold them: the reverse of `separate`."""
    fused = dict(tensors)
    for name, part in _parts(config).items():
        rows = fused.pop(name)
        whole = fused.setdefault(part.tensor, np.empty((part.height, *rows.shape[1:]), rows.dtype))
        whole[part.rows] = rows
    return fused


def turned_first(config: ModelConfig) -> Int[np.ndarray, " head_dim"]:
    """Returns where a head's dimensions lie in checkpoints, in the order that they have here.

    Checkpoints have those that RoPE turns first, in two halves, and then the others. Here RoPE turns the two halves of
    the whole head: each has its half of those that are turned first. Scores are the same, whatever the order.
    """
    size, turned = config.head_dim, config.rotary_dim or config.head_dim
    others = np.array_split(np.arange(turned, size), 2)
    halves = np.array_split(np.arange(turned), 2)
    return np.concatenate([halves[0], others[0], halves[1], others[1]])


def _parts(config: ModelConfig) -> dict[str, Part]:
    """Returns each projection that is part of another tensor, by its name."""
    heads = {"self_attn.q_proj": config.num_heads, "self_attn.k_proj": config.num_kv_heads}
    heights = {name: count * config.head_dim for name, count in heads.items()}
    heights |= {"self_attn.v_proj": config.num_kv_heads * config.head_dim}
    heights |= dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), config.intermediate_size)
    parts = {}
    for module, names in FUSED.get(config.architecture, {}).items():
        total, begin = sum(heights[name] for name in names), 0
        for name in names:
            rows = np.arange(begin, begin + heights[name])
            if name in heads:
                rows = rows.reshape(heads[name], -1)[:, turned_first(config)].reshape(-1)
            begin += heights[name]
            for layer in range(config.num_layers):
                at = f"model.layers.{layer}."
                parts[f"{at}{name}.weight"] = Part(f"{at}{module}.weight", rows, total)
    return parts


class SeparateTensors:
    """A checkpoint whose fused projections stand under names of their own."""

    def __init__(self, checkpoint: TensorSource, parts: dict[str, Part]) -> None:
        self.location = checkpoint.location
        self._checkpoint, files = checkpoint, checkpoint.tensor_files()
        self._parts = {name: part for name, part in parts.items() if part.tensor in files}
        fused = {part.tensor for part in self._parts.values()}
        self._files = {name: file for name, file in files.items() if name not in fused}
        self._files |= {name: files[part.tensor] for name, part in self._parts.items()}

    def tensor_files(self) -> dict[str, Path]:
        """Returns the file of every tensor."""
        return self._files

    def open_tensors(self, path: Path) -> _Opened:
        """Opens the tensors of one file, to be used in a `with` statement."""
        return _Opened(self._checkpoint.open_tensors(path), self._parts, path)


class _Opened:
    def __init__(self, tensors: Any, parts: dict[str, Part], path: Path) -> None:
        self._tensors, self._parts, self._path = tensors, parts, path

    def __enter__(self) -> _Opened:
        self._opened = self._tensors.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._tensors.__exit__(kind, error, trace)

    def keys(self) -> Iterable[str]:
        """Returns the names of the tensors as they are stored."""
        return self._opened.keys()

    def get_slice(self, name: str) -> Any:
        """Returns a view of a tensor, which reads the rows that are taken from it."""
        part = self._parts.get(name)
        if part is None:
            return self._opened.get_slice(name)
        view = self._opened.get_slice(part.tensor)
        if len(view.get_shape()) > 2:
            view = RowsOfExperts(view)
        if (height := view.get_shape()[0]) != part.height:
            of_experts = " of experts" if isinstance(view, RowsOfExperts) else ""
            raise CheckpointError(
                f"{self._path}: {part.tensor} has {height} rows{of_experts}, the configuration asks for {part.height}"
            )
        return _Rows(view, part.rows)


class _Rows(RowsAlone):
    """Some rows of a tensor, in another order."""

    def __init__(self, view: Any, rows: Int[np.ndarray, " rows"] | range) -> None:
        self._view, self._rows = view, rows

    def get_dtype(self) -> str:
        return self._view.get_dtype()

    def get_shape(self) -> list[int]:
        return [len(self._rows), *self._view.get_shape()[1:]]

    def __getitem__(self, rows: slice) -> np.ndarray:
        wanted = np.asarray(self._rows[rows])
        first = int(wanted.min())
        return self._view[first : int(wanted.max()) + 1][wanted - first]


class RowsOfExperts(RowsAlone):
    """A tensor `[experts, rows, columns]` as `[experts * rows, columns]`, of which no slice crosses experts."""

    def __init__(self, view: Any) -> None:
        self._view = view

    def get_dtype(self) -> str:
        """Returns the tensor's dtype."""
        return self._view.get_dtype()

    def get_shape(self) -> list[int]:
        """Returns how many rows all experts have, and columns."""
        experts, rows, columns = self._view.get_shape()
        return [experts * rows, columns]

    def __getitem__(self, rows: slice) -> np.ndarray:
        expert, first = divmod(rows.start, self._view.get_shape()[1])
        return self._view[expert : expert + 1, first : first + rows.stop - rows.start][0]
