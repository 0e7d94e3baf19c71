"""Loading Hugging Face checkpoints: configuration, safetensors stacked into `[layers, …]` leaves, tokenizer."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from cacheblend_jax.errors import CheckpointError
from cacheblend_jax.model.config import ModelConfig
from cacheblend_jax.model.demo import demo_directory
from cacheblend_jax.model.model import Model
from cacheblend_jax.model.transformer import Params, abstract_params, partition_specs
from cacheblend_jax.model.weights_digest import SameLeaves, WeightFiles, signature_of
from cacheblend_jax.runtime.host_buffers import aligned_empty

DTYPES = ("float32", "bfloat16", "float16")
STORED_DTYPES = {"F64", "F32", "F16", "BF16"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
HUB_PATTERNS = ["*.json", "*.safetensors", "tokenizer.model", "*.txt", "*.jinja"]
CALIBRATION_FILE = "cacheblend.json"

# The path of a leaf in `Params` and its name in a checkpoint; `{}` is the layer. Kernels are stored [in, out] here and
# [out, in] there.
EMBEDDER_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "final_norm.scale": "model.norm.weight",
    "lm_head.kernel": "lm_head.weight",
}
LAYER_MODULES = {
    "input_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    **{name: f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")},
    **{name: f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")},
}
Progress = Callable[[int, int], None]


def load_model(
    name_or_path: str | Path,
    *,
    dtype: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    progress: Progress | None = None,
) -> Model:
    """Loads a Hugging Face checkpoint: a directory, a hub id, or `"demo"` for the bundled one.

    Reads `config.json` (of transformers 4 or 5), safetensors in one file or many, and the tokenizer if there is one;
    never pickle, never remote code. Peak host memory is about 1.25 times the weights.

    Args:
        dtype: `"float32"`, `"bfloat16"` or `"float16"`; the weights are cast while they are read. As stored by default.
        mesh: a mesh with an axis named `model`, over which the parameters are split (tensor parallelism).
        progress: called with the bytes loaded so far and their total.

    Raises:
        CheckpointError: what is missing, unsupported or misshapen, by name.
    """
    directory = _resolve(name_or_path)
    raw = read_config(directory)
    if dtype is not None and dtype not in DTYPES:
        raise CheckpointError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    config = ModelConfig.from_hugging_face(raw, dtype)
    if config.dtype not in DTYPES:
        raise CheckpointError(
            f"{directory}: dtype {config.dtype!r} is not supported; pass dtype= one of {', '.join(DTYPES)}"
        )
    config = _with_check_layer(config, directory)
    names = sorted({str(file.relative_to(directory)) for file in _tensor_files(directory).values()})
    signature = signature_of(directory, names)  # before reading: a file that changes meanwhile is noticed
    params = load_params(directory, config, mesh=mesh, progress=progress)
    files = None if signature is None else WeightFiles(directory, signature, SameLeaves(params))
    tokenizer = load_tokenizer(directory)
    stops = _stop_token_ids(directory, raw, tokenizer)
    name = str(name_or_path)
    return Model(config, params, tokenizer, name=name, stop_token_ids=stops, directory=directory, weight_files=files)


def _resolve(name_or_path: str | Path) -> Path:
    if name_or_path == "demo":
        return demo_directory()
    directory = Path(name_or_path).expanduser()
    if os.path.isdir(directory):
        return directory
    text = str(name_or_path)
    is_path = isinstance(name_or_path, Path) or text.startswith((".", "/", "~")) or os.path.exists(directory)
    if is_path or text.count("/") != 1:
        raise CheckpointError(
            f"model {text!r} is not a directory; pass a checkpoint's directory or a hub id (owner/name)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(text, allow_patterns=HUB_PATTERNS))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"model {text!r} is neither a local directory nor a reachable hub id: {reason}"
        ) from error


def read_config(directory: Path) -> dict[str, Any]:
    """Reads `config.json` as it stands."""
    return _read_json(directory / "config.json", "a Hugging Face checkpoint's directory holds config.json")


def _read_json(path: Path, hint: str) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: {hint}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def save_check_layer(model: Model, check_layer: int) -> Path | None:
    """Saves a measured check layer beside the model, where `load_model` finds it; returns the file.

    `None` for a model that came from no directory.

    Raises:
        CheckpointError: the directory cannot be written.
    """
    if model.directory is None:
        return None
    path = model.directory / CALIBRATION_FILE
    known = _read_json(path, "") if path.exists() else {}
    try:
        path.write_text(json.dumps(known | {"check_layer": check_layer}) + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"cannot save the check layer in {path}: {error.strerror}") from error
    return path


def _with_check_layer(config: ModelConfig, directory: Path) -> ModelConfig:
    path = directory / CALIBRATION_FILE
    if not path.is_file():
        return config
    check_layer = _read_json(path, "").get("check_layer", config.check_layer)
    if not isinstance(check_layer, int) or not 1 <= check_layer < max(config.num_layers, 2):
        raise CheckpointError(f"{path}: check_layer must be in [1, {config.num_layers - 1}], got {check_layer!r}")
    return replace(config, check_layer=check_layer)


def load_tokenizer(directory: Path) -> Any:
    """Loads the checkpoint's tokenizer; `None` where it has none."""
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # transformers raises anything at all for a broken tokenizer
        raise CheckpointError(f"{directory}: its tokenizer does not load: {error}") from error


