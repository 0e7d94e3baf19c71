"""The facade: prompt to layout, store, plan, prefill, decode; missing chunks are stored after the first token."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np

from cacheblend_jax.blend import BlendConfig
from cacheblend_jax.blend.buckets import Buckets
from cacheblend_jax.blend.deviation import total_deviation
from cacheblend_jax.blend.flops import prefill_flops
from cacheblend_jax.blend.schedule import Plan
from cacheblend_jax.blend.steps import Request, needs
from cacheblend_jax.engine.background import Background
from cacheblend_jax.engine.controller import AutoBlend, Decision, Estimator, Stored, decide
from cacheblend_jax.engine.executors import Attempt, Execution, Timer, may_be_slow
from cacheblend_jax.engine.generation import decode
from cacheblend_jax.engine.layout import Found, Layout, Span, context_of, lay_out, look_up, spans_of
from cacheblend_jax.engine.loading import LostChunkError, Placed
from cacheblend_jax.engine.planner import Planner, computed_positions
from cacheblend_jax.engine.profile import profile_for
from cacheblend_jax.engine.prompt import (
    Prompt,
    TextOrIds,
    TokenizedPrompt,
    check_length,
    tokenize_parts,
    tokenize_prompt,
)
from cacheblend_jax.engine.results import GenerateStats, Generation, KVCache, PrefillResult, PrefillStats
from cacheblend_jax.engine.warmup import Sizes
from cacheblend_jax.errors import CacheBlendError, PromptError
from cacheblend_jax.model.decode import Sampling
from cacheblend_jax.model.model import Model
from cacheblend_jax.model.rope import rope_tables
from cacheblend_jax.runtime.trace import Trace
from cacheblend_jax.store import ChunkStore, ThrottledStore, is_slow

logger = logging.getLogger(__name__)


class Engine:
    """Answers prompts from stored chunk KV.

    Args:
        model: what `load_model` returned.
        store: where chunk KV is kept; a memory-only one of default size if `None`.
        blend: how the blend chooses the tokens to recompute; `"auto"` or an `AutoBlend`: the controller chooses the
            ratio of each request, and what to load.
        context_tokens: how many of the prefix's first tokens a chunk is precomputed after; `None`: all of them.
        length_buckets: sizes that lengths are padded to, ascending: few sizes for few programs to compile, at the price
            of padding. `None`: many, with at most 3.1 % padding above 1024 tokens.
        executor: `"resident"` (all cached KV on the device, one program), `"streamed"` (a layer's KV arrives while
            others compute), or `"auto"`: streamed where a chunk comes from a tier slower than host memory.
        prefetch_layers: the most layers of cached KV on the device while streaming.

    Raises:
        CacheBlendError: a check layer the model does not have, or another value that makes no sense.
    """

    def __init__(
        self,
        model: Model,
        store: ChunkStore | ThrottledStore | None = None,
        blend: BlendConfig | AutoBlend | str | None = None,
        *,
        context_tokens: int | None = 4,
        length_buckets: Sequence[int] | None = None,
        executor: str = "auto",
        prefetch_layers: int = 2,
    ) -> None:
        if context_tokens is not None and (not isinstance(context_tokens, int) or context_tokens < 0):
            raise CacheBlendError(
                f"context_tokens must be None or a whole number of at least 0, got {context_tokens!r}"
            )
        self.model = model
        self.store = ChunkStore() if store is None else store
        if isinstance(blend, str) and blend != "auto":
            raise CacheBlendError(f"blend must be a BlendConfig, an AutoBlend or 'auto', got {blend!r}")
        self.auto = AutoBlend() if isinstance(blend, str) else blend if isinstance(blend, AutoBlend) else None
        self.blend = self.auto.base if self.auto else blend if isinstance(blend, BlendConfig) else BlendConfig()
        self.context_tokens = context_tokens
        self._buckets = Buckets(None if length_buckets is None else tuple(length_buckets))
        self._planner = Planner(model.config, self.blend, self._buckets)
        self._execution = Execution(
            model,
            executor,
            prefetch_layers,
            buckets=self._buckets,
            may_be_slow=may_be_slow(self.store),
            may_be_on_device=self.store.device_bytes > 0,
        )
        self._lock = threading.RLock()
        self._is_warm = False  # whether programs were compiled in advance
        to_device = self._execution.to_device if self._execution.uses_device_tier else None
        self._background = Background(self.store, self._execution.standalone, to_device)

    def precompute(
        self,
        prompt: Prompt | Sequence[TextOrIds],
        *,
        prefix: TextOrIds = "",
        progress: Callable[[int, int], None] | None = None,
    ) -> list[str]:
        """Computes and stores the KV of a prompt's chunks, or of chunks to be used after `prefix`; skips those stored.

        Returns the chunks' keys, in order. `progress` is called with the chunks done and their total.

        Raises:
            PromptError: as `prefill`; before anything is computed.
        """
        config = self.model.config
        if isinstance(prompt, Prompt):
            tokenized = self._tokenize(prompt)
        else:
            tokenized = tokenize_parts(
                Prompt(prefix, prompt, np.zeros(0, np.int32)), self.model.tokenizer, config.vocab_size
            )
        context = context_of(tokenized.prefix, self.context_tokens)
        check_length(tokenized.prefix.size, config.max_positions, "the prefix")
        for i, chunk in enumerate(tokenized.chunks):
            check_length(context.size + chunk.size, config.max_positions, f"chunk {i} with its context")
        spans = self._spans(tokenized, "blend")
        for done, span in enumerate(spans):
            self._background.wait_for([span.missing.key])
            if span.missing.key not in self.store:
                # No request has asked for it yet: it goes before what one has.
                self.store.put(span.missing.key, self._execution.standalone(span.missing), wait=True, uses=0)
            if progress is not None:
                progress(done + 1, len(spans))
        return [span.missing.key for span in spans if not span.is_prefix]

    def prefill(self, prompt: Prompt, mode: str = "blend", *, trace: Trace | None = None) -> PrefillResult:
        """Prefills a prompt; what the store lacks is computed in place, and stored after the first token is out.

        Args:
            mode: `"full"` (full recompute), `"prefix"` (exact entries only: prefix caching), `"reuse"` (full KV reuse)
                or `"blend"`.
            trace: collects what happened when: reading, transfer, and the computation of each layer.

        Raises:
            PromptError: see `tokenize_prompt`; an unknown mode.
        """
        return self._prefill(self._tokenize(prompt), mode, trace)

    def _tokenize(self, prompt: Prompt) -> TokenizedPrompt:
        config = self.model.config
        return tokenize_prompt(
            prompt, self.model.tokenizer, vocab_size=config.vocab_size, max_tokens=config.max_positions
        )

    def _spans(self, tokenized: TokenizedPrompt, mode: str) -> list[Span]:
        return spans_of(
            tokenized,
            mode,
            context_tokens=self.context_tokens,
            fingerprint=self.model.fingerprint,
            salt=self.store.salt,
        )

    def _prefill(self, tokenized: TokenizedPrompt, mode: str, trace: Trace | None = None) -> PrefillResult:
        _ = self.model.fingerprint  # computed once a model, not a part of any request
        timer, lost = Timer(), set[str]()
        spans = self._spans(tokenized, mode)
        looked_s = timer.elapsed_s()
        self._background.wait_for_next([span.missing.key for span in spans])
        with self._lock:
            wait_s = timer.elapsed_s() - looked_s
            if self.auto is not None:
                with timer.stopped():
                    _ = self.estimator  # a quick estimate is no part of any request
            while True:
                try:
                    attempt = self._attempt(tokenized, spans, mode, lost, timer, trace)
                    break
                except LostChunkError as error:  # costs this request its hit, never its answer
                    logger.warning("a stored chunk could not be read and is computed instead: %s", error)
                    lost.add(error.key)
            ttft_s = timer.elapsed_s()
            logits = np.asarray(attempt.ran.out.logits)
        for missing in attempt.layout.to_store:
            self._background.store_later(missing, again=missing.key in lost)
        for span, chunk in attempt.layout.loaded:
            if is_slow(chunk.tier) or (chunk.tier == "host" and self._execution.uses_device_tier):
                self._background.promote_later(span.missing.key, chunk.num_bytes)
        return self._result(mode, attempt, logits, ttft_s, wait_s, len(lost))

    def _attempt(
        self,
        tokenized: TokenizedPrompt,
        spans: Sequence[Span],
        mode: str,
        lost: Collection[str],
        timer: Timer,
        trace: Trace | None,
    ) -> Attempt:
        """Runs a prefill, with what of the store is not `lost`.

        Raises:
            LostChunkError: a chunk could not be read.
        """
        context = context_of(tokenized.prefix, self.context_tokens)
        with ExitStack() as handles:
            found = look_up(spans, self.store, handles, lost=lost)
            planner, decision = self._planner, None
            if self.auto is not None and mode == "blend":
                decision = self._decide(tokenized, found)
                planner = self._planner_at(decision.ratio)
            compute = () if decision is None else decision.computed_starts
            layout = lay_out(tokenized, found, context_length=context.size, compute=compute)
            plan, request = planner.plan_layout(layout, mode)
            chunks = [Placed(span.missing.key, span.start, span.stop, chunk) for span, chunk in layout.loaded]
            with timer.stopped():
                compile_s = self._execution.compile(plan, self._execution.chosen(plan, chunks), chunks)
                if self._is_warm and compile_s > 0:
                    logger.warning("a request waited for the compiler: warm-up did not provide for %s", plan)
                self._add_oracle(plan, request, layout, chunks, tokenized)
            ran = self._execution.run(plan, request, chunks, trace)
            return Attempt(layout, plan, ran, compile_s, planner, decision)

    def _decide(self, tokenized: TokenizedPrompt, found: Sequence[Found]) -> Decision:
        """Asks the controller for a request's ratio and what to load."""
        assert self.auto is not None
        config = self.model.config
        stored = [
            Stored(each.span.start, each.chunk.num_tokens, each.chunk.num_bytes, each.chunk.tier, each.span.exact)
            for each in found
            if each.chunk is not None
        ]
        token_bytes = 2 * config.num_kv_heads * config.head_dim * jnp.dtype(config.dtype).itemsize
        length = tokenized.token_ids.size
        compiled = self._execution.has_compiled if self._is_warm else None
        return decide(self.estimator, self._planner, length, stored, token_bytes, self.auto.ratios, compiled)

    @cached_property
    def estimator(self) -> Estimator:
        """What the controller estimates delays from: the profile, or where there is none a quick estimate."""
        given = None if self.auto is None else self.auto.profile
        profile, name = profile_for(self.model, self.store.directory, given)
        ahead = (self._execution.host_layers, self._execution.prefetch_layers)
        return Estimator(
            name, profile.compute, profile.tiers, profile.transfer, *ahead, executor=self._execution.executor
        )

    def _planner_at(self, ratio: float) -> Planner:
        return replace(self._planner, blend=replace(self.blend, recompute_ratio=ratio))

    def _result(
        self, mode: str, attempt: Attempt, logits: np.ndarray, ttft_s: float, wait_s: float, damaged: int
    ) -> PrefillResult:
        layout, ran = attempt.layout, attempt.ran
        computed = computed_positions(attempt.plan, ran.out.stage_positions)
        stats = PrefillStats(
            mode=mode,
            tokens=layout.token_ids.size,
            ttft_s=ttft_s,
            host_s=ttft_s - ran.run_s - wait_s,
            load_s=ran.load_s,
            compile_s=attempt.compile_s,
            hits=layout.hits,
            misses=layout.misses,
            exact=int(layout.exact.sum()),
            candidates=int(layout.candidate.sum()),
            forced=int((~layout.exact & ~layout.candidate).sum()),
            recompute_ratio=attempt.planner.recompute_ratio(layout, computed),
            flops=prefill_flops(self.model.config, computed),
            peak_memory_bytes=ran.peak_memory_bytes,
            executor=ran.executor,
            damaged=damaged,
            decision=attempt.decision,
            wait_s=wait_s,
        )
        return PrefillResult(
            logits, layout.token_ids, ran.next_token, stats, KVCache(ran.out.k, ran.out.v), computed, attempt.plan
        )

    def generate(
        self,
        prompt: Prompt,
        mode: str = "blend",
        *,
        max_new_tokens: int = 32,
        sampling: Sampling | None = None,
        stop_token_ids: Sequence[int] | None = None,
        on_token: Callable[[int, str], None] | None = None,
    ) -> Generation:
        """Prefills and decodes, greedily unless `sampling` says otherwise.

        Args:
            max_new_tokens: at most this many, the first one included; the model's maximal length bounds it too.
            stop_token_ids: decoding ends before any of these; the model's own by default.
            on_token: called with each token's id and the text it adds, as soon as it is known.

        Raises:
            PromptError: as `prefill`; `max_new_tokens` is no positive count.
        """
        _check_max_new_tokens(max_new_tokens)
        return self.complete(
            self.prefill(prompt, mode),
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop_token_ids=stop_token_ids,
            on_token=on_token,
        )

    def complete(
        self,
        out: PrefillResult,
        *,
        max_new_tokens: int = 32,
        sampling: Sampling | None = None,
        stop_token_ids: Sequence[int] | None = None,
        on_token: Callable[[int, str], None] | None = None,
    ) -> Generation:
        """Decodes from a prefill; what `generate` does after it, with the same arguments. `out` stays as it is."""
        _check_max_new_tokens(max_new_tokens)
        stops = set(self.model.stop_token_ids if stop_token_ids is None else stop_token_ids)
        room = min(max_new_tokens, self.model.config.max_positions - out.token_ids.size + 1)
        token_ids: list[int] = []
        text, reason, decode_s = "", "length", 0.0
        for token, seconds in decode(self.model, self._buckets, out, room, sampling or Sampling()):
            if token in stops:
                reason = "stop"
                break
            token_ids.append(token)
            grown = self._decode_text(token_ids)
            if on_token is not None:
                on_token(token, grown[len(text) :])
            text = grown
            decode_s += seconds
        decoded = max(len(token_ids) - 1, 0)
        per_token = decode_s / decoded if decoded else 0.0
        return Generation(text, token_ids, GenerateStats(out.stats, decoded, per_token, reason))

    def warmup(
        self,
        max_tokens: int,
        *,
        modes: Sequence[str] = ("blend",),
        prefix_tokens: int = 0,
        suffix_tokens: int = 64,
        chunk_tokens: int = 0,
        max_new_tokens: int = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> int:
        """Compiles what prompts of up to `max_tokens` need, so that none of them waits for a compiler.

        For prompts whose chunks are all stored, or, with an automatic ratio, all recomputed; the controller then
        considers nothing that is not compiled. Returns how many programs were compiled, several at a time. With JAX's
        persistent compilation cache on, the next process only reads them.

        Args:
            prefix_tokens: with a stored prefix of so many tokens, and without one.
            suffix_tokens: with questions of up to so many.
            chunk_tokens: also what computes missing chunks of up to so many tokens, for the store. And where chunks are
                computed after the whole prefix (`context_tokens`), so that the first one is exact: what such prompts
                need if it has up to so many tokens. That may be many times the programs; fewer with `length_buckets`.
            max_new_tokens: also what decodes up to so many, on one device.
            progress: called with the programs done and their total.

        Raises:
            CacheBlendError: `max_tokens` is beyond the model's maximum, or another value makes no sense.
        """
        wanted = (*modes, *(["full"] if self.auto is not None else []))
        sizes = Sizes(max_tokens, wanted, prefix_tokens, suffix_tokens, chunk_tokens, max_new_tokens)
        blends = [self.blend] if self.auto is None else self.auto.configurations()
        planners = [replace(self._planner, blend=blend) for blend in blends]
        work = sizes.programs(self.model, planners, self._execution, self._buckets, self.context_tokens)
        before = self.model.programs.count
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for done, _ in enumerate(pool.map(lambda compile_one: compile_one(), work), 1):
                if progress is not None:
                    progress(done, len(work))
        self._is_warm = True
        return self.model.programs.count - before

    def flush(self) -> None:
        """Waits until every missing chunk seen so far is stored, on disk too where the store has a directory."""
        self._background.flush()

    def close(self) -> None:
        """Finishes what is being stored and stops the background thread; later misses are answered, but not stored."""
        self._background.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _add_oracle(
        self, plan: Plan, request: Request, layout: Layout, chunks: Sequence[Placed], tokenized: TokenizedPrompt
    ) -> None:
        """Fills the oracle's scores in from a full prefill, if the selector wants them."""
        if not needs(plan.selector, "oracle"):
            return
        full = self._prefill(tokenized, "full").padded_cache
        rows = min(full.k.shape[1], plan.cache_length)
        cos, sin = rope_tables(self.model.config, plan.cache_length)
        cached = self._execution.load(plan, chunks)
        scores = jax.jit(total_deviation)(
            *(x[:, :rows] for x in (full.k, full.v, cached.k, cached.v)), cos[:rows], sin[:rows], layout.token_ids.size
        )
        count = int(np.sum(request.positions < plan.cache_length))
        request.oracle[:count] = np.asarray(scores)[request.positions[:count]]

    def _decode_text(self, token_ids: list[int]) -> str:
        if self.model.tokenizer is None:
            return ""
        text = self.model.tokenizer.decode(token_ids, skip_special_tokens=True)
        # A character may span tokens: what is not whole yet is held back.
        return text.rstrip("\ufffd")


def _check_max_new_tokens(max_new_tokens: int) -> None:
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise PromptError(f"max_new_tokens must be a whole number of at least 1, got {max_new_tokens!r}")
