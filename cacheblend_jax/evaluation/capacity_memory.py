"""The memory of each device that serving takes: weights, KV, what programs need besides, held to XLA's own account."""

from __future__ import annotations

from dataclasses import dataclass

from cacheblend_jax.blend.layer_step import blends_in_place
from cacheblend_jax.blend.schedule import Plan
from cacheblend_jax.evaluation.split import Split, split_over
from cacheblend_jax.model.config import ModelConfig
from cacheblend_jax.model.kv_cache import layer_bytes


@dataclass(frozen=True)
class ProgramMemory:
    """What a prefill's programs take on each device, in bytes.

    Attributes:
        kv: the blended cache, which it returns.
        staging: stored KV beside that. Of a resident prefill: none where stored KV becomes blended KV in place. Of a
            streamed one: the layers that may be on the device at a time.
        temporaries: hidden states, what a layer makes of them, and copies of weights. An estimate of what XLA makes of
            the program.
    """

    weights: int
    kv: int
    staging: int
    temporaries: int

    @property
    def peak(self) -> int:
        """All of it."""
        return self.weights + self.kv + self.staging + self.temporaries


def program_memory(
    config: ModelConfig,
    plan: Plan,
    num_devices: int,
    platform: str,
    kv_dtype: str | None = None,
    *,
    streamed_layers: int = 0,
) -> ProgramMemory:
    """Returns what the programs of a plan take on each of so many devices.

    Args:
        platform: `"cpu"`, `"gpu"` or `"tpu"`.
        kv_dtype: what its stored KV is quantised to.
        streamed_layers: how many layers of stored KV may be there at a time; 0 for a resident prefill.
    """
    split = split_over(config, num_devices)
    kv = config.num_layers * layer_bytes(config, plan.cache_length) // split.kv_ways
    layer = layer_bytes(config, plan.cache_length, kv_dtype) // split.kv_ways
    if streamed_layers:
        staging = streamed_layers * layer
    elif kv_dtype is not None and not plan.nothing_cached:
        staging = config.num_layers * layer
    else:
        staging = 0 if blends_in_place(platform) else kv
    return ProgramMemory(split.weight_bytes, kv, staging, _temporaries(config, plan, split, platform))


def _temporaries(config: ModelConfig, plan: Plan, split: Split, platform: str) -> int:
    """Returns the most of what is in use at a time, in the layers of a stage.

    Of a row: its hidden state, what the device adds to it, the sum of that over devices, and its queries. A CPU copies
    a layer's weights out of their stack; others multiply by them where they lie.
    """
    hidden = config.hidden_size * split.itemsize
    queries = config.num_heads * config.head_dim * split.itemsize // split.query_ways
    of_layers = max(stage.rows for stage in plan.stages) * (3 * hidden + queries)
    return of_layers + (split.layer_weight_bytes if platform == "cpu" else 0)


@dataclass(frozen=True)
class DeviceMemory:
    """What serving takes on each device, in bytes.

    Attributes:
        program: of the prefill that is running.
        in_flight: how many requests have KV on the device at a time, the one that is being prefilled included.
        kv_in_flight: of the others.
        device_tier: of stored chunks that stay there.
        usable: what the device has.
    """

    program: ProgramMemory
    in_flight: float
    kv_in_flight: int
    device_tier: int
    usable: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.program.peak + self.kv_in_flight + self.device_tier

    @property
    def most_in_flight(self) -> float:
        """How many requests' KV there is room for; below 1, not even one prefill fits."""
        free = self.usable - self.device_tier - self.program.peak
        return max(0.0, 1 + free / self.program.kv)


def device_memory(program: ProgramMemory, *, in_flight: float, device_tier: int, usable: int) -> DeviceMemory:
    """Returns what serving takes where so many requests, a mean, have KV on the device at a time."""
    others = int(max(0.0, in_flight - 1) * program.kv)
    return DeviceMemory(program, in_flight, others, device_tier, usable)
