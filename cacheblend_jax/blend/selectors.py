"""Selectors: pure functions from what a blend has computed to one score per token; the highest are recomputed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from cacheblend_jax.blend.deviation import kv_deviation
from cacheblend_jax.errors import CacheBlendError


@struct.dataclass
class Evidence:
    """What is known of each token at a stage border, where its K, V were just computed.

    `cross_mass`, `question_mass` and `oracle` are zeros unless the selector says that it needs them; `part` is the
    configuration's choice of K, V or both.
    """

    valid: Bool[Array, " tokens"]
    positions: Int[Array, " tokens"]
    chunk_starts: Int[Array, " tokens"]  # position of the first token of its chunk
    index: Int[Array, " tokens"]  # among the active tokens of the prompt: the same at every border
    k_fresh: Float[Array, "tokens kv_heads head_dim"]  # before RoPE
    v_fresh: Float[Array, "tokens kv_heads head_dim"]
    k_cached: Float[Array, "tokens kv_heads head_dim"]
    v_cached: Float[Array, "tokens kv_heads head_dim"]
    cross_mass: Float[Array, " tokens"]
    question_mass: Float[Array, " tokens"]
    oracle: Float[Array, " tokens"]
    seed: Int[Array, ""]
    part: str = struct.field(pytree_node=False, default="kv")

    def deviation(self) -> Float[Array, " tokens"]:
        """KV deviation at this layer."""
        return kv_deviation(self.k_fresh, self.v_fresh, self.k_cached, self.v_cached, self.valid, self.part)


@dataclass(frozen=True)
class Selector:
    """A score, and which costly evidence it needs: `"cross_mass"`, `"question_mass"`, `"oracle"`."""

    score: Callable[[Evidence], jax.Array]
    needs: frozenset[str] = frozenset()


def _hkvd(evidence: Evidence) -> jax.Array:
    """KV deviation. Source: CacheBlend (arXiv 2405.16444) §4.3."""
    return evidence.deviation()


def _cross(evidence: Evidence) -> jax.Array:
    """Attention that the token pays to other chunks in the last layer computed in full.

    The paper's intuition (§4.3) taken literally: what looked at no other chunk cannot have changed by it.
    """
    return evidence.cross_mass


def _query(evidence: Evidence) -> jax.Array:
    """The question's attention to the token times its deviation. After ProphetKV (arXiv 2602.02579)."""
    return evidence.question_mass * evidence.deviation()


def _epic(evidence: Evidence) -> jax.Array:
    """First tokens of each chunk. Source: EPIC's LegoLink (arXiv 2410.15332)."""
    # The places alone decide; chunks take turns, an earlier chunk first where the budget ends within a turn.
    return (evidence.chunk_starts - evidence.positions).astype(jnp.float32)


def _random(evidence: Evidence) -> jax.Array:
    """The control: an order drawn once per prefill, the same at every border."""
    key = jax.random.key(evidence.seed)
    return jax.vmap(lambda index: jax.random.uniform(jax.random.fold_in(key, index)))(evidence.index)


def _oracle(evidence: Evidence) -> jax.Array:
    """True deviation over all layers, from a full prefill: what a perfect predictor would pick. For study only."""
    return evidence.oracle


SELECTORS: dict[str, Selector] = {
    "hkvd": Selector(_hkvd),
    "cross": Selector(_cross, frozenset({"cross_mass"})),
    "query": Selector(_query, frozenset({"question_mass"})),
    "epic": Selector(_epic),
    "random": Selector(_random),
    "oracle": Selector(_oracle, frozenset({"oracle"})),
}


def get_selector(name: str) -> Selector:
    """Returns the selector of that name.

    Raises:
        CacheBlendError: there is none; the message lists those there are.
    """
    if name not in SELECTORS:
        raise CacheBlendError(f"unknown selector {name!r}; known: {', '.join(sorted(SELECTORS))}")
    return SELECTORS[name]


def register_selector(name: str, score: Callable[[Evidence], jax.Array], needs: frozenset[str] = frozenset()) -> None:
    """Adds a selector under a new name. `score` must be a pure, traceable function of `Evidence`.

    Raises:
        CacheBlendError: the name is taken, or `needs` names unknown evidence.
    """
    if name in SELECTORS:
        raise CacheBlendError(f"selector {name!r} exists already; choose another name")
    if unknown := sorted(set(needs) - {"cross_mass", "question_mass", "oracle"}):
        raise CacheBlendError(f"unknown evidence {unknown[0]!r}; known: cross_mass, oracle, question_mass")
    SELECTORS[name] = Selector(score, frozenset(needs))