def _stop_token_ids(directory: Path, raw: dict[str, Any], tokenizer: Any) -> tuple[int, ...]:
    generation = directory / "generation_config.json"
    sources = [_read_json(generation, "")] if generation.is_file() else []
    ids: set[int] = set()
    for source in [*sources, raw]:
        eos = source.get("eos_token_id")
        ids.update([eos] if isinstance(eos, int) else eos or [])
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return tuple(sorted(ids))


def load_params(
    directory: Path, config: ModelConfig, *, mesh: jax.sharding.Mesh | None = None, progress: Progress | None = None
) -> Params:
    """Loads the weights leaf by leaf: each is filled on the host, cast, and moved to the device before the next."""
    files = _tensor_files(directory)
    wanted = abstract_params(config)
    names = Params(
        embedder=_map_paths(wanted.embedder, lambda path: EMBEDDER_NAMES[path]),
        layers=_map_paths(wanted.layers, _layer_tensor_name),
    )
    _check_names(directory, files, config, names)
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(wanted)]
    loaded = 0

    def load(name: str, leaf: jax.ShapeDtypeStruct, spec: jax.P) -> jax.Array:
        nonlocal loaded
        array = _read_leaf(directory, files, name, leaf)
        device_array = jax.device_put(array, _sharding(mesh, spec, leaf))
        device_array.block_until_ready()
        loaded += leaf.size * leaf.dtype.itemsize
        if progress is not None:
            progress(loaded, sum(sizes))
        return device_array

    return jax.tree.map(load, names, wanted, partition_specs(config))


def hugging_face_tensors(params: Params) -> dict[str, np.ndarray]:
    """Returns the parameters under their Hugging Face names and in their shapes: what `load_params` reads."""
    tensors = {}
    for path, leaf in jax.tree.leaves_with_path(params.embedder):
        name = EMBEDDER_NAMES[_dotted(path)]
        tensors[name] = np.asarray(leaf.T if name == "lm_head.weight" else leaf)
    for path, leaf in jax.tree.leaves_with_path(params.layers):
        name = _layer_tensor_name(_dotted(path))
        tensors |= {name.format(layer): np.asarray(array.T) for layer, array in enumerate(leaf)}
    return tensors


def _layer_tensor_name(path: str) -> str:
    module, leaf = path.rsplit(".", 1)
    return f"model.layers.{{}}.{LAYER_MODULES[module]}.{'bias' if leaf == 'bias' else 'weight'}"


def _map_paths(tree: dict[str, Any], name: Callable[[str], str]) -> dict[str, Any]:
    return jax.tree.map_with_path(lambda path, _: name(_dotted(path)), tree)


