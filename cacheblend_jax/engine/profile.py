"""Profiles: the measured delays of a model's layers and a store's tiers on one device, kept as JSON."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from platformdirs import user_cache_path

from cacheblend_jax.engine.delays import ComputeModel, Tier, compute_model
from cacheblend_jax.errors import CacheBlendError, reason_and_remedy
from cacheblend_jax.model.model import Model
from cacheblend_jax.runtime.host_buffers import aligned_empty
from cacheblend_jax.runtime.link import DeviceLink
from cacheblend_jax.store import located

logger = logging.getLogger(__name__)
VERSION = 1
MATRIX = 1024  # rows and columns of the product that a quick estimate times
ASSUMED_DISK = Tier("disk", 1e9, 1e-4)  # a solid-state disk, checksums included


@dataclass(frozen=True)
class Profile:
    """The measured delays of one model on one device over one store.

    Attributes:
        model: its fingerprint.
        device: its kind, as JAX names it.
        store: the store's directory; empty for a store in memory.
        tiers: by name.
        transfer: from host memory to the device; page-locked memory, where the device has it.
        fit: how well the fitted estimates match the measurements.
        pageable: from other host memory to the device; `None` where all memory is alike.
    """

    model: str
    device: str
    store: str
    compute: ComputeModel
    tiers: dict[str, Tier]
    transfer: Tier
    fit: dict[str, Any]
    pageable: Tier | None = None

    def transfer_from(self, *, page_locked: bool) -> Tier:
        """Returns the way from page-locked or from pageable host memory to the device."""
        return self.transfer if page_locked or self.pageable is None else self.pageable

    def save(self, path: str | Path) -> None:
        """Writes the profile.

        Raises:
            CacheBlendError: the file cannot be written.
        """
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(json.dumps({"version": VERSION} | asdict(self), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise CacheBlendError(f"cannot write the profile {path}: {reason_and_remedy(error)}") from error

    @classmethod
    def read(cls, path: str | Path) -> Profile:
        """Reads a profile.

        Raises:
            CacheBlendError: the file cannot be read, or is not a profile of this version.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CacheBlendError(f"cannot read the profile {path}: {error}; make one with `calibrate`") from error
        try:
            if content.pop("version") != VERSION:
                raise CacheBlendError(f"profile {path} is of another version; make a new one with `calibrate`")
            content["compute"] = ComputeModel(**content["compute"])
            content["tiers"] = {name: Tier(**tier) for name, tier in content["tiers"].items()}
            content["transfer"] = Tier(**content["transfer"])
            content["pageable"] = Tier(**content["pageable"]) if content.get("pageable") else None
            if "host" not in content["tiers"]:
                raise KeyError("tiers: host")
            return cls(**content)
        except (KeyError, TypeError, AttributeError) as error:
            raise CacheBlendError(f"{path} is not a profile: {error!r}; make one with `calibrate`") from error


def device_kind(model: Model) -> str:
    """Returns the kind of device that the model is on, as JAX names it, and how many of them run a prefill."""
    devices: list[Any] = list(model.groups[0].placement.device_set)
    return f"{devices[0].device_kind} x {len(devices)}"


def store_name(directory: Any) -> str:
    """Returns a store's name in profiles: its absolute path or URL; empty for a store in memory."""
    return "" if directory is None else str(located(directory))


def default_path(model: Model, directory: Any) -> Path:
    """Returns where `calibrate` saves, and an engine looks for, the profile of a model, its device and a store."""
    name = "\n".join((model.fingerprint, device_kind(model), store_name(directory)))
    return user_cache_path("cacheblend-jax") / "profiles" / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"


