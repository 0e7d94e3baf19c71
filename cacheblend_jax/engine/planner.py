"""From a prompt's layout to a prefill: its plan, for which programs are compiled, and its inputs; its executor, too."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from cacheblend_jax.blend import BlendConfig
from cacheblend_jax.blend.buckets import FINE_BUCKETS, Buckets, buckets_up_to, small_bucket
from cacheblend_jax.blend.schedule import (
    Plan,
    full_plan,
    make_plan,
    survivor_counts,
)
from cacheblend_jax.blend.steps import Request
from cacheblend_jax.engine.layout import Layout
from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.model.config import ModelConfig
from cacheblend_jax.store import is_slow


def choose_executor(setting: str, tiers: Collection[str], *, host_streams: bool) -> str:
    """Returns the executor of a prefill that loads from these tiers; only this function decides it.

    Where nothing is loaded there is nothing to stream. `"auto"` streams where a tier is slower than host memory, and
    from there, too, where the link to the device runs beside computation; but not chunks that are on the device, which
    would have to come to the host first.

    Args:
        host_streams: whether it does (`runtime.link.Link.is_hidden`).
    """
    if not tiers or setting == "resident":
        return "resident"
    streams = any(map(is_slow, tiers)) or (host_streams and "device" not in tiers)
    return "streamed" if setting == "streamed" or streams else "resident"


@dataclass(frozen=True)
class Planner:
    """Plans the prefills of one model under one blend configuration; `at` fixes an automatic ratio.

    Raises:
        CacheBlendError: the blend's check layer is not one of the model's.
    """

    config: ModelConfig
    blend: BlendConfig
    buckets: Buckets = FINE_BUCKETS

    def __post_init__(self) -> None:
        last = max(self.config.num_layers - 1, 1)
        chosen = self.blend.check_layer
        if chosen is not None and chosen > last:
            raise CacheBlendError(
                f"check_layer must be in [1, {last}] for {self.config.num_layers} layers, got {chosen}"
            )

    @property
    def check_layer(self) -> int:
        """The blend's check layer, or else the model's own."""
        return self.config.check_layer if self.blend.check_layer is None else self.blend.check_layer

    def at(self, ratio: float) -> Planner:
        """Returns the planner of the same blend at a fixed ratio."""
        return replace(self, blend=self.blend.with_ratio(ratio))

    def blends(self, mode: str) -> bool:
        """Returns whether a mode recomputes candidates: at ratio 0 the blend is full KV reuse."""
        return mode == "blend" and self.blend.ratio > 0

    def plan(self, mode: str, length: int, exact: int, candidates: int) -> Plan:
        """Plans a prompt of `length` tokens, given how many of them are exact, and candidates.

        Where nothing is loaded, every mode is full recompute.
        """
        if mode == "full" or exact == candidates == 0:
            return full_plan(self.config.num_layers, length, self.buckets)
        blends = self.blends(mode)
        forced = length - exact - candidates
        return make_plan(
            num_layers=self.config.num_layers,
            length=length,
            active=length - exact if blends else forced,
            forced=forced,
            blend=self.blend if blends else None,
            check_layer=self.check_layer,
            buckets=self.buckets,
        )

    def plan_layout(self, layout: Layout, mode: str) -> tuple[Plan, Request]:
        """Plans a layout and fills in its traced inputs."""
        length = layout.token_ids.size
        plan = self.plan(mode, length, int(layout.exact.sum()), int(layout.candidate.sum()))
        skipped = layout.exact if self.blends(mode) else layout.exact | layout.candidate
        positions = np.flatnonzero(~skipped).astype(np.int32)
        forced = ~layout.candidate[positions]
        forced_rows = np.flatnonzero(forced)
        num_forced = forced_rows.size
        traced = _padding(plan)
        traced["length"] = np.asarray(length, np.int32)
        traced["context_length"] = np.asarray(layout.context_length, np.int32)
        traced["seed"] = np.asarray(self.blend.seed, np.int32)
        traced["keep"][:] = survivor_counts(plan, self.blend.ratio, positions.size - num_forced, num_forced)
        for name, values in (
            ("token_ids", layout.token_ids[positions]),
            ("positions", positions),
            ("forced", forced),
            ("chunk_starts", layout.chunk_starts[positions]),
            ("forced_rows", forced_rows[: plan.forced]),
            ("is_question", positions[forced_rows[: plan.forced]] >= layout.suffix_start),
        ):
            traced[name][: values.size] = values
        return plan, Request(**traced)

    def plans_up_to(
        self, most: int, modes: Sequence[str], prefix_tokens: int, suffix_tokens: int, chunk_tokens: int = 0
    ) -> list[Plan]:
        """Returns every plan of prompts of up to `most` tokens whose chunks are all stored.

        The prompts have no stored prefix or one of `prefix_tokens`, perhaps followed by an exact chunk of up to
        `chunk_tokens`, and a question of up to `suffix_tokens`. A plan changes only where a count passes from one
        bucket to the next, so only these borders are tried.
        """
        exact_ranges = {(0, 0), (prefix_tokens, prefix_tokens), (prefix_tokens, prefix_tokens + chunk_tokens)}
        lengths = [0, *buckets_up_to(self.buckets.length, most)]
        borders = [0, *buckets_up_to(self.buckets.active, most)]
        suffixes = {count + 1 for count in [0, *buckets_up_to(small_bucket, suffix_tokens), *borders]}
        plans: dict[Plan, None] = {}
        for (below, longest), (least, greatest), mode in itertools.product(pairwise(lengths), exact_ranges, modes):
            for active in {1, *borders, *(border + 1 for border in borders), below + 1 - greatest, most - least}:
                shortest, longest_here = max(below + 1, active + least), min(longest, most, active + greatest)
                if active < 1 or shortest > longest_here:
                    continue
                counts = {count for count in {*suffixes, active} if count <= min(suffix_tokens, active)}
                # Whether any token is exact may matter: the shortest prompt has the fewest.
                for length, suffix in itertools.product({shortest, longest_here}, counts):
                    candidates = 0 if mode in ("full", "prefix") else active - suffix
                    plans[self.plan(mode, length, length - active, candidates)] = None
        return list(plans)

    def recompute_ratio(self, layout: Layout, computed: list[np.ndarray]) -> float:
        """Returns candidates computed afresh / candidates, mean over the layers after the check layer."""
        candidates = int(layout.candidate.sum())
        later = computed[self.check_layer + 1 :] or computed[-1:]
        if candidates == 0:
            return 0.0
        return float(np.mean([layout.candidate[positions].sum() / candidates for positions in later]))


def _padding(plan: Plan) -> dict[str, Any]:
    """Returns the fields of a request that is all padding."""
    active, forced = plan.active, plan.forced
    return {
        "token_ids": np.zeros(active, np.int32),
        "positions": np.full(active, plan.cache_length, np.int32),
        "length": np.zeros((), np.int32),
        "forced": np.zeros(active, bool),
        "chunk_starts": np.zeros(active, np.int32),
        "context_length": np.zeros((), np.int32),
        "keep": np.zeros(len(plan.stages) - 1, np.int32),
        "forced_rows": np.full(forced, active, np.int32),
        "is_question": np.zeros(forced, bool),
        "oracle": np.zeros(active, np.float32),
        "seed": np.zeros((), np.int32),
    }


def empty_request(plan: Plan) -> Request:
    """Returns a request that is all padding, in the shapes that the plan's programs are compiled for."""
    return Request(**_padding(plan))
