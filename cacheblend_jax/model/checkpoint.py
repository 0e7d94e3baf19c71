"""The files of a Hugging Face checkpoint: its directory, JSON files, safetensors and tokenizer, read and checked."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from cacheblend_jax.errors import CheckpointError
from cacheblend_jax.model.demo import demo_directory

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
HUB_PATTERNS = ["*.json", "*.safetensors", "tokenizer.model", "*.txt", "*.jinja"]


def checkpoint_directory(name_or_path: str | Path) -> Path:
    """Returns the directory of a checkpoint, after downloading it where a hub id is given; `"demo"` is bundled.

    Raises:
        CheckpointError: there is no such directory, or the hub can't be reached.
    """
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
    """Reads `config.json` as it is."""
    return read_json(directory / "config.json", "pass the directory of a Hugging Face checkpoint, which holds one")


def read_json(path: Path, hint: str = "it was there a moment ago") -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        CheckpointError: the file is missing (the message ends in `hint`), or holds something else.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: {hint}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def load_tokenizer(directory: Path) -> Any:
    """Loads the checkpoint's tokenizer; `None` where it has none."""
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # transformers raises errors of any type for a broken tokenizer
        raise CheckpointError(f"{directory}: its tokenizer does not load: {error}") from error


def stop_token_ids(directory: Path, raw: dict[str, Any], tokenizer: Any) -> tuple[int, ...]:
    """Returns every token that ends an answer, by generation configuration, configuration `raw` and tokenizer."""
    generation = directory / "generation_config.json"
    sources = [read_json(generation)] if generation.is_file() else []
    ids: set[int] = set()
    for source in [*sources, raw]:
        eos = source.get("eos_token_id")
        ids.update([eos] if isinstance(eos, int) else eos or [])
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return tuple(sorted(ids))


def tensor_files(directory: Path) -> dict[str, Path]:
    """Returns the file of every tensor in the checkpoint."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
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
    with open_tensors(single) as tensors:
        return dict.fromkeys(tensors.keys(), single)


def open_tensors(file: Path) -> Any:
    """Opens a safetensors file, to be used in a `with` statement."""
    try:
        return safe_open(file, framework="np")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a readable safetensors file: {error}") from error
