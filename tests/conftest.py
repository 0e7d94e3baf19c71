"""Checks the package's annotations while tests run (jaxtyping, beartype), and shares small models between tests."""

from __future__ import annotations

import collections
import contextlib
import functools
import gc
import importlib.metadata
import inspect
import json
import os
import sys
import threading
from dataclasses import replace
from pathlib import Path

# The suite is mostly compilation: what one test has compiled, the others (and the next run) need not compile again.
CACHE = Path(__file__).parents[1] / ".pytest_cache" / "compiled"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2**30))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Noting where in the source each operation stands takes a twentieth of tracing and compiling, and no test reads it.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
# These flags save four fifths of compiling: among them, not to cut small programs up for several threads. From jax 0.11
# on there are no other emitters to choose, and cutting costs nothing. The passes left out verify what each pass made,
# split long sums into several loops, and turn products of a matrix and a vector into products of matrices.
QUICKLY, AS_USERS = {"xla_backend_optimization_level": 0}, {"xla_backend_optimization_level": 3}
QUICKLY |= {"xla_disable_hlo_passes": "hlo-verifier,tree_reduction_rewriter,gemv-rewriter"}
AS_USERS |= {"xla_disable_hlo_passes": ""}
if importlib.metadata.version("jax") < "0.11":
    QUICKLY |= {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}
    AS_USERS |= {"xla_cpu_use_fusion_emitters": True, "xla_cpu_parallel_codegen_split_count": 32}
FLAGS = [f"--{name}={str(value).lower()}" for name, value in QUICKLY.items()]
FLAGS.append("--xla_force_host_platform_device_count=8")  # meshes need devices
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])

import jax  # noqa: E402
import jaxtyping  # noqa: E402
from beartype import BeartypeConf, beartype  # noqa: E402
from flax import struct  # noqa: E402
from jaxtyping import install_import_hook, jaxtyped  # noqa: E402

_record = struct.dataclass


def _checked_record(cls, **options):
    """A record whose shapes are checked where the package makes one, not where a tree function rebuilds it.

    JAX rebuilds records with whatever leaves it has: stacked, abstract, or none at all. Loops over shapes make records
    of shapes.
    """
    record = _record(cls, **options)
    rebuild = record.__init__

    def make_or_rebuild(self, *args, **kwargs):
        made_here = sys._getframe(1).f_globals.get("__name__", "").startswith("cacheblend_jax")
        of_shapes = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves((args, kwargs)))
        (self._checked_init if made_here and not of_shapes else functools.partial(rebuild, self))(*args, **kwargs)

    record._checked_init = jaxtyped(rebuild, typechecker=beartype)
    record.__init__ = make_or_rebuild
    record.__no_type_check__ = True  # the import hook would check every one
    return record


PACKAGES = ("cacheblend_jax", "pallas_kernels")
# Of a function in a test: later calls are as a rule of the same kinds, and most of what is called. CI runs fewer tests
# on its newest Python, and has time for more there.
CHECKED_CALLS = 1 if sys.version_info < (3, 12) else 8
_this_thread = threading.local()
_checks: collections.Counter = collections.Counter()  # of each function, in the running test
_checked_enough: list = []  # functions that it has called so often, marked as `typing.no_type_check` does
_written: dict = {}  # the checks of a function within another, which is made anew at each call of that


def _decorated(module: str, qualname: str):
    """Returns the package's function of that name as the import hook has replaced it; `None` for one within another."""
    found = sys.modules[module] if module.startswith(PACKAGES) else None
    for name in qualname.split("."):
        found = getattr(found, "__dict__", {}).get(name)
    return getattr(found, "fget", getattr(found, "__func__", found))


def checked_once_called(function):
    """Has beartype write a function's checks at its first call: most functions are never called in a given process.

    jaxtyping asks for two: of the arguments with what is returned, then of the arguments alone, before the call. The
    second finds nothing that the first does not, unless the call raises; it is left out where there is a first, as it
    takes a tenth of tracing. The two are asked for one after the other, in one thread.

    After `CHECKED_CALLS` checks in a test, the package's function is marked as `typing.no_type_check` would;
    for one within another, `until_checked_enough` sees to it.
    """
    check, name = None, (function.__module__, function.__qualname__)
    wanted = (*name, str(function.__annotations__))
    has_first = getattr(_this_thread, "checks_results", None) == name
    _this_thread.checks_results = None if has_first or "return" not in function.__annotations__ else name
    if has_first:
        return lambda *args, **kwargs: None

    def call(*args, **kwargs):
        nonlocal check
        if check is None and (check := _written.get(wanted)) is None:
            conf = BeartypeConf(is_pep484_tower=True)  # an int may stand for a float
            check = _written[wanted] = beartype(function, conf=conf)
        _checks[name] += 1
        if _checks[name] == CHECKED_CALLS and (decorated := _decorated(*name)) is not None:
            decorated.__no_type_check__ = True
            _checked_enough.append(decorated)
        return check(*args, **kwargs)

    return call


