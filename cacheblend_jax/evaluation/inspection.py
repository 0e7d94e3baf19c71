"""One prompt looked at closely: what reuse loses of it, token by token, and what a blend restores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float

from cacheblend_jax.blend import BlendConfig
from cacheblend_jax.choices import CONTINUATION_TOKENS, MODES
from cacheblend_jax.engine.engine import Engine
from cacheblend_jax.engine.prompt import Prompt, TokenizedPrompt, tokenize_prompt
from cacheblend_jax.engine.results import Generation, PrefillResult
from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.evaluation.attention import attention_between_parts, attention_deviation_by_layer
from cacheblend_jax.evaluation.evaluator import through_stop
from cacheblend_jax.evaluation.insights import candidates, neighbour_correlation, token_deviation
from cacheblend_jax.evaluation.metrics import continuation_distance
from cacheblend_jax.evaluation.parts import Part, parts_of, token_texts
from cacheblend_jax.evaluation.progress import Progress, no_progress
from cacheblend_jax.evaluation.settings import Setting
from cacheblend_jax.model import Model

ATTENTION_OF = ("full", "reuse", "blend")


@dataclass(frozen=True, eq=False)
class Inspection:
    """What an inspection found. All arrays count the prompt's tokens, or its parts, from the first one.

    Attributes:
        model: its name.
        blend: how the blend chose what to recompute.
        check_layer: where it first chose.
        parts: the prefix, each chunk, and the question.
        texts: what each token adds to the text.
        deviation: how far the KV that the store has is from full recompute; zero for what is not stored.
        remaining: how far the blend's KV is from full recompute.
        candidate: the tokens whose stored KV is not exact at its place.
        recomputed: which tokens' KV each layer of the blend computed afresh.
        attention: of the modes full, reuse and blend: what parts paid to parts, see `attention_between_parts`.
        attention_deviation: of reuse and blend: how far the question's attention is from full recompute, by layer.
        answers: of every mode.
    """

    model: str
    blend: BlendConfig
    check_layer: int
    parts: tuple[Part, ...]
    texts: tuple[str, ...]
    deviation: Float[np.ndarray, "layers tokens"]
    remaining: Float[np.ndarray, "layers tokens"]
    candidate: Bool[np.ndarray, " tokens"]
    recomputed: Bool[np.ndarray, "layers tokens"]
    attention: dict[str, np.ndarray]
    attention_deviation: dict[str, np.ndarray]
    answers: dict[str, Generation]

    @property
    def chunks(self) -> tuple[Part, ...]:
        """The parts that are chunks."""
        return self.parts[1:-1]

    @cached_property
    def cross_attention(self) -> dict[str, np.ndarray]:
        """What a chunk's token paid to other chunks in each mode of `attention`: the mean, by layer `[layers - 1]`."""
        sizes = np.array([part.num_tokens for part in self.chunks])
        others = sizes[:, None] * ~np.eye(len(sizes), dtype=bool) / max(sizes.sum(), 1)
        return {mode: (paid[:, 1:-1, 1:-1] * others).sum(axis=(1, 2)) for mode, paid in self.attention.items()}

    def cross_attention_share(self, mode: str) -> float:
        """Returns a mode's cross-chunk attention, over all layers, as a share of full recompute's; NaN without any."""
        whole = self.cross_attention["full"].sum()
        return float(self.cross_attention[mode].sum() / whole) if whole > 0 else float("nan")

    def mean_deviation(self) -> dict[str, float]:
        """Returns how far the candidates' KV is from full recompute in reuse and blend: means, NaN without any."""
        kv = {"reuse": self.deviation, "blend": self.remaining}
        return {
            mode: float(each[:, self.candidate].mean()) if self.candidate.any() else float("nan")
            for mode, each in kv.items()
        }

    def mean_neighbour_correlation(self) -> float:
        """Returns the mean rank correlation of neighbouring layers' deviations; NaN where there is none."""
        known = neighbour_correlation(self.deviation[1:, self.candidate]) if self.candidate.any() else np.zeros(0)
        known = known[np.isfinite(known)]
        return float(known.mean()) if known.size else float("nan")


