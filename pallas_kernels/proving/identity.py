"""What verdicts hold for: another device, driver, release of jax or source of a kernel needs others."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jax
import jaxlib

from pallas_kernels.sources import digest_of_sources
from pallas_kernels.target import Device, Target, target_of

DRIVER_FILES = ("/proc/driver/nvidia/version", "/sys/module/nvidia/version")


@dataclass(frozen=True)
class Place:
    """A device to prove kernels on, as this process or another one sees it.

    Attributes:
        identity: what verdicts on it hold for.
        visible_gpu: what `CUDA_VISIBLE_DEVICES` must be for a process to see this GPU alone; empty for others.
    """

    target: Target
    identity: dict[str, str]
    visible_gpu: str = ""

    @classmethod
    def of(cls, device: Device) -> Place:
        """Describes a device of this process."""
        visible_gpu = ""
        if device.platform == "gpu":
            visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
            number = getattr(device, "local_hardware_id", None) or 0
            visible_gpu = visible[number] if number < len(visible) else str(number)
        return cls(target_of(device), identity_of(device), visible_gpu)


def identity_of(device: Device) -> dict[str, str]:
    """Returns what verdicts on a device hold for."""
    return {
        "platform": device.platform,
        "chip": device.device_kind,
        "compute_capability": str(getattr(device, "compute_capability", "")),
        "driver": driver_version() if device.platform == "gpu" else "",
        "runtime": str(getattr(getattr(device, "client", None), "platform_version", "")),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "sources": sources_digest(),
    }


@cache
def driver_version() -> str:
    """Returns the version of NVIDIA's driver; empty where it can't be had."""
    for name in DRIVER_FILES:
        try:
            found = re.search(r"\d+\.\d+(\.\d+)?", Path(name).read_text())
        except OSError:
            continue
        if found:
            return found[0]
    try:  # containers may hide those files
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return (asked.stdout.strip().splitlines() or [""])[0]


@cache
def sources_digest() -> str:
    """Returns the SHA-256 (hex) over all sources of this package: kernels, block sizes, and the cases themselves."""
    return digest_of_sources(Path(__file__).parents[1])