def until_checked_enough(*, typechecker):
    """The import hook's decorator, which takes longer than most functions within others run: those get it when called.

    Such a function is made anew at each call of the other: none of its name is checked after `CHECKED_CALLS` in a test.
    """
    decorate = jaxtyped(typechecker=typechecker)

    def decorated(function):
        if not inspect.isfunction(function) or "<locals>" not in function.__qualname__:
            return decorate(function)
        checked, name = None, (function.__module__, function.__qualname__)

        @functools.wraps(function)
        def call(*args, **kwargs):
            nonlocal checked
            if jaxtyping.config.jaxtyping_disable or _checks[name] >= CHECKED_CALLS:
                return function(*args, **kwargs)
            if checked is None:
                checked = decorate(function)
            return checked(*args, **kwargs)

        return call

    return decorated


jaxtyping.jaxtyped = until_checked_enough
struct.dataclass = _checked_record
install_import_hook(PACKAGES, "conftest.checked_once_called")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import shared_programs  # noqa: E402

import cacheblend_jax as cb  # noqa: E402
from cacheblend_jax.model import model as model_module  # noqa: E402
from cacheblend_jax.model.config import ModelConfig  # noqa: E402
from cacheblend_jax.model.rope_config import RopeConfig  # noqa: E402
from cacheblend_jax.model.transformer import init_params, random_params  # noqa: E402
from cacheblend_jax.runtime import user_cache  # noqa: E402
from cacheblend_jax.runtime.programs import COMPILER_OPTIONS, compiler_options, mapped_share  # noqa: E402
from pallas_kernels import use_verdicts  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
# Tests compare float32 with references: a GPU multiplies it in TF32 by default, a TPU in bfloat16.
if jax.default_backend() != "cpu":
    jax.config.update("jax_default_matmul_precision", "highest")

HF = Path(__file__).parent / "data" / "hf"  # tiny checkpoints: scripts/make_hf_goldens.py
SHAPE = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_layers": 6, "num_heads": 4}
SHAPE |= {"num_kv_heads": 2, "head_dim": 8, "max_positions": 2048}
LLAMA3_ROPE = RopeConfig("llama3", 10000.0, 8.0, 32, 1.0, 4.0)
FAMILIES = {
    "llama2": ModelConfig(architecture="LlamaForCausalLM", **SHAPE | {"num_kv_heads": 4}),
    "llama3": ModelConfig(architecture="LlamaForCausalLM", **SHAPE, rope=LLAMA3_ROPE, tied_embeddings=True),
    "mistral": ModelConfig(architecture="MistralForCausalLM", **SHAPE, windows=(24,) * 6),
    "qwen2": ModelConfig(architecture="Qwen2ForCausalLM", **SHAPE, qkv_bias=True, windows=(None,) * 3 + (20,) * 3),
    "qwen3": ModelConfig(
        architecture="Qwen3ForCausalLM",
        **SHAPE | {"head_dim": 12},
        qk_norm=True,
        rope=RopeConfig("yarn", 10000.0, 4.0, 32),
    ),
    "gemma3": ModelConfig(
        architecture="Gemma3ForCausalLM",
        **SHAPE,
        activation="gelu_pytorch_tanh",
        qk_norm=True,
        norm_offset=1.0,
        post_norms=True,
        embedding_scale=32**0.5,
        attention_scale=12**-0.5,
        tied_embeddings=True,
        rope=RopeConfig("linear", 1e6, 8.0),
        local_rope=RopeConfig(),
        windows=(20, 20, None) * 2,
    ),
    # What OLMo 2, Granite, SmolLM3, Phi 3, Gemma 2 and gpt-oss each add to Llama, all in one.
    "every_option": ModelConfig(
        architecture="Olmo2ForCausalLM",
        **SHAPE,
        qk_norm=True,
        qk_norm_over_heads=True,
        pre_norms=False,
        post_norms=True,
        embedding_scale=12.0,
        attention_scale=0.2,
        attention_soft_cap=1.5,
        attention_sinks=True,
        logits_soft_cap=2.0,
        residual_scale=0.22,
        logits_scale=0.25,
        rotated=(True, False, True) * 2,
        windows=(20, None) * 3,
        rotary_dim=6,
        rope=RopeConfig("longrope", factor=8.0, original_max_positions=256),
        rope_divisors=(1.0, 2.0, 4.0),
        num_experts=4,
        experts_per_token=3,  # of as many, in bfloat16 the last is another one, where rounding decides, at little cost
        expert_size=24,
        experts_sum_to_one=True,
        expert_bias=True,
        glu_alpha=1.702,
        glu_limit=0.5,
    ),
}


