"""The child processes of `prove`: they describe the device, or try a backend, and write a JSON line for each finding.

Without arguments it describes the first device. Its arguments: operation, backend, platform, chip,
and dtypes, each followed by a head_dim.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.proving.attention_cases import ATTENTION
from pallas_kernels.proving.blending_cases import BLENDING
from pallas_kernels.proving.identity import Place
from pallas_kernels.proving.trial import try_backend
from pallas_kernels.verdicts import Kind

OPERATIONS = {operation.name: operation for operation in (ATTENTION, BLENDING)}
NEEDED_BYTES = 3 * 2**29  # of the largest call that is timed


def say(**said: Any) -> None:
    """Writes one line; the last one is what a crash or a hang is to be blamed on."""
    print(json.dumps(said), flush=True)


def describe() -> None:
    """Describes the first device."""
    say(place=asdict(Place.of(jax.local_devices()[0])))


def try_on(operation: str, backend: str, platform: str, chip: str, *kinds: str) -> None:
    """Tries the backend on the first device of that kind."""
    device = next((each for each in jax.local_devices(backend=platform) if each.device_kind == chip), None)
    if device is None:
        raise SystemExit(f"a process of its own sees no {chip}")
    jax.config.update("jax_default_device", device)
    jax.block_until_ready(jnp.zeros(NEEDED_BYTES, jnp.uint8))
    say(ready=True)
    verdicts = try_backend(
        OPERATIONS[operation],
        backend,
        [Kind(dtype, int(head_dim)) for dtype, head_dim in zip(kinds[::2], kinds[1::2], strict=True)],
        say=lambda doing: say(doing=doing),
    )
    say(verdicts=[asdict(verdict) for verdict in verdicts])


if __name__ == "__main__":
    try_on(*sys.argv[1:]) if sys.argv[1:] else describe()
