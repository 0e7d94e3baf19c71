"""Programs kept on disk: found again by all that they depend on, the same bit for bit, and never believed blindly."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import family_model, random_prompt
from flax import struct

import cacheblend_jax as cb
from cacheblend_jax.runtime import kept_programs, user_cache
from cacheblend_jax.runtime.programs import Runner
from cacheblend_jax.runtime.user_cache import PROGRAMS, keep
from pallas_kernels.dispatch import OVERRIDE


@dataclass(frozen=True)
class Settings:
    factor: int


@struct.dataclass
class Record:
    x: jax.Array
    absent: jax.Array | None
    unit: str = struct.field(pytree_node=False)


class Pair(NamedTuple):
    left: jax.Array
    right: dict


traced: list[str] = []


def scaled(x: dict, unused: jax.Array, *, settings: Settings) -> tuple:
    traced.append("scaled")
    y = jnp.sin(x["x"]) * settings.factor
    return Record(y, None, "m"), Pair(y @ y, {"b": y[:1], "a": [y[1:]]})


def doubled(x: jax.Array) -> jax.Array:
    traced.append("doubled")
    return x * 2


def numbered(x: jax.Array) -> dict:
    return {10: x, 2: x + 1}


def weak(x: jax.Array) -> jax.Array:
    return jnp.where(x.sum() > 0, 1.0, 2.0)


def with_function(x: jax.Array, *, score) -> jax.Array:
    return score(x)


ARGUMENTS = {"x": np.arange(6, dtype=np.float32)}, np.zeros(1000, np.float32)


@pytest.fixture
def kept(monkeypatch, own_user_cache) -> Path:
    """Has this module's functions be the package's; returns where programs are kept."""
    monkeypatch.setattr(kept_programs, "PACKAGES", (__name__.partition(".")[0],))
    monkeypatch.setattr(kept_programs, "sources_digest", lambda: "sources")
    monkeypatch.setattr(user_cache, "_kept", set())
    traced.clear()
    keep(PROGRAMS)
    return own_user_cache / PROGRAMS


def run(factor: int = 3):
    """Runs `scaled` as a new process would."""
    return Runner("cpu")(scaled, *ARGUMENTS, settings=Settings(factor))


def files(directory: Path) -> list[Path]:
    return list(directory.iterdir()) if directory.exists() else []


def test_the_next_process_does_not_trace_and_computes_the_same(kept, monkeypatch):
    first, again = run(), run()
    assert traced == ["scaled"]
    assert len(files(kept)) == 1
    monkeypatch.setattr(user_cache, "_kept", set())
    plain = run()
    assert traced == ["scaled"] * 2
    for out in (first, again):
        assert jax.tree.structure(out) == jax.tree.structure(plain)
        jax.tree.map(np.testing.assert_array_equal, out, plain)


def test_nothing_is_kept_unless_asked(kept, monkeypatch):
    monkeypatch.setattr(user_cache, "_kept", set())
    run()
    assert not files(kept)


def test_what_a_program_does_not_use_is_no_argument_of_it(kept):
    for _ in range(2):
        runner = Runner("cpu")
        runner(scaled, *ARGUMENTS, settings=Settings(3))
        (text,) = runner.texts()
        assert "f32[1000]" not in text


def test_donated_buffers_are_overwritten_by_kept_programs_too(kept):
    for _ in range(2):
        x = jnp.arange(4.0)
        assert Runner("cpu")(doubled, x, donate=("x",)).tolist() == [0, 2, 4, 6]
        assert x.is_deleted()
    assert traced == ["doubled"]
    x = jnp.arange(4.0)
    Runner("cpu")(doubled, x)
    assert not x.is_deleted()


def other_static(monkeypatch):
    return run(factor=4)


def other_sources(monkeypatch):
    monkeypatch.setattr(kept_programs, "sources_digest", lambda: "others")
    return run()


def other_release_of_jax(monkeypatch):
    monkeypatch.setattr(jax, "__version__", "0.0")
    return run()


def other_setting_of_jax(monkeypatch):
    with jax.default_matmul_precision("highest"):
        return run()


def other_kernels(monkeypatch):
    monkeypatch.setenv(OVERRIDE, "xla")
    return run()


def other_shape(monkeypatch):
    return Runner("cpu")(scaled, {"x": np.ones(7, np.float32)}, ARGUMENTS[1], settings=Settings(3))


def other_structure(monkeypatch):
    return Runner("cpu")(scaled, {"x": ARGUMENTS[0]["x"], "y": ARGUMENTS[1]}, ARGUMENTS[1], settings=Settings(3))


OTHERS = [
    other_static,
    other_sources,
    other_release_of_jax,
    other_setting_of_jax,
    other_kernels,
    other_shape,
    other_structure,
]


@pytest.mark.parametrize("other", OTHERS)
def test_whatever_a_program_depends_on_is_another_program(kept, monkeypatch, other):
    run()
    other(monkeypatch)
    assert traced == ["scaled"] * 2
    assert len(files(kept)) == 2


def test_functions_that_the_package_does_not_have_are_not_kept(kept, monkeypatch):
    def of_the_user(x):
        return x * 2

    x = jnp.ones(3)
    for score in (of_the_user, lambda x: x * 2, jnp.negative):
        Runner("cpu")(with_function, x, score=score)
        Runner("cpu")(score, x)
    monkeypatch.setattr(kept_programs, "PACKAGES", ("cacheblend_jax",))
    run()
    assert not files(kept)
    monkeypatch.setattr(kept_programs, "PACKAGES", (__name__.partition(".")[0],))
    Runner("cpu")(with_function, x, score=doubled)  # found by its name
    assert len(files(kept)) == 1


def test_results_of_weak_type_stay_so(kept):
    for _ in range(2):
        assert Runner("cpu")(weak, jnp.ones(2)).weak_type
    assert not files(kept)


def test_results_that_json_would_name_otherwise_are_not_kept(kept):
    for _ in range(2):
        out = Runner("cpu")(numbered, jnp.zeros(2))
        assert (out[10].sum(), out[2].sum()) == (0, 2)
    assert not files(kept)


def test_sources_that_cannot_be_told_keep_nothing(tmp_path, monkeypatch):
    (tmp_path / "package").mkdir()
    module = tmp_path / "package" / "__init__.py"
    module.write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(kept_programs, "PACKAGES", ("package",))
    digest = kept_programs.sources_digest.__wrapped__
    monkeypatch.setattr(kept_programs, "BEGAN", module.stat().st_mtime - 1)
    assert digest() is None  # written since
    monkeypatch.setattr(kept_programs, "BEGAN", module.stat().st_mtime + 1)
    assert len(digest()) == 64
    module.unlink()
    assert digest() is None
    monkeypatch.setattr(kept_programs, "sources_digest", lambda: None)
    monkeypatch.setattr(user_cache, "_kept", {PROGRAMS})
    assert kept_programs.kept_or_lowered((), partial(doubled), (jnp.ones(2),), ()) is None


def test_an_answer_by_kept_programs_is_the_same_and_nothing_of_it_is_traced(own_user_cache, monkeypatch):
    blend = cb.BlendConfig(selector="hkvd", num_stages=1)
    prompt, model, found = random_prompt(5), family_model("llama2"), []
    monkeypatch.setattr(user_cache, "_kept", set())
    for is_kept in (False, True, True):
        if is_kept:
            keep(PROGRAMS)
        if len(found) == 2:
            monkeypatch.setattr(kept_programs, "_exported", lambda *_: pytest.fail("traced once more"))
        engine = cb.Engine(cb.Model(model.config, model.params), blend=blend)
        engine.precompute(prompt)
        out = engine.prefill(prompt)
        found.append((out.logits, engine.complete(out, max_new_tokens=3, stop_token_ids=()).token_ids))
        assert len(files(own_user_cache / PROGRAMS)) == (engine.model.runner.count if is_kept else 0)
    for logits, token_ids in found[1:]:
        np.testing.assert_array_equal(logits, found[0][0])
        assert token_ids == found[0][1]


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: b"", lambda content: content[::-1]])
def test_a_damaged_file_is_ignored_and_replaced(kept, damage):
    run()
    (file,) = files(kept)
    content = file.read_bytes()
    file.write_bytes(damage(content))
    run()
    assert traced == ["scaled"] * 2
    assert file.read_bytes() == content


def test_a_cache_that_cannot_be_written_costs_the_tracing_alone(kept):
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text("a file")
    assert run()[1].right["a"][0].shape == (5,)
    assert kept.read_text() == "a file"


def test_those_written_longest_ago_go_first(kept, monkeypatch):
    monkeypatch.setattr(kept_programs, "MOST_KEPT", 2)
    kept_programs._remove_old_ones.cache_clear()
    for factor in range(3):
        run(factor)
        kept_programs._remove_old_ones.cache_clear()
    assert len(files(kept)) == 2
    run(factor=2)
    assert traced == ["scaled"] * 3