# For tests of what recomputes attention's weights: quicker to compile than `every_option`.
GEMMA3_CAPPED = replace(FAMILIES["gemma3"], attention_soft_cap=1.5, attention_sinks=True, logits_soft_cap=2.0)
# Each stage more is a fifth more to compile; and engines of as many share their programs.
TWO_STAGES = cb.BlendConfig(selector="hkvd", num_stages=2)


def _params_drawn_singly(key, config, *, by_layer=None):
    """`random_params`, operation by operation where a test leaves their form open: what models share compiles once."""
    if by_layer is not None or jax.default_backend() != "cpu":
        return random_params(key, config, by_layer=by_layer)
    return init_params(key, config)


model_module.random_params = _params_drawn_singly


@contextlib.contextmanager
def unchecked():
    """Annotations are not checked in the body: it passes what they forbid, or calls very often."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


_raises = pytest.raises


@contextlib.contextmanager
def _raises_unchecked(*expected, **options):
    """`pytest.raises`, with annotations unchecked in its body: there, the package itself must refuse wrong values."""
    with _raises(*expected, **options) as info, unchecked():
        yield info


pytest.raises = _raises_unchecked


def _compiled_with(options, monkeypatch):
    monkeypatch.setitem(COMPILER_OPTIONS, "cpu", COMPILER_OPTIONS["cpu"] | options)
    compiler_options.cache_clear()
    with unchecked():
        yield
    compiler_options.cache_clear()


@pytest.fixture
def as_users_run_it(monkeypatch):
    """Programs as XLA makes them for users, and unchecked annotations."""
    yield from _compiled_with(AS_USERS, monkeypatch)


@pytest.fixture
def optimised(monkeypatch):
    """Optimised programs, but for the passes left out, and unchecked annotations: for tests that mostly run.

    With the emitters that users have, `demo` takes twice the time to compile, and wins less back.
    """
    yield from _compiled_with({"xla_backend_optimization_level": 2}, monkeypatch)


@pytest.fixture
def one_length(monkeypatch):
    """Evaluations pad all prompts to one length: compiling for three takes most of the time."""
    monkeypatch.setattr("cacheblend_jax.evaluation.evaluator.NUM_BUCKETS", 1)


class _NothingIsKept(set):
    def add(self, kind):
        """Ignores it: a command would keep programs and weights for the next, which no other test runs."""


@pytest.fixture(autouse=True)
def own_user_cache(monkeypatch, tmp_path_factory) -> Path:
    """Gives each test a user cache and a configuration of its own, not those of whoever runs the tests."""
    directory = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(user_cache, "_kept", _NothingIsKept())
    monkeypatch.setenv("XDG_CACHE_HOME", str(directory))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(directory))
    shared_programs.nothing_is_replaced()
    return directory / "cacheblend-jax"


@pytest.fixture(autouse=True)
def _annotations_are_checked_in_each_test():
    _checks.clear()
    yield
    while _checked_enough:
        _checked_enough.pop().__no_type_check__ = False


@pytest.fixture(autouse=True)
def _no_verdicts_stay():
    yield
    use_verdicts()


@pytest.fixture(scope="module", autouse=True)
def _room_for_compiled_programs():
    """A process may map only so many regions: beyond some, JAX's caches go, and models that tests share."""
    yield
    models = shared_engine.cache_clear, family_model.cache_clear
    for forget in (shared_programs.forget, jax.clear_caches, *models):
        if mapped_share() <= 0.4:  # to count them takes tens of milliseconds
            break
        forget()
        gc.collect()


@functools.cache
def family_model(name: str) -> cb.Model:
    return cb.model.random_model((FAMILIES | {"gemma3_capped": GEMMA3_CAPPED})[name], seed=7)


@functools.lru_cache(maxsize=8)  # each keeps its compiled programs, and a process may map only so many regions
def shared_engine(
    family: str, ratio: float = 0.15, selector: str = "hkvd", context_tokens: int | None = 4
) -> cb.Engine:
    """An engine whose compiled programs tests share; its store is emptied by `fresh_engine`."""
    blend = replace(TWO_STAGES, recompute_ratio=ratio, selector=selector)
    return cb.Engine(family_model(family), blend=blend, context_tokens=context_tokens)


