"""The child process of `prove`: tries one backend of one operation, and writes a JSON line for each thing it says.

python -m pallas_kernels.proving.child OPERATION BACKEND PLATFORM CHIP
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
from pallas_kernels.proving.trial import try_backend

OPERATIONS = {operation.name: operation for operation in (ATTENTION, BLENDING)}
NEEDED_BYTES = 2**30


def say(**said: Any) -> None:
    """Writes one line; the last one is what a crash or a hang is to be blamed on."""
    print(json.dumps(said), flush=True)


def main(operation: str, backend: str, platform: str, chip: str) -> None:
    """Tries the backend on the first device of that kind."""
    device = next((each for each in jax.local_devices(backend=platform) if each.device_kind == chip), None)
    if device is None:
        raise SystemExit(f"a process of its own sees no {chip}")
    jax.config.update("jax_default_device", device)
    jax.block_until_ready(jnp.zeros(NEEDED_BYTES, jnp.uint8))
    say(ready=True)
    verdicts = try_backend(OPERATIONS[operation], backend, say=lambda doing: say(doing=doing))
    say(verdicts=[asdict(verdict) for verdict in verdicts])


if __name__ == "__main__":
    main(*sys.argv[1:])
