"""The link from host memory to a device: what is page-locked and for how long, and a simulated link's speed."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import cacheblend_jax as cb
from cacheblend_jax.runtime import link as links
from cacheblend_jax.runtime.host_buffers import HostBuffers
from cacheblend_jax.runtime.link import DeviceLink, Link, SimulatedLink

FLOAT32 = np.dtype(np.float32)


class Client:
    """Maps memory for a device, as a GPU's client does; refuses to where `refusal` says why."""

    def __init__(self, refusal: str = "") -> None:
        self.refusal, self.mapped = refusal, {}

    def dma_map(self, address: int, size: int) -> None:
        if self.refusal:
            raise RuntimeError(self.refusal)
        assert not any(start < address + size and address < start + length for start, length in self.mapped.items())
        self.mapped[address] = size

    def dma_unmap(self, address: int) -> None:
        del self.mapped[address]


def placement():
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def device_link(client: Client) -> DeviceLink:
    """The link of a device that is not a CPU."""
    link = DeviceLink(placement())
    link.is_hidden, link._client = True, client
    return link


def test_buffers_are_page_locked_while_they_are_used():
    client = Client()
    buffers = HostBuffers(FLOAT32, device_link(client).page_lock)
    k, v = buffers.arrays((2, 100))
    assert client.mapped == {array.ctypes.data: 800 for array in (k, v)}
    buffers.arrays((50,))  # has room
    assert len(client.mapped) == 2
    larger = buffers.arrays((4, 100))
    assert client.mapped == {array.ctypes.data: 1600 for array in larger}  # the smaller ones are let go first
    assert all(not array.any() for array in larger)
    del buffers
    assert client.mapped == {}


def test_memory_that_cannot_be_page_locked_is_pageable_and_said_once(caplog):
    links._say_pageable.cache_clear()
    link = device_link(Client("RESOURCE_EXHAUSTED: no more memory to lock"))
    for _ in range(2):
        buffers = HostBuffers(FLOAT32, link.page_lock)
        k, v = buffers.arrays((2, 3))
        k[:], v[:] = 1, 2
        moved = link.put((k, v), placement())
        np.testing.assert_array_equal(moved[1], v)
    (record,) = caplog.records
    assert "memory could not be page-locked" in record.message
    assert "no more memory to lock" in record.message


def test_a_cpu_takes_buffers_over_as_they_are(caplog):
    link = DeviceLink(placement())
    assert isinstance(link, Link)
    if jax.default_backend() == "cpu":
        assert not link.is_hidden
        assert link.page_lock(np.zeros(4)) is None
        assert not caplog.records


def test_a_simulated_link_takes_latency_and_bytes_over_bandwidth():
    slept: list[float] = []
    link = SimulatedLink(100.0, 0.25, clock=lambda: 0.0, sleep=slept.append)
    assert isinstance(link, Link)
    assert link.is_hidden
    pair = np.ones(25, np.float32), np.full(25, 2, np.float32)
    for _ in range(2):  # both at the same instant
        np.testing.assert_array_equal(link.put(pair, placement()), pair)
    assert slept == pytest.approx([2.25, 4.25])


def test_a_link_without_speed_is_refused():
    with pytest.raises(cb.CacheBlendError, match="bytes_per_s must be positive and finite, got 0"):
        SimulatedLink(0)
