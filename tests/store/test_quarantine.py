"""The quarantine is bounded by several processes at once."""

from __future__ import annotations

import os
import shutil
import uuid

from etils import epath

from cacheblend_jax.store import quarantine
from cacheblend_jax.store.places import Places


def test_what_another_process_removes_just_now_is_gone(tmp_path, monkeypatch):
    places = Places(epath.Path(tmp_path), local=True, writable=True)
    for _ in range(quarantine.MAX_PACKS + 3):
        (places.quarantine / uuid.uuid4().hex).mkdir(parents=True)
    stat, rmtree = os.stat, shutil.rmtree
    seen: list[str] = []

    def removed_first(function):
        def call(path, *arguments, **options):
            if str(places.quarantine) in str(path) and str(path) not in seen:
                seen.append(str(path))
                if len(seen) in (3, 7):
                    rmtree(path)
            return function(path, *arguments, **options)

        return call

    monkeypatch.setattr(os, "stat", removed_first(stat))
    quarantine.remove_oldest(places)
    assert len(list(places.quarantine.iterdir())) <= quarantine.MAX_PACKS
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "rmtree", lambda path, *_, **__: (rmtree(path), rmtree(path)))
    assert quarantine.empty(places) > 0
    assert list(places.quarantine.iterdir()) == []
