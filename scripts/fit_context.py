"""Fits a context to a model: embeddings that chunks are precomputed after, so that reusing their KV costs less quality.

Prompts are made of the texts given: pieces of three documents, shuffled, and as the question the words that follow one
of the pieces. The loss is the KL divergence of full KV reuse from full recompute over that question; the model's
weights stay as they are. The result serves prompts of other kinds, too (docs/results.md). Needs the extra `training`:

    python scripts/fit_context.py --model smollm2 --texts docs/ notes/ --out smollm2-context.safetensors
    cacheblend-jax ask --model smollm2 --context smollm2-context.safetensors --docs notes/ "…"

The idea is KV Packet's (arXiv 2604.13226), which fits soft tokens around documents.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int

import cacheblend_jax as cb
from cacheblend_jax.blend.layer_step import HostOrDevice, PromptSequence, layer_step
from cacheblend_jax.blend.resident import standalone
from cacheblend_jax.documents import read_documents
from cacheblend_jax.engine.contexts import neutral_text
from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.evaluation.simulated_blend import ChunkPlaces, chunk_kv
from cacheblend_jax.model import Model, ModelConfig
from cacheblend_jax.model.encoding import encode, opening
from cacheblend_jax.model.kv_cache import KVCache
from cacheblend_jax.model.params import Params, stacked
from cacheblend_jax.model.rope import Angles, rope_tables
from cacheblend_jax.model.transformer import embedder, rows_at

SINK = 4  # tokens of the prefix that stand before the context, as in an engine
PIECES, DOCUMENTS = 9, 3  # a prompt's, and of how many documents they are


@dataclass(frozen=True)
class Sizes:
    """Tokens of a training prompt: of each piece at least and at most, and of the question."""

    shortest: int = 60
    longest: int = 130
    question: int = 124

    @property
    def prompt(self) -> int:
        """Tokens of the longest prompt."""
        return SINK + PIECES * self.longest + self.question


TRAINING = Sizes()


@struct.dataclass
class Example(ChunkPlaces):
    """A training prompt, padded; its chunks are the pieces.

    Attributes:
        token_ids: of the whole prompt: sink, pieces, question.
        in_piece: which tokens are of pieces.
        question: positions of the question's tokens.
    """

    token_ids: Int[HostOrDevice, " tokens"]
    in_piece: HostOrDevice
    question: Int[HostOrDevice, " question"]


def examples(streams: Sequence[np.ndarray], sink: np.ndarray, sizes: Sizes, seed: int) -> Iterator[Example]:
    """Yields training prompts without end, drawn from documents' token ids.

    Raises:
        CacheBlendError: no document is long enough.
    """
    least = PIECES // DOCUMENTS * sizes.longest + sizes.question + 1
    long_enough = [stream for stream in streams if stream.size >= least]
    if not long_enough:
        raise CacheBlendError(f"no text has {least} tokens, the least that a training prompt takes; give longer ones")
    rng, weights = np.random.default_rng(seed), np.asarray([stream.size for stream in long_enough], float)
    while True:
        pieces, tails = [], []
        for number in rng.choice(len(long_enough), DOCUMENTS, p=weights / weights.sum()):
            stream = long_enough[number]
            start = int(rng.integers(0, stream.size - least + 1))
            for _ in range(PIECES // DOCUMENTS):
                size = int(rng.integers(sizes.shortest, sizes.longest + 1))
                pieces.append(stream[start : start + size])
                start += size
            tails.append(stream[start : start + sizes.question])
        order = rng.permutation(PIECES)
        yield example([pieces[i] for i in order], sink, tails[int(rng.integers(DOCUMENTS))], sizes)


def example(pieces: Sequence[np.ndarray], sink: np.ndarray, question: np.ndarray, sizes: Sizes) -> Example:
    """Pads a prompt; what stands after the question is seen by none of its tokens."""
    padded = np.zeros((len(pieces), sizes.longest), np.int32)
    ids, piece, offset = (np.zeros(sizes.prompt, np.int32) for _ in range(3))
    in_piece = np.zeros(sizes.prompt, bool)
    ids[: sink.size], start = sink, sink.size
    for number, each in enumerate(pieces):
        place = slice(start, start + each.size)
        padded[number, : each.size], ids[place] = each, each
        piece[place], offset[place], in_piece[place] = number, np.arange(each.size), True
        start += each.size
    ids[start : start + question.size] = question
    positions = np.arange(start, start + question.size, dtype=np.int32)
    return Example(piece, offset, padded, ids, in_piece, positions)


def reuse_kl(
    embeddings: Float[Array, "context hidden"], params: Params, prompt: Example, angles: Angles, *, config: ModelConfig
) -> Float[Array, " question"]:
    """Returns the KL divergence, nats, of full KV reuse from full recompute at each token of the question."""
    full = lax.stop_gradient(_whole(params, prompt, angles, config))
    alone = _placed(params, prompt, embeddings, angles, config)
    reused = jax.tree.map(lambda own, whole: jnp.where(prompt.in_piece[None, :, None, None], own, whole), alone, full)
    wanted = jax.nn.log_softmax(lax.stop_gradient(_question_logits(params, prompt, full, angles, config)))
    got = jax.nn.log_softmax(_question_logits(params, prompt, reused, angles, config))
    return (jnp.exp(wanted) * (wanted - got)).sum(axis=-1)


def reuse_loss(
    embeddings: Float[Array, "context hidden"], params: Params, batch: Example, angles: Angles, *, config: ModelConfig
) -> Float[Array, ""]:
    """Returns the mean of `reuse_kl` over a batch of prompts."""
    return lax.map(lambda prompt: reuse_kl(embeddings, params, prompt, angles, config=config), batch).mean()


def _whole(params: Params, prompt: Example, angles: Angles, config: ModelConfig) -> KVCache:
    sequence = PromptSequence(jnp.asarray(prompt.token_ids.size, jnp.int32), angles)
    return standalone(params, prompt.token_ids, None, jnp.zeros((), jnp.int32), sequence, config=config)


def _placed(params: Params, prompt: Example, embeddings: jax.Array, angles: Angles, config: ModelConfig) -> KVCache:
    """Returns the pieces' KV after the sink and the embeddings, every token's at its place in the prompt."""
    ids = jnp.concatenate([prompt.token_ids[:SINK], jnp.full(embeddings.shape[0], -1, jnp.int32)])
    rows = jnp.pad(embeddings, ((SINK, 0), (0, 0)))
    angles = angles.take(slice(0, ids.size + prompt.chunks.shape[1]))
    return chunk_kv(params, prompt, ids, angles, rows, config=config)


def _question_logits(
    params: Params, prompt: Example, cached: KVCache, angles: Angles, config: ModelConfig
) -> Float[Array, "question vocab"]:
    sequence = PromptSequence(prompt.question[-1] + 1, angles)
    rows = rows_at(embedder(params, config).embed(prompt.token_ids[prompt.question]), prompt.question, angles)
    step = jax.checkpoint(
        lambda rows, index: (layer_step(params, config, index, rows, cached.layer(index), sequence).rows, None)
    )
    rows, _ = lax.scan(step, rows, jnp.arange(config.num_layers))
    return embedder(params, config).logits(rows.hidden)


def fit(
    model: Model,
    streams: Sequence[np.ndarray],
    *,
    tokens: int = 64,
    steps: int = 170,
    batch: int = 4,
    seed: int = 0,
    sizes: Sizes = TRAINING,
    begin: np.ndarray | None = None,
) -> tuple[cb.FittedContext, list[float]]:
    """Fits `tokens` embeddings; returns the context, and the loss of each step.

    Args:
        streams: documents' token ids.
        begin: token ids whose embeddings the fit begins with; by default the neutral text's first.
    """
    model, config = model.with_kernels("xla"), model.config  # kernels have no gradients
    params = stacked(model.params)
    opened = [] if model.tokenizer is None else opening(model.tokenizer)
    sink = np.resize(np.asarray(opened or [0], np.int32), SINK)
    begin = np.asarray(encode(model.tokenizer, neutral_text())[:tokens], np.int32) if begin is None else begin
    embeddings = embedder(params, config).embed(jnp.asarray(begin)).astype(jnp.float32)
    angles = rope_tables(config, max(sizes.prompt, SINK + tokens + sizes.longest))
    scale = float(jnp.sqrt((embeddings**2).mean()))
    rate = optax.warmup_cosine_decay_schedule(0.0, 0.02 * scale, min(15, steps // 2), steps, 0.0006 * scale)
    optimizer = optax.adam(rate, b2=0.98)

    @jax.jit
    def update(embeddings: jax.Array, state: optax.OptState, params: Params, prompts: Example) -> tuple:
        loss, gradient = jax.value_and_grad(reuse_loss)(embeddings, params, prompts, angles, config=config)
        change, state = optimizer.update(gradient, state)
        return optax.apply_updates(embeddings, change), state, loss

    drawn, state, losses = examples(streams, sink, sizes, seed), optimizer.init(embeddings), []
    began = time.perf_counter()
    for step in range(steps):
        prompts = jax.tree.map(lambda *each: np.stack(each), *(next(drawn) for _ in range(batch)))
        embeddings, state, loss = update(embeddings, state, params, prompts)
        losses.append(float(loss))
        if step % 10 == 9 or step == steps - 1:
            recent = np.mean(losses[-10:])
            print(f"step {step + 1} of {steps}, {time.perf_counter() - began:.0f} s: loss {recent:.4f}", flush=True)
    return cb.FittedContext.of(model, np.asarray(embeddings)), losses


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a checkpoint's directory or hub id, a GGUF file, or smollm2")
    parser.add_argument("--dtype", default="float32", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--texts", nargs="+", required=True, metavar="PATH", help=".txt and .md files, or directories")
    parser.add_argument("--tokens", type=int, default=64, help="embeddings to fit")
    parser.add_argument("--steps", type=int, default=170)
    parser.add_argument("--batch", type=int, default=4, help="prompts a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where it goes: a .safetensors file")
    parsed = parser.parse_args(arguments)
    if parsed.out.suffix != ".safetensors":
        raise CacheBlendError(f"--out must end in .safetensors, got {str(parsed.out)!r}")
    documents = read_documents(parsed.texts)
    model = cb.load_model(parsed.model, dtype=parsed.dtype)
    if model.tokenizer is None:
        raise CacheBlendError(f"model {model.name!r} has no tokenizer; texts need one")
    streams = [np.asarray(encode(model.tokenizer, document.text), np.int32) for document in documents]
    options = {"tokens": parsed.tokens, "steps": parsed.steps, "batch": parsed.batch, "seed": parsed.seed}
    context, _ = fit(model, streams, **options)
    context.save(parsed.out)
    print(f"wrote {parsed.out}")


if __name__ == "__main__":
    try:
        main()
    except CacheBlendError as error:
        sys.exit(f"fit_context: {error}")
