"""Accelerators that capacity is planned for: what their data sheets promise, and the shares of it that we measured."""

from __future__ import annotations

from dataclasses import dataclass

from cacheblend_jax.engine.delays import ComputeModel, Tier, compute_model
from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.evaluation.split import product_ways, split_over
from cacheblend_jax.model.config import ModelConfig

# Of the data sheet's figures, as measured on an H100 (docs/results.md): products of matrices, attention (532 TFLOP/s
# over all queries, 345 over scattered ones), copies in its memory, and transfers from page-locked host memory.
OF_PRODUCTS, OF_ATTENTION, OF_BANDWIDTH, OF_LINK = 0.83, 0.44, 0.87, 0.84
OF_INTERCONNECT = 0.8  # assumed: no mesh of accelerators has been measured
# JAX reserves three quarters of a GPU (`XLA_PYTHON_CLIENT_MEM_FRACTION`); of a TPU, assumed: what fragments leave.
USABLE_MEMORY = {"gpu": 0.75, "tpu": 0.95}
MEASURED_ON = "rates of the data sheet, times the shares measured on one H100 (between devices: assumed)"


@dataclass(frozen=True)
class Device:
    """An accelerator, by its data sheet.

    Attributes:
        platform: `"gpu"` or `"tpu"`.
        flops_per_s: dense products in bfloat16 (float16 on a T4).
        bytes_per_s: of its own memory.
        memory_bytes: as the device reports it.
        interconnect_bytes_per_s: to other devices of its host, in one direction.
        link_bytes_per_s: from host memory, in one direction.
        price_per_hour: in US dollars: a round figure of what clouds ask on demand, meant to be replaced.
    """

    name: str
    platform: str
    flops_per_s: float
    bytes_per_s: float
    memory_bytes: float
    interconnect_bytes_per_s: float
    link_bytes_per_s: float
    price_per_hour: float

    @property
    def usable_bytes(self) -> int:
        """What weights, KV and programs may take."""
        return int(USABLE_MEMORY[self.platform] * self.memory_bytes)


# NVIDIA: the data sheets "H100 Tensor Core GPU", "H200 Tensor Core GPU", "A100 80GB", "L4" and "T4" (dense products;
# SXM forms of the first three). NVLink's figures there are of both directions: halved here. L4 and T4 have PCI Express
# alone. Memory: what `nvidia-smi` reports. Links: PCI Express 5.0, 4.0 and 3.0 x16, in one direction.
# Google: cloud.google.com/tpu/docs/v5e and /v6e, with interconnects of 400 and 800 GB/s in both directions. Their links
# to the host are not published: PCI Express 3.0 and 4.0 x16 are assumed.
DEVICES = {
    "H100": Device("NVIDIA H100 SXM", "gpu", 989e12, 3.35e12, 81_559 * 2**20, 450e9, 64e9, 3.0),
    "H200": Device("NVIDIA H200 SXM", "gpu", 989e12, 4.8e12, 143_771 * 2**20, 450e9, 64e9, 3.5),
    "A100": Device("NVIDIA A100 SXM 80GB", "gpu", 312e12, 2.039e12, 81_920 * 2**20, 300e9, 32e9, 2.0),
    "L4": Device("NVIDIA L4", "gpu", 121e12, 0.3e12, 23_034 * 2**20, 32e9, 32e9, 0.7),
    "T4": Device("NVIDIA T4", "gpu", 65e12, 0.32e12, 15_360 * 2**20, 16e9, 16e9, 0.35),
    "v5e": Device("TPU v5e", "tpu", 197e12, 0.819e12, 16 * 2**30, 200e9, 16e9, 1.2),
    "v6e": Device("TPU v6e", "tpu", 918e12, 1.638e12, 32 * 2**30, 400e9, 32e9, 2.7),
}


def device_named(name: str) -> Device:
    """Returns the device of that name, whatever its case.

    Raises:
        CacheBlendError: it is none of `DEVICES`.
    """
    known = {each.lower(): device for each, device in DEVICES.items()}
    if name.lower() not in known:
        raise CacheBlendError(f"unknown device {name!r}; expected one of {', '.join(DEVICES)}, or give a --profile")
    return known[name.lower()]


def datasheet_compute(config: ModelConfig, device: Device, num_devices: int) -> ComputeModel:
    """Returns how long layer steps take on so many devices, as far as products and heads are split over them.

    Each layer reads its weights, and sums its rows over the devices twice, after attention and after the MLP.
    """
    split, ways = split_over(config, num_devices), product_ways(config, num_devices)
    bandwidth = OF_BANDWIDTH * device.bytes_per_s
    row_bytes = config.hidden_size * split.itemsize
    summed = 2 * 2 * (ways - 1) / ways * row_bytes  # by a ring, each device sends a row nearly twice
    return compute_model(
        config,
        flops_per_s=OF_PRODUCTS * device.flops_per_s * ways,
        attention_flops_per_s=OF_ATTENTION * device.flops_per_s * split.query_ways,
        bytes_per_s=bandwidth * split.kv_ways,
        layer_s=split.layer_weight_bytes / bandwidth,
        attending_s=summed / (OF_INTERCONNECT * device.interconnect_bytes_per_s),
    )


def datasheet_link(config: ModelConfig, device: Device, num_devices: int) -> Tier:
    """Returns the way from host memory to the devices: each has a link of its own, for its part of the KV."""
    ways = split_over(config, num_devices).kv_ways
    return Tier("transfer", OF_LINK * device.link_bytes_per_s * ways)
