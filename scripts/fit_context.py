"""Fits a context to a model: embeddings that chunks are precomputed after, so that blends lose less quality.

Prompts are made of the texts given, as `ask` would make them: ten pieces of a few documents, shuffled, and a question
on something that they name. Half of the answers are the model's own, by full recompute; half are the words that follow
one of the pieces. The loss is the KL divergence of a blend (selector `query`, at ratios of 0.15 and 0.3 in turn) from
full recompute over the answer; the model's weights stay as they are. The result serves prompts of other kinds, too
(docs/results.md). Needs the extra `training`:

    python scripts/fit_context.py --model smollm2 --texts docs/ notes/ --out smollm2-context.safetensors
    cacheblend-jax ask --model smollm2 --context smollm2-context.safetensors --docs notes/ "…"

The idea is KV Packet's (arXiv 2604.13226), which fits soft tokens around documents.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float

import cacheblend_jax as cb
from cacheblend_jax.choices import CONTINUATION_TOKENS
from cacheblend_jax.documents import read_documents
from cacheblend_jax.engine.contexts import neutral_text
from cacheblend_jax.engine.prompt import TokenizedPrompt, tokenize_prompt
from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.evaluation.simulated_blend import (
    Choice,
    DensePrompt,
    chunk_kv,
    dense_prompts,
    distance,
    full_logits,
    greedy_answers,
    kept_by_layer,
    padded_size,
    simulated_blend,
)
from cacheblend_jax.model import Model, ModelConfig
from cacheblend_jax.model.encoding import encode
from cacheblend_jax.model.params import Params, stacked
from cacheblend_jax.model.rope import Angles, rope_tables
from cacheblend_jax.model.transformer import embedder

SINK = 4  # tokens of the prefix that stand before the context, as in an engine
RATIOS = (0.15, 0.3)
QUESTIONS = (
    "What is said about {}?",
    "Who or what is {}?",
    "What do the texts say on {}? Answer in one sentence.",
    "Explain {} by the texts above.",
    "Summarise what matters about {}.",
    "When and where does {} occur?",
    "Why is {} named here?",
    "Which facts about {} are given?",
)


@dataclass(frozen=True)
class Sizes:
    """What a training prompt is made of.

    Attributes:
        pieces: how many.
        words: of each.
        answer: tokens of an answer at most.
    """

    pieces: int = 10
    words: int = 60
    answer: int = 64

    @property
    def least(self) -> int:
        """Words that a text must have: half of the pieces come from it at most, with gaps between them."""
        return -(-self.pieces // 2) * 2 * self.words + self.answer


TRAINING = Sizes()


def drawn(texts: Sequence[str], sizes: Sizes, seed: int) -> Iterator[tuple[list[str], str, str]]:
    """Yields, without end, pieces of two to four texts, a question, and the words that follow a piece.

    Raises:
        CacheBlendError: no text is long enough.
    """
    long_enough = [words for text in texts if len(words := text.split()) >= sizes.least]
    if not long_enough:
        raise CacheBlendError(f"no text has {sizes.least} words, as a training prompt takes; give longer ones")
    rng = random.Random(seed)
    while True:
        pieces, tails = [], []
        sources = rng.choices(long_enough, [len(words) for words in long_enough], k=rng.choice((2, 3, 4)))
        for number, words in enumerate(sources):
            count = sizes.pieces // len(sources) + (number < sizes.pieces % len(sources))
            start, gap = rng.randrange(len(words) - sizes.least + 1), rng.choice((0, 0, sizes.words))
            for _ in range(count):
                end = start + sizes.words
                pieces.append(" ".join(words[start:end]))
                start = end + gap
            tails.append(" ".join(words[end : end + sizes.answer]))
        rng.shuffle(pieces)
        names = re.findall(r"(?:[A-Z][a-z]+ )*[A-Z][a-z]+", " ".join(pieces)) or ["the subject"]
        yield pieces, rng.choice(QUESTIONS).format(rng.choice(names)), rng.choice(tails)


def training_prompts(
    model: Model, texts: Sequence[str], count: int, *, sizes: Sizes = TRAINING, seed: int = 0
) -> list[DensePrompt]:
    """Returns prompts with their answers, all padded to the same shapes; every second answer is the model's own.

    Raises:
        CacheBlendError: no text is long enough.
    """
    tokenized: list[TokenizedPrompt] = []
    tails = []
    for pieces, question, tail in drawn(texts, sizes, seed):
        prompt = cb.Prompt.to_answer(model.tokenizer, pieces, question)
        room = {"vocab_size": model.config.vocab_size, "max_tokens": model.config.max_positions - sizes.answer}
        tokenized.append(tokenize_prompt(prompt, model.tokenizer, **room))
        tails.append(encode(model.tokenizer, tail)[: sizes.answer])
        if len(tokenized) == count:
            break
    size = padded_size(max(parts.token_ids.size for parts in tokenized) + sizes.answer)
    answers = [list(ids) for ids in tails]
    own = min(sizes.answer, CONTINUATION_TOKENS)
    answers[::2] = greedy_answers(model, tokenized[::2], size, own)
    return dense_prompts(tokenized, answers, size, seed, scored=sizes.answer)


def choice_at(ratio: float, prompt: DensePrompt, config: ModelConfig) -> Choice:
    """Returns what selector `query` goes by, but for the question's attention, which `blend_kl` measures."""
    keep = kept_by_layer(config.num_layers, int(prompt.candidate.sum()), ratio, config.check_layer)
    one = np.float32(1)
    return Choice(np.ones_like(prompt.drawn), mass_exponent=one, deviation_exponent=one, first=np.int32(1), keep=keep)


