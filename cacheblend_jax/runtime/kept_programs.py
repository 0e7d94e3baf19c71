"""Programs kept on disk as they are lowered (StableHLO): a later process neither traces nor lowers them once more.

JAX's compilation cache spares compiling alone: what to look up there is known only after a function was traced and
lowered, which takes a second or two for the programs of one prompt. What is kept here leads to the same entries there;
without that cache, programs are compiled anew all the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import inspect
import json
import logging
from collections.abc import Hashable
from functools import cache, partial
from pathlib import Path
from types import FunctionType
from typing import Any

import flax
import google_crc32c
import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax import export

from cacheblend_jax.errors import one_line
from cacheblend_jax.runtime.user_cache import BEGAN, PROGRAMS, cache_directory, remove_all_but_newest, write_file
from pallas_kernels.sources import digest_of_sources, sources_in

logger = logging.getLogger(__name__)
FORMAT = 1  # raised whenever files are written otherwise than before
MOST_KEPT = 2000  # of some 20 KB
PACKAGES = ("cacheblend_jax", "pallas_kernels")
CHECKSUM_BYTES = 4


def kept_or_lowered(
    key: Hashable, function: partial, arrays: tuple[Any, ...], donate: tuple[str, ...]
) -> jax.stages.Lowered | None:
    """Lowers a function as `jax.jit` does, by what is kept of it; else traces it, and keeps it for the next process.

    For a program on one CPU. Both times the program is the same, so that both find it in JAX's compilation cache.

    Args:
        key: all that the program depends on and that is known here: function, static arguments, `donate`, structure and
            shapes of `arrays`, and the kernels in force.
        function: the function with its static arguments.

    Returns:
        `None` of functions that are not kept: only this package's are, which its sources identify, with static
        arguments that say all about themselves. A selector of the user's is none of them.
    """
    if sources_digest() is None:
        return None
    try:
        name = json.dumps([FORMAT, _described(key), sources_digest(), _versions(), _settings()])
    except _UnknownError as error:
        logger.debug("%s is not kept: %s", function.func.__name__, error)
        return None
    path = cache_directory(PROGRAMS) / hashlib.sha256(name.encode()).hexdigest()
    try:
        return _lowered(*_read(path), function, arrays, donate)
    except FileNotFoundError:
        pass
    except Exception as error:
        logger.debug("the program kept in %s can't be used: %s", path, one_line(error))
    return _traced_and_kept(path, function, arrays, donate)


def _traced_and_kept(
    path: Path, function: partial, arrays: tuple[Any, ...], donate: tuple[str, ...]
) -> jax.stages.Lowered | None:
    try:
        content, results = _exported(function, arrays)
        lowered = _lowered(content, results, function, arrays, donate)
    except Exception as error:  # not all that can be compiled can be exported; what can't be compiled fails there
        logger.debug("%s can't be kept: %s", function.func.__name__, one_line(error))
        return None
    try:
        _write(path, content, results)
        _remove_old_ones()
    except OSError as error:
        logger.debug("programs can't be kept: %s", one_line(error))
    return lowered


def _exported(function: partial, arrays: tuple[Any, ...]) -> tuple[bytes, Any]:
    """Returns a program of leaves, in portable form, and what stands for the structure of its results (`_to_json`)."""
    leaves, structure = jax.tree.flatten(arrays)
    results: list[Any] = []

    def of_leaves(*leaves: Any) -> list[Any]:
        flat, result_structure = jax.tree.flatten(function(*jax.tree.unflatten(structure, leaves)))
        results.append(result_structure)
        return flat

    shapes = [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=getattr(leaf, "weak_type", False)) for leaf in leaves
    ]
    exported = export.export(jax.jit(of_leaves), platforms=["cpu"])(*shapes)
    if any(aval.weak_type for aval in exported.out_avals):
        raise _UnknownError("a result has a weak type, which is not kept")
    described = _to_json(jax.tree.unflatten(results[-1], [object() for _ in range(results[-1].num_leaves)]))
    if jax.tree.structure(_from_json(json.loads(json.dumps(described)))) != results[-1]:
        raise _UnknownError(f"its results have the structure {results[-1]}")
    return bytes(exported.serialize()), described


def _lowered(
    content: bytes, results: Any, function: partial, arrays: tuple[Any, ...], donate: tuple[str, ...]
) -> jax.stages.Lowered:
    exported = export.deserialize(bytearray(content))
    structure = jax.tree.structure(_from_json(results))
    used = set(exported.module_kept_var_idx)

    def call(*arrays: Any) -> Any:
        # As an argument, what is not used would have to be there.
        leaves = [
            leaf if index in used else jnp.zeros(leaf.shape, leaf.dtype)
            for index, leaf in enumerate(jax.tree.leaves(arrays))
        ]
        return jax.tree.unflatten(structure, exported.call(*leaves))

    call.__name__ = call.__qualname__ = function.func.__name__
    names = list(inspect.signature(function).parameters)
    donated = tuple(index for index, name in enumerate(names[: len(arrays)]) if name in donate)
    return jax.jit(call, donate_argnums=donated).lower(*arrays)


def _read(path: Path) -> tuple[bytes, Any]:
    """Returns what `_exported` has returned.

    Raises:
        OSError, ValueError: there is no such file, or it is damaged.
    """
    checked = path.read_bytes()
    checksum, rest = checked[:CHECKSUM_BYTES], checked[CHECKSUM_BYTES:]
    if google_crc32c.value(rest).to_bytes(CHECKSUM_BYTES, "little") != checksum:
        raise ValueError("it is damaged")
    head, content = rest.split(b"\n", 1)
    return content, json.loads(head)


def _write(path: Path, content: bytes, results: Any) -> None:
    rest = json.dumps(results).encode() + b"\n" + content
    write_file(path, [google_crc32c.value(rest).to_bytes(CHECKSUM_BYTES, "little"), rest])


@cache
def _remove_old_ones() -> None:
    """Keeps the number of files within bounds: once a process is enough."""
    remove_all_but_newest(PROGRAMS, MOST_KEPT)


def _settings() -> dict[str, str]:
    """Returns JAX's settings as they are for this thread: some of them change what is traced."""
    return {name: str(getattr(jax.config, name, None)) for name in sorted(jax.config.values)}


