"""A user's cache of each test's own: none reads or writes that of whoever runs the tests."""

from __future__ import annotations

import pytest

from cacheblend_jax.model import user_cache


@pytest.fixture(autouse=True)
def own_user_cache(monkeypatch, tmp_path_factory):
    directory = tmp_path_factory.mktemp("user-cache")
    monkeypatch.setattr(user_cache, "user_cache_path", lambda _: directory)
    return directory
