import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.indexing import at_each, block_of, entry_of, part_of, with_block, with_entry

ARRAY = np.arange(24, dtype=np.float32).reshape(4, 6)


@pytest.mark.parametrize(
    ("by", "wanted"),
    [
        (lambda x, i: entry_of(x, i), ARRAY[2]),
        (lambda x, i: part_of(x, i, 3, axis=1), ARRAY[:, 2:5]),
        (lambda x, i: block_of(x, (i, i), (1, 3)), ARRAY[2:3, 2:5]),
        (lambda x, i: at_each(x, jnp.stack([i, i + 1])), ARRAY[[2, 3]]),
        (lambda x, i: at_each(x, (i, jnp.stack([i, i + 1]))), ARRAY[2, [2, 3]]),
        (lambda x, i: with_entry(x, jnp.zeros(6), i)[2], np.zeros(6)),
        (lambda x, i: with_block(x, jnp.zeros((1, 6)), (i, 0))[2], np.zeros(6)),
    ],
)
def test_parts_are_those_of_numpy_and_no_place_counts_from_the_end(by, wanted):
    np.testing.assert_array_equal(jax.jit(by)(ARRAY, 2), wanted)
    assert "select_n" not in str(jax.make_jaxpr(by)(ARRAY, 2))


def test_the_packages_take_parts_at_traced_places_by_these_functions():
    root = Path(__file__).parents[2]
    files = [path for package in ("cacheblend_jax", "pallas_kernels") for path in (root / package).rglob("*.py")]
    users = {path.name for path in files if re.search(r"\bdynamic_(update_)?(index|slice)", path.read_text())}
    assert users == {"indexing.py", "kv_cache.py"}