def _versions() -> list[str]:
    return [jax.__version__, jaxlib.__version__, flax.__version__, np.__version__]


@cache
def sources_digest() -> str | None:
    """Returns SHA-256 (hex) over the sources of this package's modules: what is kept is valid for them alone.

    `None` where they can't be told: there are none, or some were written since this process began, which may run what
    was there before.
    """
    roots = [Path(inspect.getfile(importlib.import_module(package))).parent for package in PACKAGES]
    digest = hashlib.sha256("".join(map(digest_of_sources, roots)).encode()).hexdigest()
    written = [file.stat().st_mtime for root in roots for file in sources_in(root)]
    return digest if written and max(written) <= BEGAN else None


class _UnknownError(Exception):
    """A program depends on something that another process could not recognise."""


def _described(value: Any) -> str:
    """Returns a text that is the same in each process, and another for each other value.

    Raises:
        _UnknownError: the value is of a kind that has none.
    """
    if value is None or isinstance(value, bool | int | float | str | bytes | np.dtype):
        return repr(value)
    if isinstance(value, jax.tree_util.PyTreeDef):
        return _without_addresses(str(value))
    if isinstance(value, jax.Device):
        return f"{value.platform}:{value.id}"
    if isinstance(value, tuple):
        return f"{type(value).__name__}({', '.join(map(_described, value))})"
    if isinstance(value, frozenset):
        return f"{{{', '.join(sorted(map(_described, value)))}}}"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name!r}: {_described(value[name])}' for name in sorted(value))}}}"
    if isinstance(value, FunctionType) and _is_ours(value):
        return _name_of(value)
    if dataclasses.is_dataclass(value) and _is_ours(type(value)):
        options = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return f"{_name_of(type(value))}({_described(options)})"
    raise _UnknownError(f"it depends on {value!r}")


def _without_addresses(text: str) -> str:
    if " at 0x" in text:
        raise _UnknownError(f"it depends on {text}")
    return text


def _name_of(value: Any) -> str:
    return f"{value.__module__}:{value.__qualname__}"


def _is_ours(value: Any) -> bool:
    """Returns whether a function or class is this package's, and found by its name."""
    try:
        return _named(_name_of(value)) is value
    except (_UnknownError, AttributeError):
        return False


def _named(name: str) -> Any:
    module, _, qualified = name.partition(":")
    if module.partition(".")[0] not in PACKAGES:
        raise _UnknownError(f"{name} is not of this package")
    found: Any = importlib.import_module(module)
    for part in qualified.split("."):
        found = getattr(found, part)
    return found


def _to_json(tree: Any) -> Any:
    """Returns a pytree, with an `object()` for each leaf, as JSON: no reader of it runs what a file says."""
    if tree is None or type(tree) is object:
        return None if tree is None else "leaf"
    if isinstance(tree, dict):
        return {"dict": {name: _to_json(tree[name]) for name in tree}}
    if type(tree) in (tuple, list):
        return {type(tree).__name__: [_to_json(each) for each in tree]}
    if not _is_ours(type(tree)):
        raise _UnknownError(f"a {type(tree)} is among its results")
    if isinstance(tree, tuple):
        return {"named": _name_of(type(tree)), "parts": [_to_json(each) for each in tree]}
    parts, options = {}, {}
    for field in dataclasses.fields(tree):
        value = getattr(tree, field.name)
        if field.metadata.get("pytree_node", True):
            parts[field.name] = _to_json(value)
        elif value is None or isinstance(value, bool | int | float | str):
            options[field.name] = value
        else:
            raise _UnknownError(f"{field.name} is {value!r} among its results")
    return {"record": _name_of(type(tree)), "parts": parts, "options": options}


def _from_json(described: Any) -> Any:
    if described is None or described == "leaf":
        return None if described is None else object()
    if "dict" in described:
        return {name: _from_json(each) for name, each in described["dict"].items()}
    if "named" in described:
        return _named(described["named"])._make(map(_from_json, described["parts"]))
    if "record" in described:
        record = object.__new__(_named(described["record"]))  # its `__init__` may ask for arrays
        parts = {name: _from_json(each) for name, each in described["parts"].items()}
        for name, value in (parts | described["options"]).items():
            object.__setattr__(record, name, value)
        return record
    (kind,) = described
    return {"tuple": tuple, "list": list}[kind](map(_from_json, described[kind]))
