"""The files of a Hugging Face checkpoint: its directory, JSON files, safetensors and tokenizer, read and checked.

`GgufCheckpoint` has the same methods as `DirectoryCheckpoint`: `load_model` reads both alike.
"""

from __future__ import annotations

import glob
import importlib.util
import json
import os
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from cacheblend_jax.errors import CheckpointError, one_line
from cacheblend_jax.model.config_fields import Fields, shown
from cacheblend_jax.model.demo import demo_directory
from cacheblend_jax.model.families import text_tower
from cacheblend_jax.model.quantised import refuse_quantised_config

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
DEFAULTS_FILE = "cacheblend.json"  # what a checkpoint's author ships with it; read, never written
INDEX, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
# What is read beside the weights. Other files of a repository (other formats, training states, adapters) stay there.
HUB_FILES = (
    *("config.json", "generation_config.json", DEFAULTS_FILE, INDEX),
    *(*TOKENIZER_FILES, "special_tokens_map.json", "added_tokens.json", "merges.txt", "vocab.txt"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
)
SENTENCEPIECE_START = b"\n"  # of the first message in the file; a tiktoken file begins with base64
MAX_NAME = 255
MAX_JSON_BYTES = 2**27  # the index of the largest checkpoints has a few million


class DirectoryCheckpoint:
    """A checkpoint in Hugging Face form: a directory with `config.json`, safetensors and, mostly, a tokenizer.

    Attributes:
        location: what messages name where they mean the whole checkpoint; of the configuration, `config_location`.
        directory: where the weight files lie.
        defaults_file: where the checkpoint's author may have put a measured check layer.
    """

    def __init__(self, directory: Path) -> None:
        self.location = self.directory = directory
        self.config_location = directory / "config.json"
        self.defaults_file: Path | None = directory / DEFAULTS_FILE

    def config(self) -> dict[str, Any]:
        """Returns the configuration in Hugging Face form."""
        return self._config

    def tensor_files(self) -> dict[str, Path]:
        """Returns the file of every tensor, by its Hugging Face name."""
        return self._files

    def open_tensors(self, path: Path) -> Any:
        """Opens the tensors of one file, to be used in a `with` statement."""
        return open_tensors(path)

    def tokenizer(self) -> Any:
        """Returns the tokenizer; `None` where there is none."""
        return load_tokenizer(self.directory)

    def stop_token_ids(self) -> set[int]:
        """Returns every token that ends an answer."""
        return stop_token_ids(self.directory, self._config)

    @cached_property
    def _config(self) -> dict[str, Any]:
        raw = read_config(self.directory)
        refuse_quantised_config(self.config_location, raw)
        return text_tower(raw, f"{self.config_location}: ")

    @cached_property
    def _files(self) -> dict[str, Path]:
        return tensor_files(self.directory)


def checkpoint_directory(name_or_path: str | Path) -> Path:
    """Returns the directory of a checkpoint, after downloading it where a hub id is given; `"demo"` is bundled.

    Raises:
        CheckpointError: there is no such directory, or the hub can't be reached.
    """
    if name_or_path == "demo":
        return demo_directory()
    directory = Path(os.path.expanduser(name_or_path))
    if os.path.isdir(directory):
        return directory
    text = str(name_or_path)
    is_path = isinstance(name_or_path, Path) or text.startswith((".", "/", "~")) or os.path.exists(directory)
    if is_path or text.count("/") != 1:
        raise CheckpointError(
            f"model {text!r} is not a directory; pass a checkpoint's directory, a GGUF file or a hub id (owner/name)"
        )
    return _downloaded(text)


def _downloaded(hub_id: str) -> Path:
    """Downloads what loading reads: small files first, then the weights that they name, of the same revision."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        directory = Path(snapshot_download(hub_id, allow_patterns=list(HUB_FILES)))
        weights = [glob.escape(name) for name in _weight_file_names(directory)]
        return Path(snapshot_download(hub_id, revision=directory.name, allow_patterns=[*HUB_FILES, *weights]))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise CheckpointError(
            f"model {hub_id!r} is neither a local directory nor a reachable hub id: {one_line(error)}"
        ) from error


def read_config(directory: Path) -> dict[str, Any]:
    """Reads `config.json` as it is."""
    gguf = next(iter(sorted(directory.glob("*.gguf"))), None)
    hint = "pass the directory of a Hugging Face checkpoint, which holds one, or a GGUF file"
    return read_json(directory / "config.json", hint if gguf is None else f"to load {gguf.name}, pass that file")


def read_json(path: Path, hint: str = "it was there a moment ago") -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        CheckpointError: the file is missing (the message ends in `hint`), or holds something else.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: {hint}")
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} must have at most {MAX_JSON_BYTES} bytes, got {size}: is it the right file?")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def load_tokenizer(directory: Path) -> Any:
    """Loads the checkpoint's tokenizer; `None` where it has none."""
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        return None
    _check_tokenizer_config(directory)
    _check_tokenizer_package(directory)
    from transformers import AutoTokenizer

    try:
        # What configurations say of spaces (those of Llama 3: to take them out before some letters) is for sentences
        # in English; transformers 5.0 to 5.6 do it to any text.
        how = {"trust_remote_code": False, "local_files_only": True, "clean_up_tokenization_spaces": False}
        return AutoTokenizer.from_pretrained(directory, **how)
    except Exception as error:  # transformers raises errors of any type for a broken tokenizer
        raise CheckpointError(f"{directory}: its tokenizer does not load: {one_line(error)}") from error


def _check_tokenizer_config(directory: Path) -> None:
    """Refuses a configuration by which transformers would read a tokenizer from elsewhere."""
    path = directory / "tokenizer_config.json"
    if not path.is_file():
        return
    content = read_json(path)
    fields = Fields(content, f"{path}: ")
    for name in fields.texts("fast_tokenizer_files") or []:
        _check_inside(directory, name, path, "fast_tokenizer_files")
    if "gguf_file" in fields:
        raise fields.wrong("gguf_file", "absent (tokenizers are read from tokenizer.json)", content["gguf_file"])


def _check_tokenizer_package(directory: Path) -> None:
    """Names the package that a `tokenizer.model` needs where there is no `tokenizer.json`."""
    path = directory / "tokenizer.model"
    if (directory / "tokenizer.json").is_file() or not path.is_file():
        return
    with open(path, "rb") as file:
        is_protobuf = file.read(1) == SENTENCEPIECE_START
    package, install = ("sentencepiece", "sentencepiece protobuf") if is_protobuf else ("tiktoken", "tiktoken")
    if importlib.util.find_spec(package) is None:
        raise CheckpointError(
            f"{path} needs the package {package}: install it with pip install {install}, "
            f"or pass a checkpoint that has a tokenizer.json"
        )


def stop_token_ids(directory: Path, raw: dict[str, Any]) -> set[int]:
    """Returns every token that ends an answer, by generation configuration and configuration `raw`."""
    ids = set(Fields(raw, f"{directory / 'config.json'}: ").token_ids("eos_token_id"))
    generation = directory / "generation_config.json"
    if generation.is_file():
        ids.update(Fields(read_json(generation), f"{generation}: ").token_ids("eos_token_id"))
    return ids


def tensor_files(directory: Path) -> dict[str, Path]:
    """Returns the file of every tensor in the checkpoint."""
    if (directory / INDEX).is_file():
        files = {name: directory / file for name, file in _weight_map(directory).items()}
        for file in sorted(set(files.values())):
            if not os.path.isfile(file):
                raise CheckpointError(f"{file} is missing: {INDEX} names it")
        return files
    single = directory / SINGLE_FILE
    if not single.is_file():
        pickled = next(iter(sorted(directory.glob("*.bin"))), None)
        hint = f"; {pickled.name} is pickle, which is not loaded: convert it to safetensors" if pickled else ""
        raise CheckpointError(f"{directory} has no {SINGLE_FILE} and no {INDEX}{hint}")
    with open_tensors(single) as tensors:
        return dict.fromkeys(tensors.keys(), single)


def _weight_file_names(directory: Path) -> list[str]:
    """Returns the names of the files that hold the weights: those in the index, if there is one."""
    return sorted(set(_weight_map(directory).values())) if (directory / INDEX).is_file() else [SINGLE_FILE]


def _weight_map(directory: Path) -> dict[str, str]:
    """Reads the index: the name of each tensor's file, all of them within the directory."""
    path = directory / INDEX
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{path} has no weight_map")
    names: dict[object, str] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{path}: weight_map[{tensor!r}] must be a file's name, got {shown(name)}")
        names.setdefault(name, tensor)
    for name, tensor in names.items():
        _check_inside(directory, str(name), path, f"weight_map[{tensor!r}]")
    return weight_map


def _check_inside(directory: Path, name: str, source: Path, key: str) -> None:
    """Refuses the name of a file that would not be in the directory.

    The file itself may be a link to anywhere: the hub's cache consists of such links.
    """
    parts = PurePosixPath(name)
    is_relative = not parts.is_absolute() and ".." not in parts.parts and "\\" not in name
    is_name = 0 < len(name) <= MAX_NAME and name.isprintable() and parts.name != ""
    if not (is_relative and is_name and (directory / name).parent.resolve().is_relative_to(directory.resolve())):
        raise CheckpointError(f"{source}: {key} must name a file in the same directory, got {shown(name)}")


def open_tensors(file: Path) -> Any:
    """Opens a safetensors file, to be used in a `with` statement."""
    try:
        return safe_open(file, framework="np")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a readable safetensors file: {one_line(error)}") from error
