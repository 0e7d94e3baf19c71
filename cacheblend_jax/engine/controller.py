"""The loading controller: chooses a recompute ratio from the delays of loading and of recomputing.

Recomputing a share r of a layer's tokens costs nothing as long as loading the next layer's KV takes longer. So the
ratio is as high as loading hides, and never below what quality requires (CacheBlend, arXiv 2405.16444, §5.1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from cacheblend_jax.blend.schedule import Plan
from cacheblend_jax.engine.delays import Estimator, Loadable
from cacheblend_jax.engine.planner import Planner
from cacheblend_jax.model.kv_cache import layer_bytes

Chunk = TypeVar("Chunk", bound=Loadable)
WORTHWHILE_SHARE = 0.95  # of the TTFT that loading all chunks takes: a smaller saving may be an error of the estimates


@dataclass(frozen=True)
class Decision:
    """What the controller chose for a request, and why. Delays are sums over layers, in seconds.

    Attributes:
        ratio: the recompute ratio, one of the blend's `auto_ratios`.
        bound: what limits it: `"floor"` (the least that quality requires, as loading hides no more), `"load"`
            (as much as loading hides), or `"cap"` (the highest ratio allowed; loading still takes longer).
        load_s, recompute_s: T_load, the way to the device included, and T_recompute at that ratio.
        predicted_ttft_s: the request's TTFT as predicted.
        computed_chunks: number of stored chunks (prefix included) recomputed because loading them would cost more.
        loaded_chunks: number of the others.
        computed_starts: the positions of `computed_chunks`.
        estimated_by: the profile that the delays come from.
    """

    ratio: float
    bound: str
    load_s: float
    recompute_s: float
    predicted_ttft_s: float
    computed_chunks: int
    loaded_chunks: int
    computed_starts: tuple[int, ...] = field(repr=False)
    estimated_by: str = ""


def decide(
    estimator: Estimator,
    planner: Planner,
    length: int,
    chunks: Sequence[Chunk],
    is_prepared: Callable[[Plan, Sequence[Chunk]], bool] | None = None,
    num_kept: Callable[[Plan, Sequence[Chunk]], int] = lambda *_: 0,
    kv_dtype: Callable[[Sequence[Chunk]], str | None] = lambda _: None,
) -> Decision:
    """Chooses the ratio of a request of `length` tokens, and which of its stored chunks to recompute.

    The chunks that load slowest per token are recomputed, as many as give the lowest predicted TTFT, if that saves more
    than 5 %. The ratio is `max(r where T_recompute = T_load, floor)`, rounded down to one of the blend's `auto_ratios`,
    so that loading remains the longer of the two; the first of these is the floor. Where chunks are not streamed but
    loaded first, or a pass of the question takes all layers first, nothing is hidden, and the ratio is the floor.

    Args:
        chunks: the stored ones; of an engine, with open handles.
        is_prepared: whether a plan can run with some chunks without compiling; others would cost more than they save.
            `None`: all are considered. The plan that loads all chunks always is.
        num_kept: how many layers of some chunks' KV are on the device, so that a streamed prefill loads the others.
        kv_dtype: what some chunks' KV is quantised to on its way to the device.
    """
    num_layers = planner.config.num_layers
    slowest = sorted(chunks, key=lambda chunk: -estimator.load_s([chunk], num_layers) / chunk.num_tokens)
    options = []
    for dropped in range(len(chunks) + 1):
        kept = slowest[dropped:]
        option, plan = _best_ratio(estimator, planner, length, kept, num_kept, kv_dtype(kept))
        computed = tuple(sorted(chunk.start for chunk in slowest[:dropped]))
        if not dropped or is_prepared is None or is_prepared(plan, kept):
            options.append(replace(option, computed_chunks=dropped, computed_starts=computed))
    best = min(options, key=lambda option: option.predicted_ttft_s)
    return best if best.predicted_ttft_s < WORTHWHILE_SHARE * options[0].predicted_ttft_s else options[0]


def _best_ratio(
    estimator: Estimator,
    planner: Planner,
    length: int,
    chunks: Sequence[Chunk],
    num_kept: Callable[[Plan, Sequence[Chunk]], int],
    kv_dtype: str | None,
) -> tuple[Decision, Plan]:
    config = planner.config
    exact = sum(chunk.num_tokens for chunk in chunks if chunk.exact)
    candidates = sum(chunk.num_tokens for chunk in chunks) - exact

    def plan_at(ratio: float) -> Plan:
        return planner.at(ratio).plan("blend", length, exact, min(candidates, length - exact - 1))

    floor, *higher_ratios = planner.blend.auto_ratios
    at_floor, is_streamed = plan_at(floor), estimator.executor_of(chunks) == "streamed"
    bytes_of_layer = layer_bytes(config, at_floor.cache_length, kv_dtype)
    kept = num_kept(at_floor, chunks) if is_streamed else 0
    load_s = estimator.delivery_s(chunks, config.num_layers, bytes_of_layer) * (config.num_layers - kept)
    ratio, recompute_s = floor, sum(estimator.compute.layer_seconds(at_floor))
    bound = "floor"
    hides = is_streamed and not at_floor.needs("question_mass")
    if candidates and hides:
        for higher in higher_ratios:
            seconds = sum(estimator.compute.layer_seconds(plan_at(higher)))
            if seconds > load_s:
                bound = "load" if ratio > floor else "floor"
                break
            ratio, recompute_s, bound = higher, seconds, "cap"
    plan = plan_at(ratio)
    ttft_s = estimator.ttft_s(plan, chunks, bytes_of_layer, kept)
    return Decision(ratio, bound, load_s, recompute_s, ttft_s, 0, len(chunks), (), estimator.name), plan


def explain(decision: Decision, ttft_s: float) -> str:
    """Returns a few lines that say what was decided and why, and the TTFT as predicted and as measured."""
    why = {
        "floor": "the least that quality requires, as loading hides no more",
        "load": "as much as loading hides",
        "cap": "the highest allowed, and loading still takes longer",
    }[decision.bound]
    lines = [
        f"recompute ratio {decision.ratio:g}: {why}",
        f"T_load {decision.load_s * 1e3:.1f} ms, T_recompute {decision.recompute_s * 1e3:.1f} ms, over all layers",
        f"{decision.loaded_chunks} stored chunks loaded, {decision.computed_chunks} recomputed, as loading costs more",
        f"TTFT predicted {decision.predicted_ttft_s * 1e3:.1f} ms, measured {ttft_s * 1e3:.1f} ms",
        f"estimated by {decision.estimated_by}",
    ]
    return "\n".join(lines)