def blend_kl(
    embeddings: Float[Array, "context hidden"],
    params: Params,
    prompt: DensePrompt,
    choice: Choice,
    angles: Angles,
    *,
    config: ModelConfig,
) -> Float[Array, ""]:
    """Returns the KL divergence, nats a token of the answer, of a blend from full recompute.

    The blend is of chunks that were precomputed after the embeddings. What the question pays to each token is measured
    by full reuse of them.
    """
    reference = full_logits(params, prompt, angles, config=config)
    ids = jnp.concatenate([prompt.token_ids[:SINK], jnp.full(embeddings.shape[0], -1, jnp.int32)])
    rows = jnp.pad(embeddings, ((SINK, 0), (0, 0)))
    chunk_angles = angles.take(slice(0, ids.size + prompt.chunks.shape[1]))
    at_once = prompt.chunks.shape[0] if jax.default_backend() != "cpu" else 1
    cached = chunk_kv(params, prompt, ids, chunk_angles, rows, config=config, at_once=at_once)
    none = choice.replace(keep=jnp.zeros_like(choice.keep))
    fixed = jax.tree.map(lax.stop_gradient, cached)
    mass = simulated_blend(params, prompt, fixed, none, angles, config=config, with_mass=True).mass
    blend = simulated_blend(params, prompt, cached, choice.replace(mass=mass), angles, config=config)
    return distance(blend.logits, lax.stop_gradient(reference), prompt.num_scored).kl


def fit(
    model: Model,
    prompts: Sequence[DensePrompt],
    *,
    tokens: int = 64,
    steps: int = 120,
    batch: int = 8,
    seed: int = 0,
    begin: Float[np.ndarray, "context hidden"] | None = None,
) -> tuple[cb.FittedContext, list[float]]:
    """Fits `tokens` embeddings; returns the context, and the loss of each step.

    Args:
        prompts: see `training_prompts`; each step takes `batch` of them.
        begin: what the fit begins with; by default the embeddings of the neutral text's first tokens.
    """
    model, config = model.with_kernels("xla"), model.config  # kernels have no gradients
    params = stacked(model.params)
    if begin is None:
        ids = jnp.asarray(encode(model.tokenizer, neutral_text())[:tokens])
        begin = np.asarray(embedder(params, config).embed(ids), np.float32)
    embeddings = jnp.asarray(begin)
    keys, chunk_tokens = prompts[0].token_ids.size, prompts[0].chunks.shape[1]
    angles = rope_tables(config, max(keys, SINK + embeddings.shape[0] + chunk_tokens))
    scale = float(jnp.sqrt((embeddings**2).mean()))
    rate = optax.warmup_cosine_decay_schedule(0.0, 0.02 * scale, min(15, steps // 2), steps, 0.0006 * scale)
    optimizer = optax.adam(rate, b2=0.98)

    def update(embeddings: jax.Array, state: optax.OptState, params: Params, given: tuple) -> tuple:
        def loss(embeddings: jax.Array) -> jax.Array:
            def one(given: tuple[DensePrompt, Choice]) -> jax.Array:
                return blend_kl(embeddings, params, *given, angles, config=config)

            return lax.map(one, given, batch_size=batch if jax.default_backend() != "cpu" else None).mean()

        value, gradient = jax.value_and_grad(loss)(embeddings)
        change, state = optimizer.update(gradient, state)
        return optax.apply_updates(embeddings, change), state, value

    rng, state, losses = np.random.default_rng(seed), optimizer.init(embeddings), []
    began = time.perf_counter()
    for step in range(steps):
        chosen = [prompts[number] for number in rng.choice(len(prompts), batch, replace=len(prompts) < batch)]
        ratio = RATIOS[step % len(RATIOS)]
        choices = [choice_at(ratio, prompt, config) for prompt in chosen]
        given = jax.tree.map(lambda *each: np.stack(each), *zip(chosen, choices, strict=True))
        embeddings, state, loss = model.runner(update, embeddings, state, params, given)
        losses.append(float(loss))
        if step % 10 == 9 or step == steps - 1:
            recent = np.mean(losses[-10:])
            print(f"step {step + 1} of {steps}, {time.perf_counter() - began:.0f} s: loss {recent:.4f}", flush=True)
    return cb.FittedContext.of(model, np.asarray(embeddings)), losses


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="a checkpoint's directory or hub id, a GGUF file, or smollm2")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--texts", nargs="+", required=True, metavar="PATH", help="documents, or directories of them")
    parser.add_argument("--tokens", type=int, default=64, help="embeddings to fit")
    parser.add_argument("--prompts", type=int, default=320, help="training prompts to make")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=8, help="prompts a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where it goes: a .safetensors file")
    parsed = parser.parse_args(arguments)
    if parsed.out.suffix != ".safetensors":
        raise CacheBlendError(f"--out must end in .safetensors, got {str(parsed.out)!r}")
    documents = read_documents(parsed.texts)
    model = cb.load_model(parsed.model, dtype=parsed.dtype)
    if model.config.num_experts and model.platform == "cpu":
        raise CacheBlendError(f"model {model.name!r} has experts, whose products have no gradient on a CPU; use a GPU")
    if model.tokenizer is None:
        raise CacheBlendError(f"model {model.name!r} has no tokenizer; texts need one")
    prompts = training_prompts(model, [document.text for document in documents], parsed.prompts, seed=parsed.seed)
    options = {"tokens": parsed.tokens, "steps": parsed.steps, "batch": parsed.batch, "seed": parsed.seed}
    context, _ = fit(model, prompts, **options)
    context.save(parsed.out)
    print(f"wrote {parsed.out}")


if __name__ == "__main__":
    try:
        main()
    except CacheBlendError as error:
        sys.exit(f"fit_context: {error}")
