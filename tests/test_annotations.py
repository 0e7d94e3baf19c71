"""Annotations of the package are checked while tests run: of arguments, and of what is returned."""

from __future__ import annotations

import conftest
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import checked_once_called, unchecked, until_checked_enough
from jaxtyping import Float, TypeCheckError, jaxtyped

from cacheblend_jax.blend.deviation import kv_deviation
from pallas_kernels import apply_rope

CHECKED_CALLS = 3


@pytest.fixture(autouse=True)
def some_calls_are_checked(monkeypatch):
    monkeypatch.setattr(conftest, "CHECKED_CALLS", CHECKED_CALLS)


@jaxtyped(typechecker=checked_once_called)
def first_rows(rows: Float[np.ndarray, "rows width"], count: int, why: str = "") -> Float[np.ndarray, "{count} width"]:
    return rows[:count] if count else rows[0]


@jaxtyped(typechecker=checked_once_called)
def without_a_result(why: str):
    return why


def scaled_by(factor: float):
    @until_checked_enough(typechecker=checked_once_called)
    def scaled(rows: Float[np.ndarray, "rows width"]) -> Float[np.ndarray, "rows width"]:
        return rows * factor if factor else rows[0]

    return scaled


def is_refused(function, *arguments) -> bool:
    try:
        function(*arguments)
    except TypeCheckError:
        return True
    return False


def test_arguments_and_results_are_checked_in_every_call():
    rows = np.zeros((3, 2), np.float32)
    for _ in range(2):
        assert not is_refused(first_rows, rows, 2)
        assert is_refused(first_rows, rows[0], 2)
        assert is_refused(first_rows, rows, 2, 2)
        assert is_refused(first_rows, rows, 4)  # has fewer
        assert is_refused(first_rows, rows, 0)  # a row
        assert is_refused(without_a_result, 2)
        assert not is_refused(without_a_result, "2")


def test_those_of_the_package_are():
    rows = [jnp.ones((3, 2, 4))] * 4
    assert not is_refused(kv_deviation, *rows, jnp.ones(3, bool))
    assert is_refused(kv_deviation, *rows, jnp.ones(1, bool))  # would be broadcast
    with unchecked():
        kv_deviation(*rows, jnp.ones(1, bool))


@pytest.mark.parametrize("number_of_test", [1, 2])
def test_those_of_the_package_are_checked_in_the_first_calls_of_each_test(number_of_test):
    rows, one_token = jnp.ones((3, 2, 4)), jnp.ones((1, 2))
    arguments = rows, one_token, one_token  # would be broadcast
    assert [is_refused(apply_rope, *arguments) for _ in range(CHECKED_CALLS + 1)] == [True] * CHECKED_CALLS + [False]


@pytest.mark.parametrize("number_of_test", [1, 2])
def test_those_within_others_are_checked_whichever_of_them_is_called_first(number_of_test):
    rows, calls = np.ones((3, 2), np.float32), [True] * CHECKED_CALLS + [False]
    assert not is_refused(scaled_by(2.0), rows)
    assert is_refused(scaled_by(0.0), rows)
    assert [is_refused(scaled_by(factor), rows[0]) for factor in range(CHECKED_CALLS - 1)] == calls[2:]
    assert [scaled_by(factor)(rows).max() for factor in (3.0, 4.0)] == [3.0, 4.0]


def test_where_an_error_is_expected_the_package_itself_must_refuse():
    with pytest.raises(IndexError):
        first_rows(np.zeros((0, 2), np.float32), 0)
