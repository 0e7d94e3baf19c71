"""What `gpu_bench.py` expects of a device, as shares of what its data sheet promises."""

from __future__ import annotations

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "B200": 2250e12, "A100": 312e12, "L4": 121e12}  # dense bfloat16
PEAK_FLOPS |= {"TPU v5 lite": 197e12, "TPU v6 lite": 918e12}
BANDWIDTH = {"H200": 4.8e12, "H100": 3.35e12, "B200": 7.7e12, "A100": 2.04e12, "L4": 0.3e12}  # bytes/s
BANDWIDTH |= {"TPU v5 lite": 0.82e12, "TPU v6 lite": 1.64e12}
# Of the peak, as measured on an H100 and an H200 (docs/results.md), at 8192 keys; of a TPU, a guess.
OF_FLOPS = {
    "matmul": 0.83,
    "mosaic_gpu scattered": 0.44,
    "mosaic_gpu full": 0.5,
    "triton scattered": 0.21,
    "triton full": 0.28,
    "tpu scattered": 0.4,
    "tpu full": 0.4,
    "xla scattered": 0.03,
    "xla full": 0.04,
    "dense scattered": 0.04,
    "causal full": 0.04,
    "cudnn full": 0.57,
    "tokamax scattered": 0.5,
    "tokamax full": 0.6,
    "torch sdpa": 0.5,
    "torch full": 0.55,
    "prefill full": 0.66,
    "prefill blend": 0.52,
}
# Of few rows launches and small kernels take most of the time. `decode` and `reuse` are modelled, not measured.
OF_BANDWIDTH = {
    "copy": 0.87,
    "triton": 0.58,
    "tpu": 0.5,
    "xla": 0.69,
    "prefill reuse": 0.4,
    "decode": 0.4,
    "mosaic_gpu one": 0.32,
    "mosaic_gpu few": 0.25,
    "triton one": 0.28,
    "triton few": 0.2,
    "xla one": 0.017,
    "xla few": 0.017,
}
# Bytes/s from page-locked memory, as measured on an H100 (PCIe 5), and of a layer's copy into it by eight threads.
LINK = {"H200": 53e9, "H100": 53e9}
OF_LINK = {"copied": 0.8, "first layer": 1 / 16}  # of the link; of the time that all layers take, before the first step
OTHER_SHARE = 0.14  # of a blend's time on the device is neither matmul nor attention


def seconds_for_flops(flops: float, chip: str, name: str) -> float | None:
    """What we expect of operations on a chip; `None` where there is no prediction."""
    return _predicted(flops, PEAK_FLOPS, OF_FLOPS, chip, name)


def seconds_for_bytes(moved: float, chip: str, name: str) -> float | None:
    """What we expect of bytes read and written on a chip; `None` where there is no prediction."""
    return _predicted(moved, BANDWIDTH, OF_BANDWIDTH, chip, name)


def seconds_for_link(moved: float, chip: str) -> float | None:
    """What we expect of bytes from host memory, copied and transferred; `None` where there is no prediction."""
    return _predicted(moved, LINK, OF_LINK, chip, "copied")


def _predicted(amount: float, peaks: dict[str, float], shares: dict[str, float], chip: str, name: str) -> float | None:
    peak = next((peak for of, peak in peaks.items() if of in chip), None)
    return None if peak is None or name not in shares else amount / (peak * shares[name])
