"""The facade: what users call. `Prefiller` runs a prefill, `TokenStream` decodes an answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cacheblend_jax.blend import BlendConfig
from cacheblend_jax.blend.buckets import Buckets
from cacheblend_jax.blend.config import blend_config
from cacheblend_jax.engine.assembly import assemble
from cacheblend_jax.engine.batches import BatchOfPrompts, generate_all, sharing_reads
from cacheblend_jax.engine.chunk_lookup import ChunkLookup, look_up_chunks
from cacheblend_jax.engine.delays import PREFETCH_LAYERS, Estimator
from cacheblend_jax.engine.extending import extend_context
from cacheblend_jax.engine.fitted_context import FittedContext
from cacheblend_jax.engine.generation import Decoding, TokenStream, continuation_logits
from cacheblend_jax.engine.kernels import prove_kernels, with_kernels
from cacheblend_jax.engine.layout import PlacedChunk, check_mode
from cacheblend_jax.engine.planner import Planner
from cacheblend_jax.engine.precomputing import place_ahead, store_ahead
from cacheblend_jax.engine.profile import Profile
from cacheblend_jax.engine.prompt import Prompt, TextOrIds, TokenizedPrompt
from cacheblend_jax.engine.results import BackgroundStats, Generation, PrefillResult, StoredKeys
from cacheblend_jax.engine.warmup import Sizes, prompt_tasks, run_tasks, warm_up
from cacheblend_jax.model.model import Model
from cacheblend_jax.model.sampling import Sampling
from cacheblend_jax.runtime.link import Link
from cacheblend_jax.runtime.trace import Trace
from cacheblend_jax.store import ChunkStore, Store


class Engine:
    """Answers prompts from stored chunk KV.

    Args:
        model: what `load_model` returned.
        store: where chunk KV is kept; a memory-only one of default size if `None`.
        blend: how the blend chooses the tokens to recompute, unless a request says otherwise. `"auto"` is
            `BlendConfig(recompute_ratio="auto")`: the controller chooses the ratio of each request, and what to load.
        context_tokens: how many of the prefix's first tokens a chunk is precomputed after; `None`: all of them.
        context: text, token ids or a `FittedContext` that follow them there, the same for all prompts: a chunk that is
            computed as a text's beginning deviates more from its place in a prompt. It costs time only when chunks are
            precomputed. Chunks computed after another context are other entries of the store. `None`: the text that
            the store remembers, or else `neutral_text()` where the model can read it; nothing with
            `context_tokens=None`, so that first chunks are exact. `""`: nothing.
        length_buckets: sizes to pad lengths to, ascending. Few sizes mean few programs to compile, but more padding.
            `None`: many sizes, with at most 3.1 % padding above 1024 tokens.
        executor: `"resident"` (all cached KV on the device, one program), `"streamed"` (each layer's KV arrives
            while others compute), or `"auto"`: streamed where a chunk comes from a tier slower than host memory, or,
            on a GPU or TPU, from host memory.
        prefetch_layers: while streaming, how many layers of cached KV may be on the device at a time; of pages, which a
            GPU reads out of host memory by itself, those of four times as many.
        profile: what the controller estimates delays from: a `Profile` or its path; `None`: the profile that
            `calibrate` saved for this model, device and store, or else a quick estimate.
        kernels: how attention and blending are computed. `"auto"`: on a GPU, by the Pallas kernels that were found
            right and faster than XLA on this very device, by XLA else. The first engine of a dtype and head_dim on a
            GPU finds out, which takes up to a minute; the user's cache remembers it. `"xla"`: by XLA. `"pallas"`, or a
            kernel's name: by it wherever it can, unproven. The environment variable `PALLAS_KERNELS_IMPLEMENTATION`
            says what `"auto"` means.
        link: the way from host memory to the model's devices: a `SimulatedLink` for planning with a machine that is not
            at hand; `None`: the devices' own.
        kept_bytes: device memory for stored KV that stays there after a streamed prefill, for prompts with the same
            chunks at the same places; `None`: on a GPU or TPU, a quarter of what is free. It gives way where a prefill,
            or an answer's cache, lacks memory.
        store_missing: whether chunks that a request lacked are computed alone and stored, in the background, after its
            first token. Without it only `precompute` stores.
        hosts_timeout_s: where the model's mesh spans several processes, how long one waits for another, the compiling
            of programs included. Each process makes the same engine, and calls the same methods in the same order.

    Raises:
        CacheBlendError: unknown kernels, a check layer the model does not have, or another invalid argument.
    """

    def __init__(
        self,
        model: Model,
        store: Store | None = None,
        blend: BlendConfig | str | None = None,
        *,
        context_tokens: int | None = 4,
        context: TextOrIds | FittedContext | None = None,
        length_buckets: Sequence[int] | None = None,
        executor: str = "auto",
        prefetch_layers: int = PREFETCH_LAYERS,
        profile: Profile | Path | str | None = None,
        kernels: str = "auto",
        link: Link | None = None,
        kept_bytes: int | None = None,
        store_missing: bool = True,
        hosts_timeout_s: float = 300.0,
    ) -> None:
        self.model = model = with_kernels(model, kernels)
        self.store: Store = ChunkStore() if store is None else store
        self.blend = blend_config(blend)
        self.context_tokens = context_tokens
        parts = assemble(
            model,
            self.store,
            self.blend,
            context_tokens=context_tokens,
            context=context,
            length_buckets=length_buckets,
            executor=executor,
            prefetch_layers=prefetch_layers,
            profile=profile,
            link=link,
            kept_bytes=kept_bytes,
            store_missing=store_missing,
            hosts_timeout_s=hosts_timeout_s,
        )
        self._context, self._planner, self._groups = parts.context, parts.planner, parts.groups
        self._agreement, self._background, self._prefiller = parts.agreement, parts.background, parts.prefiller
        prove_kernels(model)  # last: it may take a minute, and wrong arguments are said at once

    def precompute(
        self,
        prompt: Prompt | Sequence[TextOrIds],
        *,
        prefix: TextOrIds = "",
        progress: Callable[[int, int], None] | None = None,
    ) -> StoredKeys:
        """Computes and stores the KV of a prompt's chunks, or of chunks to be used after `prefix`; skips those stored.

        A text `prefix` has no control tokens (see `Prompt`); for one that has, pass a prompt. Returns the keys of the
        chunks that are stored, in order; where some are not, for want of room, the log says so and `unstored` has their
        numbers. What is found stored is evicted as if it were stored now. `progress` is called with the number of
        chunks done and their total.

        Raises:
            PromptError: as for `prefill`, before anything is computed.
        """
        chunks = self._place(prompt, prefix)
        storing = self.store, self._groups, self._background, progress, self._agreement
        return store_ahead(chunks, *storing)

    def look_up(self, prompt: Prompt | Sequence[TextOrIds], *, prefix: TextOrIds = "") -> list[ChunkLookup]:
        """Returns what the store holds of what `precompute` would store; computes nothing and counts no use.

        Raises:
            PromptError: as for `precompute`.
        """
        return look_up_chunks(self.model, self.store, self._place(prompt, prefix))

    def prefill(
        self,
        prompt: Prompt | TokenizedPrompt,
        mode: str = "blend",
        *,
        blend: BlendConfig | str | None = None,
        trace: Trace | None = None,
        only_if_ready: bool = False,
        group: int | None = None,
        between: Callable[[], object] | None = None,
    ) -> PrefillResult:
        """Prefills a prompt; chunks that the store lacks are computed in place, and stored after the first token.

        Args:
            prompt: what `check` has returned is not checked again.
            mode: `"full"` (full recompute), `"prefix"` (exact entries only: prefix caching), `"reuse"` (full KV reuse)
                or `"blend"`.
            blend: for this request, in place of the engine's.
            trace: collects what happened when: reading, transfer, and the computation of each layer.
            only_if_ready: do not wait for the compiler, nor for a chunk that is being stored.
            group: on a mesh with `data`, the number of the group of devices that computes it; `None`: the least busy.
            between: called about every 100 ms while layers are computed, between two of them, if all of them seem to
                take longer; what it raises ends the prefill. Never called where the model is on several hosts.

        Raises:
            PromptError: an unknown mode, or an invalid prompt (see `tokenize_prompt`).
            NotReadyError: there is something to wait for, with `only_if_ready`.
            CacheBlendError: a check layer the model does not have, or a group that the mesh does not have.
        """
        asked = self._prefiller.tokenize(prompt), mode, self._planner_for(blend)
        return self._prefiller.prefill(*asked, trace, only_if_ready=only_if_ready, group=group, between=between)

    def check(self, prompt: Prompt, mode: str = "blend", blend: BlendConfig | str | None = None) -> TokenizedPrompt:
        """Returns a prompt's token ids, without prefilling it; raises what `prefill` would for these arguments."""
        check_mode(mode)
        self._planner_for(blend)
        return self._prefiller.tokenize(prompt)

    def generate(
        self,
        prompt: Prompt,
        mode: str = "blend",
        *,
        blend: BlendConfig | str | None = None,
        max_new_tokens: int = 32,
        sampling: Sampling | None = None,
        stop_token_ids: Sequence[int] | None = None,
        on_token: Callable[[int, str], None] | None = None,
        tokens_at_once: int | None = None,
    ) -> Generation:
        """Prefills and decodes, greedily unless `sampling` says otherwise.

        Args:
            blend: for this request, in place of the engine's.
            max_new_tokens: at most this many, the first one included; the model's maximum length is a limit, too.
            stop_token_ids: decoding ends before any of these; the model's own by default.
            on_token: called with each token's id and the text it adds.
            tokens_at_once: how many tokens the device decodes, at most 64, before `on_token` is called with them.
                `None`: what takes about 50 ms.

        Raises:
            PromptError: as for `prefill`, or `max_new_tokens` or `tokens_at_once` is no such whole number.
        """
        how = self._decoding(max_new_tokens, sampling, stop_token_ids, tokens_at_once)
        out = self.prefill(prompt, mode, blend=blend)
        return self._stream(out, how).to_its_end(on_token)

    def prefill_batch(
        self, prompts: Sequence[Prompt], mode: str = "blend", *, blend: BlendConfig | str | None = None
    ) -> list[PrefillResult]:
        """As `prefill`, of several prompts: a chunk that they share is read once from a tier slower than host memory.

        All prompts are checked before the first is prefilled. On a mesh with `data`, groups of devices prefill
        different prompts at the same time; so do the cores of a CPU.
        """
        with self._batch_of(prompts, mode, blend) as batch:
            return self._groups.each(partial(batch.prefill, mode=mode, blend=blend), prompts)

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        mode: str = "blend",
        *,
        blend: BlendConfig | str | None = None,
        max_new_tokens: int = 32,
        sampling: Sampling | None = None,
        stop_token_ids: Sequence[int] | None = None,
    ) -> list[Generation]:
        """As `generate`, of several prompts, up to eight of which are decoded together (`Scheduler`).

        On a mesh with groups of devices eight is rounded up to as many for each: nine, where there are three. Programs
        are compiled for the length of the longest; a `Scheduler` that stays spares that.
        """
        with self._batch_of(prompts, mode, blend) as batch:
            return generate_all(batch, prompts, mode, blend, max_new_tokens, sampling, stop_token_ids)

    def stream(
        self,
        prompt: Prompt | PrefillResult,
        mode: str = "blend",
        *,
        blend: BlendConfig | str | None = None,
        max_new_tokens: int = 32,
        sampling: Sampling | None = None,
        stop_token_ids: Sequence[int] | None = None,
        tokens_at_once: int | None = None,
    ) -> TokenStream:
        """As `generate`, but returns an iterator over `(token id, text it adds)`.

        The prefill has run when this returns; a result in the prompt's place needs none. The iterator's `generation` is
        the answer so far.
        """
        how = self._decoding(max_new_tokens, sampling, stop_token_ids, tokens_at_once)
        out = prompt if isinstance(prompt, PrefillResult) else self.prefill(prompt, mode, blend=blend)
        return self._stream(out, how)

    def complete(
        self,
        out: PrefillResult,
        *,
        max_new_tokens: int = 32,
        sampling: Sampling | None = None,
        stop_token_ids: Sequence[int] | None = None,
        on_token: Callable[[int, str], None] | None = None,
        tokens_at_once: int | None = None,
    ) -> Generation:
        """Decodes from a prefill, as `generate` does after its own, with the same arguments; `out` is not changed."""
        how = self._decoding(max_new_tokens, sampling, stop_token_ids, tokens_at_once)
        return self._stream(out, how).to_its_end(on_token)

    def extend(self, before: PrefillResult | TokenStream, more: TextOrIds) -> PrefillResult:
        """Goes on after a prefill, or after an answer as far as its stream was read: a conversation's next turn.

        The KV of what was said stays as it is; `more` is prefilled over all of it, exactly: after a full prefill, the
        result is that of another. `before` is not changed, and may be continued in other ways.

        Args:
            more: text, whose control tokens stay text, or token ids (`Prompt.follow_up`).

        Raises:
            PromptError: `more` is empty or invalid, or the whole is longer than the model takes.
        """
        context = before.context
        return extend_context(self._groups.model_of(context.cache), self.buckets, context, more)

    def continuation_logits(self, out: PrefillResult, token_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Returns float32 logits `[tokens, vocab]`: what each token of a given continuation would be drawn from.

        The first row is the prefill's own logits; each further one has seen the prompt and the tokens before it
        (teacher forcing), in one pass over the blended cache. `out` is not changed.

        Raises:
            PromptError: no tokens, ids out of range, or more than the model's maximum length has room for.
        """
        return continuation_logits(self._groups.model_of(out.padded_cache), self.buckets, out, token_ids)

    def warmup(
        self,
        max_tokens: int,
        *,
        modes: Sequence[str] = ("blend",),
        prefix_tokens: int = 0,
        suffix_tokens: int = 64,
        chunk_tokens: int = 0,
        max_new_tokens: int = 1,
        pausing: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> int:
        """Compiles the programs that prompts of up to `max_tokens` need, so that none of them waits for the compiler.

        This covers prompts whose chunks are all stored, and those none of whose chunks is, or can be read. With an
        automatic ratio, the controller then considers only what is compiled. A blend that a request brings (`blend=`)
        has programs of its own. Several programs are compiled at a time; returns how many there were. With JAX's
        persistent compilation cache on, the next process only reads them.

        Args:
            prefix_tokens: covers prompts with a stored prefix of this many tokens, and without one.
            suffix_tokens: covers questions of up to this many tokens.
            chunk_tokens: also compiles what computes missing chunks of up to this many tokens for the store. Where
                chunks are precomputed after the whole prefix (`context_tokens`), the first one is exact; then it also
                covers first chunks of up to this many tokens. That may take many times the programs; `length_buckets`
                reduces them.
            max_new_tokens: also compiles what decodes up to this many tokens.
            pausing: also compiles what prefills long prompts while answers of a `Scheduler` run: with pauses, in which
                these go on. What is long, a profile or a quick estimate says.
            progress: called with the number of tasks done and their total.

        Raises:
            CacheBlendError: `max_tokens` is beyond the model's maximum, or another argument is invalid.
        """
        sizes = Sizes(max_tokens, tuple(modes), prefix_tokens, suffix_tokens, chunk_tokens, max_new_tokens)
        compute = self._prefiller.estimator().compute if pausing else None
        compiled = warm_up(sizes, self._planner, self._groups, self._context, progress, compute)
        self._prefiller.is_warm = True
        return compiled

    def prepare(
        self,
        prompt: Prompt,
        modes: Sequence[str] = ("blend",),
        *,
        max_new_tokens: int = 1,
        precomputed: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Compiles what it takes to precompute a prompt, and then to answer it in each of these modes.

        Without `precomputed`: what it takes to answer it with what the store has now. Nothing is computed: the model
        may be the `outline` of one whose weights are still loading. With an automatic ratio, a blend's own program is
        compiled when the request comes. `progress` is called with the number of tasks done and their total.
        """
        tokenized = self._prefiller.tokenize(prompt)
        chunks = self._prefiller.place(tokenized, "blend")
        placed = {mode: self._prefiller.place(tokenized, mode) for mode in modes}
        compiled_by = self._planner, self._groups, self.store
        run_tasks(prompt_tasks(tokenized, chunks, placed, max_new_tokens, precomputed, *compiled_by), progress)

    @property
    def buckets(self) -> Buckets:
        """How lengths are padded."""
        return self._planner.buckets

    @property
    def lanes(self) -> int:
        """How many prompts each group of devices prefills at a time: two on a CPU with several cores, else one."""
        return self._groups.lanes_each

    def estimator(self) -> Estimator:
        """Returns what the controller estimates delays from: the profile, or else a quick estimate."""
        return self._prefiller.estimator()

    @property
    def background_stats(self) -> BackgroundStats:
        """What was left undone after requests so far."""
        return self._background.stats

    def flush(self) -> None:
        """Waits until every chunk missed so far is stored, and written to disk where the store has a directory."""
        self._background.flush_on_all()

    def close(self) -> None:
        """Finishes storing, ends the engine's threads and gives the device's memory back that layers stayed in.

        Chunks missed later are computed, but not stored. A later prompt whose chunks are streamed starts threads again.
        """
        self._background.close()
        self._prefiller.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _place(self, prompt: Prompt | Sequence[TextOrIds], prefix: TextOrIds) -> list[PlacedChunk]:
        """Places a prompt's chunks, or chunks to be used after `prefix`, whose number is not limited."""
        return place_ahead(prompt, prefix, self._prefiller, self._context, self.model)

    def _batch_of(
        self, prompts: Sequence[Prompt], mode: str, blend: BlendConfig | str | None
    ) -> AbstractContextManager[BatchOfPrompts]:
        opened_by = self._prefiller, self._planner_for, self.store
        return sharing_reads(self, *opened_by, prompts=prompts, mode=mode, blend=blend)

    def _stream(self, out: PrefillResult, how: Decoding) -> TokenStream:
        return TokenStream(self._groups.model_of(out.padded_cache), self.buckets, out, how, self._agreement)

    def _decoding(self, *arguments: Any) -> Decoding:
        with self._agreement.request():
            how = Decoding(*arguments)
            self._agreement.alike("generate", how.asked)
        return how

    def _planner_for(self, blend: BlendConfig | str | None) -> Planner:
        return self._planner if blend is None else replace(self._planner, blend=blend_config(blend))