def fresh_engine(*args, **options) -> cb.Engine:
    engine = shared_engine(*args, **options)
    engine.flush()
    engine.store.clear()
    return engine


# The second row of tests asks what other versions of Python and JAX change. What sets the other families apart is
# arithmetic that all of them do alike; this one has grouped heads, norms of q and k, norms before and after a part of a
# layer, tied embeddings, and layers that differ in window and RoPE.
FAMILIES_OF_EVERY_VERSION = ("gemma3",)
# How the ids begin of what rests on JAX, Orbax, transformers or the standard library where they differ from version to
# version. Within these files, tests are marked `once` that show no more of that than the others.
ON_EVERY_VERSION = (
    *("test_invariants.py", "test_doc_examples.py", "test_reprs.py", "cli/test_commands.py", "runtime/"),
    *("cli/test_cli.py::test_ask_answers_and_says_what_was_reused", "test_fit_context.py::test_the_loss_falls"),
    "model/test_gguf.py::test_a_converted_checkpoint_is_the_same_model[llama3]",
    *("engine/test_batches.py", "engine/test_engine.py", "engine/test_generation.py", "engine/test_streamed.py"),
    *("model/test_experts.py", "model/test_kv_cache.py", "model/test_loading.py", "model/test_model_goldens.py"),
    *("model/test_rope.py", "model/test_slot_cache.py", "serving/test_openai_client.py"),
    *("pallas_kernels/test_blend_kv.py", "pallas_kernels/test_pallas_kernels.py"),
    "pallas_kernels/test_selective_attention",
    *("store/test_chunk_store.py", "store/test_disk.py", "store/test_object_storage.py", "store/test_threads.py"),
)


def pytest_collection_finish():
    """Spares the garbage collector what was imported, and most of its rounds: tracing makes very many objects."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


# How the ids of tests that take long begin: they come first, lest one worker run one while the others have none left.
LONG = (
    "cli/test_cli.py::test_demo",
    "evaluation/test_evaluate.py::test_i8",
    "test_fault_harness.py",
    "test_gpu_bench.py",
)
# Of those that share most of their programs: they follow, for a worker to run them all.
SHARING = (
    *("engine/test_background.py", "engine/test_batches.py", "engine/test_context.py", "engine/test_controller.py"),
    *("engine/test_decode_by_layer.py", "engine/test_device_layers.py", "engine/test_engine.py"),
    *("engine/test_extending.py", "engine/test_generation.py", "engine/test_lanes.py", "engine/test_pages.py"),
    *("engine/test_pauses.py", "engine/test_quantised.py", "engine/test_streamed.py", "runtime/test_kept_programs.py"),
    *("runtime/test_trace.py", "store/test_device_tier.py", "test_invariants.py"),
)


def _place(item) -> int:
    name = item.nodeid.removeprefix("tests/")
    return 0 if name.startswith(LONG) else 1 if name.startswith(SHARING) else 2


def pytest_collection_modifyitems(items):
    """Marks `once` the tests of the other families, and all that are not `ON_EVERY_VERSION`; long ones come first."""
    items.sort(key=_place)
    for item in items:
        if not item.nodeid.removeprefix("tests/").startswith(ON_EVERY_VERSION):
            item.add_marker(pytest.mark.once)
        family = item.callspec.params.get("family") if hasattr(item, "callspec") else None
        if family in FAMILIES and family not in FAMILIES_OF_EVERY_VERSION:
            item.add_marker(pytest.mark.once)


@pytest.fixture(params=sorted(FAMILIES), scope="session")  # pytest then runs a family's tests together
def family(request) -> str:
    return request.param


def random_prompt(seed: int, chunk_lengths=(30, 40, 1, 25), prefix=9, suffix=7) -> cb.Prompt:
    rng = np.random.default_rng(seed)

    def ids(size: int) -> np.ndarray:
        return rng.integers(0, SHAPE["vocab_size"], size).astype(np.int32)

    return cb.Prompt(ids(prefix), [ids(size) for size in chunk_lengths], ids(suffix))


def relative_error(actual, wanted) -> float:
    actual, wanted = np.asarray(actual, np.float64), np.asarray(wanted, np.float64)
    return float(np.abs(actual - wanted).max() / np.abs(wanted).max())


def edit_json(path: Path, **changes) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | changes))


def refusal(path: Path, shorter_than: int = 500) -> str:
    """Returns the message, one line that is not long, with which a checkpoint is refused."""
    with pytest.raises(cb.CheckpointError) as error:
        cb.load_model(path)
    message = str(error.value)
    assert len(message.splitlines()) == 1
    assert len(message) < shorter_than
    return message