def profile_for(model: Model, directory: Any, given: Profile | Path | str | None) -> tuple[Profile, str]:
    """Returns the profile to use, and its name: the one given, the one that `calibrate` saved, or a quick estimate.

    A profile of another model, device or store is ignored, with a warning that names it.

    Raises:
        CacheBlendError: the given path cannot be read.
    """
    path = default_path(model, directory) if given is None else given
    if isinstance(path, Profile):
        profile, name = path, "the profile given"
    elif given is None and not Path(path).exists():
        profile, name = quick_profile(model, directory), "a quick built-in estimate"
        logger.warning("no profile of this model, device and store: a quick estimate is used; `calibrate` measures one")
        return profile, name
    else:
        profile, name = Profile.read(Path(path)), f"profile {path}"
    own = {"model": model.fingerprint, "device": device_kind(model), "store": store_name(directory)}
    if foreign := [what for what, value in own.items() if getattr(profile, what) != value]:
        what = foreign[0]
        logger.warning(
            "%s is of another %s (%r, here %r) and is ignored: a quick estimate is used",
            name,
            what,
            getattr(profile, what),
            own[what],
        )
        return quick_profile(model, directory), "a quick built-in estimate"
    return profile, name


def quick_profile(model: Model, directory: Any) -> Profile:
    """Estimates the delays from a matrix product and a copy, in about a second; right within a small factor.

    Raises:
        CacheBlendError: the model is on several hosts.
    """
    if model.spans_hosts:
        raise CacheBlendError(
            "a quick estimate of delays takes one host, and the model is on several; pass Engine(profile=…) one of "
            "this model, devices and store, which `calibrate` saves"
        )
    config = model.config
    group = model.groups[0]
    rows, weights = _factors(group)
    product = jax.jit(jnp.matmul)
    flops = 2 * rows.size * weights.shape[1] / _seconds_of(lambda: product(rows, weights).block_until_ready())
    host, link = np.ones(2**24, np.uint8), DeviceLink(model.placement)
    target = aligned_empty(host.shape, host.dtype)
    copied = host.nbytes / _seconds_of(lambda: np.copyto(target, host))
    pageable = moved = _bytes_per_s(link, target, group)
    if (lock := link.page_lock(target)) is not None:
        moved = _bytes_per_s(link, target, group)
        lock.release()
    # At the speed of a copy, keys take too much for an accelerator, but small there.
    rates = {"flops_per_s": flops, "attention_flops_per_s": flops, "bytes_per_s": copied}
    compute = compute_model(config, **rates, layer_s=2e-4)
    tiers = {"host": Tier("host", copied), "disk": ASSUMED_DISK}
    other = None if lock is None else Tier("pageable", pageable)
    own = model.fingerprint, device_kind(model), store_name(directory)
    return Profile(*own, compute, tiers, Tier("transfer", moved), {}, other)


def _factors(model: Model) -> tuple[jax.Array, jax.Array]:
    """Returns rows, and weights that the model's devices split as they split its queries' projection."""
    ways = 1 if model.partition is None else model.partition.ways("heads")
    columns, dtype = MATRIX // ways * ways, jnp.dtype(model.config.dtype)
    placement = model.placement if model.partition is None else model.partition.sharding(None, "heads")
    rows = jax.device_put(np.ones((MATRIX, MATRIX), dtype), model.placement)
    return rows, jax.device_put(np.ones((MATRIX, columns), dtype), placement)


def _bytes_per_s(link: DeviceLink, host: np.ndarray, model: Model) -> float:
    """Returns how fast a buffer goes to the devices, some of it at a time, and split by heads, as layers do."""
    heads = model.config.num_kv_heads
    parts = [part[: part.size // heads * heads].reshape(-1, heads) for part in np.array_split(host, 4)]
    seconds = _seconds_of(lambda: jax.block_until_ready(link.put(parts, model.layer_placement)))
    return sum(part.nbytes for part in parts) / seconds


def _seconds_of(work: Callable[[], object], repeats: int = 3) -> float:
    """Returns the seconds of the fastest of a few runs, after one that warms up."""
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return max(min(seconds[1:]), 1e-9)
