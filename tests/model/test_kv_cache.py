"""The records of keys and values."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from cacheblend_jax.model import KVCache, LayerKV


@pytest.mark.parametrize(("record", "shape"), [(KVCache, (2, 3, 1, 4)), (LayerKV, (3, 1, 4))])
def test_records_of_arrays_can_be_compared_and_kept_in_sets(record, shape):
    """Each is equal to itself alone: comparing field by field raised."""
    one, other = (record(jnp.zeros(shape), jnp.zeros(shape)) for _ in range(2))
    assert one == one
    assert one != other
    assert len({one, other}) == 2