def inspect(
    engine: Engine,
    prompt: Prompt,
    *,
    chunk_names: Sequence[str] | None = None,
    max_new_tokens: int = 32,
    progress: Progress = no_progress,
) -> Inspection:
    """Answers a prompt in every mode, and measures how far stored KV, and a blend, are from full recompute.

    The chunks that the store lacks are precomputed. Measuring takes the time of a few full prefills, and holds the KV
    of three.

    Args:
        engine: with the blend to be looked at, whose ratio is a number.
        chunk_names: what pictures and reports call the chunks, `"notes.md 3"` say; by default their numbers.
        max_new_tokens: longest answer.

    Raises:
        CacheBlendError: the prompt has no chunks, the ratio is `"auto"`, or there are not as many names as chunks.
        PromptError: the prompt cannot be laid out.
    """
    model, tokenized = engine.model, _tokenized(engine, prompt)
    if not tokenized.chunks:
        raise CacheBlendError("the prompt has no chunks: there is nothing to reuse, and nothing to inspect; add some")
    if engine.blend.is_auto:
        raise CacheBlendError("an inspection needs a blend whose ratio is a number, such as 0.15; 'auto' is none")
    parts = parts_of(tokenized, chunk_names)
    engine.precompute(prompt)
    outs, answers = {}, {}
    for mode in progress(MODES, "prefill"):
        out = engine.prefill(prompt, mode)
        answers[mode] = engine.complete(out, max_new_tokens=max_new_tokens)
        if mode in ATTENTION_OF:
            outs[mode] = out
    lengths = tuple(part.num_tokens for part in parts)
    attention = {
        mode: attention_between_parts(model, out, lengths) for mode, out in progress(outs.items(), "attention")
    }
    tokens_of_parts = (tokenized.prefix, *tokenized.chunks, tokenized.suffix)
    texts = [text for ids in tokens_of_parts for text in token_texts(model.tokenizer, ids.tolist())]
    return Inspection(
        model=model.name,
        blend=engine.blend,
        check_layer=_check_layer(model, engine.blend),
        parts=parts,
        texts=tuple(texts),
        deviation=np.where(outs["reuse"].recomputed[-1], 0.0, token_deviation(outs["reuse"], outs["full"])),
        remaining=token_deviation(outs["blend"], outs["full"]),
        candidate=candidates(outs["reuse"]),
        recomputed=outs["blend"].recomputed,
        attention=attention,
        attention_deviation={
            mode: _attention_deviation(model, outs[mode], outs["full"], tokenized.suffix.size)
            for mode in ("reuse", "blend")
        },
        answers=answers,
    )


def measure_ratios(
    engine: Engine,
    prompt: Prompt,
    selectors: Sequence[str],
    ratios: Sequence[float],
    *,
    continuation_tokens: int = CONTINUATION_TOKENS,
    progress: Progress = no_progress,
) -> tuple[list[Setting], list[dict[str, object]]]:
    """Measures how far blends of one prompt are from full recompute: what `plots.quality_by_ratio` takes.

    The KL is that of every token of full recompute's own answer. Each selector and ratio has programs to compile.

    Returns:
        The settings (reuse, and each selector at each ratio), and a line of measures for each; none without ratios.

    Raises:
        CacheBlendError: a selector is unknown, or a ratio is out of its range.
    """
    if not ratios:
        return [], []
    settings = [Setting("reuse"), *(Setting("blend", name, ratio) for name in selectors for ratio in ratios)]
    blends = [  # wrong ones are named before any work
        replace(engine.blend, selector=each.selector, recompute_ratio=each.ratio) if each.selector else engine.blend
        for each in settings
    ]
    question = _tokenized(engine, prompt).suffix.size
    engine.precompute(prompt)
    full = engine.prefill(prompt, "full")
    room = min(continuation_tokens, engine.model.config.max_positions - full.token_ids.size + 1)
    answer = engine.complete(full, max_new_tokens=room, stop_token_ids=()).token_ids
    ids = np.array(through_stop(answer, engine.model.stop_token_ids))
    wanted = engine.continuation_logits(full, ids)
    lines: list[dict[str, object]] = []
    for setting, blend in progress(list(zip(settings, blends, strict=True)), "ratios"):
        out = engine.prefill(prompt, setting.mode, blend=blend)
        distance = continuation_distance(engine.continuation_logits(out, ids), wanted, ids)
        attention = _attention_deviation(engine.model, out, full, question)
        measures: dict[str, object] = {"kl": float(distance.kl.mean()), "attention_deviation": float(attention.mean())}
        lines.append({"setting": setting.label, "kind": "all"} | measures)
    return settings, lines


def _tokenized(engine: Engine, prompt: Prompt) -> TokenizedPrompt:
    config = engine.model.config
    return tokenize_prompt(
        prompt, engine.model.tokenizer, vocab_size=config.vocab_size, max_tokens=config.max_positions
    )


def _check_layer(model: Model, blend: BlendConfig) -> int:
    return model.config.check_layer if blend.check_layer is None else blend.check_layer


def _attention_deviation(model: Model, out: PrefillResult, full: PrefillResult, question: int) -> np.ndarray:
    length = full.token_ids.size
    first_query = length - max(question, 1)  # without a question, the prompt's last token takes its place
    return attention_deviation_by_layer(model, full.token_ids, first_query, out.padded_cache, full.padded_cache)