def _dotted(path: Sequence[Any]) -> str:
    return ".".join(entry.key for entry in path)


def _tensor_files(directory: Path) -> dict[str, Path]:
    """Returns the file of every tensor in the checkpoint."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _read_json(index, "").get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index} has no weight_map")
        files = {name: directory / file for name, file in weight_map.items()}
        for file in sorted(set(files.values())):
            if not file.is_file():
                raise CheckpointError(f"{file} is missing: {index.name} names it")
        return files
    single = directory / "model.safetensors"
    if not single.is_file():
        pickled = next(iter(sorted(directory.glob("*.bin"))), None)
        hint = f"; {pickled.name} is pickle, which is not loaded: convert it to safetensors" if pickled else ""
        raise CheckpointError(f"{directory} has no model.safetensors and no model.safetensors.index.json{hint}")
    with _open(single) as tensors:
        return dict.fromkeys(tensors.keys(), single)


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="np")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a readable safetensors file: {error}") from error


def _check_names(directory: Path, files: dict[str, Path], config: ModelConfig, names: Params) -> None:
    layers = range(config.num_layers)
    expected = set(jax.tree.leaves(names.embedder))
    expected |= {name.format(layer) for name in jax.tree.leaves(names.layers) for layer in layers}
    if missing := sorted(expected - files.keys()):
        raise CheckpointError(f"{directory}: {len(missing)} tensors are missing, among them {missing[0]}")
    redundant = {"lm_head.weight"} if config.tied_embeddings else set()
    extra = sorted(name for name in files.keys() - expected - redundant if not name.endswith("rotary_emb.inv_freq"))
    if extra:
        raise CheckpointError(
            f"{directory}: {len(extra)} tensors have no place in {config.architecture}, among them {extra[0]}"
        )


def _read_leaf(directory: Path, files: dict[str, Path], name: str, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    out = aligned_empty(leaf.shape, leaf.dtype)
    stacked = "{}" in name
    places = {name.format(layer): out[layer] for layer in range(leaf.shape[0])} if stacked else {name: out}
    transposed = out.ndim == (3 if stacked else 2) and not name.endswith("embed_tokens.weight")
    for file, tensor_names in _by_file(files, places):
        # Opened anew for each leaf: the pages that a memory map has touched count as ours until it is closed.
        with _open(file) as tensors:
            for tensor_name in tensor_names:
                place = places[tensor_name]
                _copy_tensor(file, tensors, tensor_name, place.T if transposed else place)
    return out


def _by_file(files: dict[str, Path], names: dict[str, np.ndarray]) -> Iterator[tuple[Path, list[str]]]:
    for file in sorted({files[name] for name in names}):
        yield file, [name for name in names if files[name] == file]


def _copy_tensor(file: Path, tensors: Any, name: str, place: np.ndarray) -> None:
    try:
        view = tensors.get_slice(name)
    except SafetensorError as error:
        raise CheckpointError(f"{file} lacks the tensor {name}: {error}") from error
    if view.get_dtype() not in STORED_DTYPES:
        raise CheckpointError(f"{file}: {name} has dtype {view.get_dtype()}, which is not supported (float only)")
    if tuple(view.get_shape()) != place.shape:
        raise CheckpointError(
            f"{file}: {name} has shape {list(view.get_shape())}, the configuration asks for {list(place.shape)}"
        )
    place[...] = tensors.get_tensor(name).astype(place.dtype, copy=False)


def _sharding(mesh: jax.sharding.Mesh | None, spec: jax.P, leaf: jax.ShapeDtypeStruct) -> Any:
    if mesh is None:
        return None
    if "model" not in mesh.shape:
        raise CheckpointError(f"mesh must have an axis named 'model', got {mesh.axis_names}")
    ways = mesh.shape["model"]
    fits = all(axis is None or size % ways == 0 for axis, size in zip(spec, leaf.shape, strict=False))
    return jax.sharding.NamedSharding(mesh, spec if fits else jax.P())
