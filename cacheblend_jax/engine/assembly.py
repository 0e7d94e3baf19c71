"""What an engine is made of, and which part knows which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cacheblend_jax.blend import BlendConfig
from cacheblend_jax.blend.buckets import Buckets
from cacheblend_jax.engine.agreement import Alone, Together, agreement_of
from cacheblend_jax.engine.background import Background
from cacheblend_jax.engine.contexts import chunk_context, default_context
from cacheblend_jax.engine.executors import Executors
from cacheblend_jax.engine.fitted_context import FittedContext
from cacheblend_jax.engine.groups import Groups
from cacheblend_jax.engine.kernels import asked_kernels
from cacheblend_jax.engine.layout import ChunkContext
from cacheblend_jax.engine.planner import Planner
from cacheblend_jax.engine.prefilling import Prefiller
from cacheblend_jax.engine.profile import Profile
from cacheblend_jax.engine.prompt import TextOrIds
from cacheblend_jax.errors import CacheBlendError, is_whole_number
from cacheblend_jax.model.model import Model
from cacheblend_jax.runtime.link import Link
from cacheblend_jax.store import Store
from cacheblend_jax.store.tiered_memory import SplitCopy


@dataclass(frozen=True, eq=False)
class Parts:
    """The parts of one engine."""

    context: ChunkContext
    planner: Planner
    groups: Groups
    agreement: Alone | Together
    background: Background
    prefiller: Prefiller


def assemble(
    model: Model,
    store: Store,
    blend: BlendConfig,
    *,
    context_tokens: int | None,
    context: TextOrIds | FittedContext | None,
    length_buckets: Sequence[int] | None,
    executor: str,
    prefetch_layers: int,
    profile: Profile | Path | str | None,
    link: Link | None,
    kept_bytes: int | None,
    store_missing: bool,
    hosts_timeout_s: float,
) -> Parts:
    """Makes an engine's parts; the arguments are those of `Engine`.

    Raises:
        CacheBlendError: an argument is invalid.
    """
    if context_tokens is not None and not is_whole_number(context_tokens, least=0):
        raise CacheBlendError(f"context_tokens must be None or a whole number of at least 0, got {context_tokens!r}")
    if context is None:
        context = "" if context_tokens is None else default_context(model, store)
    after = chunk_context(context, context_tokens, model)
    buckets = Buckets(None if length_buckets is None else tuple(length_buckets))
    planner = Planner(model.config, blend, buckets)

    def executors_of(group: Model, beside: Executors | None) -> Executors:
        return Executors(
            group,
            executor,
            prefetch_layers,
            beside=beside,
            buckets=buckets,
            tiers=store.tiers,
            context_embeddings=after.embeddings,
            drop_device=store.drop_device,
            link=link,
            kept_bytes=kept_bytes,
        )

    groups = Groups(model, executors_of)
    agreement = agreement_of(model, store, hosts_timeout_s)
    own = {"store_missing": store_missing, "check_layer": planner.check_layer, "kernels": asked_kernels(model)}
    agreement.alike("Engine", lambda: groups.first.settings() | own)
    to_device = SplitCopy(groups.first.to_device, model.kv_shares) if groups.first.uses_device_tier else None
    background = Background(store, groups.standalone, to_device, agreement)
    prefiller = Prefiller(
        model,
        store,
        groups,
        background,
        context=after,
        profile=profile,
        agreement=agreement,
        store_missing=store_missing,
    )
    return Parts(after, planner, groups, agreement, background, prefiller)
