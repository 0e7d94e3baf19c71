"""A pin and a process that forked meanwhile, whose descriptors are of the same open file."""

from __future__ import annotations

import os

import pytest

from cacheblend_jax.store.pins import BusyError, Pin

pytest.importorskip("fcntl")


def test_what_is_let_go_is_free_though_a_forked_process_has_its_descriptor(tmp_path):
    pin = Pin(tmp_path)
    copy = os.dup(pin._descriptor)  # as the fork has it
    pin.close()
    Pin(tmp_path, alone=True).close()
    os.close(copy)


def test_a_forked_process_does_not_let_go_what_its_parent_holds(tmp_path, monkeypatch):
    pin = Pin(tmp_path)
    copy = os.dup(pin._descriptor)  # as the parent has it
    monkeypatch.setattr(os, "getpid", lambda: -1)
    pin.close()
    with pytest.raises(BusyError):
        Pin(tmp_path, alone=True)
    os.close(copy)
