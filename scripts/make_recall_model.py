"""Trains the tiny model of the tests that need one which attends between chunks: in-context recall of pairs.

    python scripts/make_recall_model.py [--out tests/data/recall] [--steps 2000]

A text is a run of pairs "key value" under a dictionary of its own; what follows a key that stood before is its value.
Predicting it takes attention to the earlier pair, wherever that stands. After 2000 steps (8 minutes on two cores) the
loss is 1.3: the model knows which values the text has used (a guess among all would be 3.5), not yet always which one.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from safetensors.numpy import save_file

from cacheblend_jax.model.config import ModelConfig
from cacheblend_jax.model.rope import rope_tables
from cacheblend_jax.model.transformer import Params, embedder, init_params, layer_at
from cacheblend_jax.model.weights import hugging_face_tensors
from pallas_kernels import apply_rope
from pallas_kernels.selective_attention import selective_attention_reference

NUM_KEYS = NUM_VALUES = 32
HUGGING_FACE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": NUM_KEYS + NUM_VALUES,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
CONFIG = ModelConfig.from_hugging_face(HUGGING_FACE, "float32")


def draw_pairs(rng: np.random.Generator, num_pairs: int, num_keys: int = 8) -> np.ndarray:
    """Returns int32 `[2 * num_pairs]`: pairs over `num_keys` keys, each with a random value of its own."""
    keys = rng.choice(NUM_KEYS, num_keys, replace=False)
    values = rng.integers(0, NUM_VALUES, num_keys) + NUM_KEYS
    picks = rng.integers(0, num_keys, num_pairs)
    return np.stack([keys[picks], values[picks]], axis=1).reshape(-1).astype(np.int32)


def logits_of(params: Params, token_ids: jax.Array) -> jax.Array:
    """Logits `[tokens, vocab]` of one text; attention over a dense mask, which can be differentiated."""
    positions = jnp.arange(token_ids.shape[0])
    cos, sin = rope_tables(CONFIG, token_ids.shape[0])

    def body(hidden: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
        layer = layer_at(params, CONFIG, index)
        k, v = layer.keys_values(hidden)
        q, k = (apply_rope(x, cos, sin) for x in (layer.queries(hidden), k))
        return layer.finish(hidden, selective_attention_reference(q, k, v, positions)[0]), None

    around = embedder(params, CONFIG)
    hidden, _ = lax.scan(body, around.embed(token_ids), jnp.arange(CONFIG.num_layers))
    return around.logits(hidden)


def loss_of(params: Params, batch: jax.Array) -> jax.Array:
    """Cross entropy of the values whose key stood before."""
    logits = jax.vmap(partial(logits_of, params))(batch)[:, :-1]
    keys = batch[:, ::2]
    seen = (keys[:, :, None] == keys[:, None, :]) & (jnp.arange(keys.shape[1]) < jnp.arange(keys.shape[1])[:, None])
    weights = jnp.zeros(batch.shape).at[:, 1::2].set(seen.any(-1))[:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:])
    return (losses * weights).sum() / weights.sum()


def train(steps: int) -> Params:
    params = init_params(jax.random.key(0), CONFIG)
    # Recall emerges early only from embeddings of standard deviation 1.
    params = params.replace(embedder=params.embedder | {"embedding": params.embedder["embedding"] / 0.02})
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, min(100, steps // 2), steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))
    state = optimizer.init(params)

    @jax.jit
    def update(params, state, batch):
        loss, gradients = jax.value_and_grad(loss_of)(params, batch)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    rng = np.random.default_rng(0)
    for step in range(steps):
        batch = np.stack([draw_pairs(rng, 24, int(rng.integers(2, 9))) for _ in range(96)])
        params, state, loss = update(params, state, batch)
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step}: loss {float(loss):.3f}", flush=True)
    return params


def write_checkpoint(params: Params, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    tensors = hugging_face_tensors(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params))
    stored = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(HUGGING_FACE, indent=1) + "\n")
    # Layer 1 is the first that can have looked at another chunk for a key's value.
    (directory / "cacheblend.json").write_text(json.dumps({"check_layer": 2}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("tests/data/recall"))
    parser.add_argument("--steps", type=int, default=2000)
    arguments = parser.parse_args()
    write_checkpoint(train(arguments.steps), arguments.out)


if __name__ == "__main__":
    main()
