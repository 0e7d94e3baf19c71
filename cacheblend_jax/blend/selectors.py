"""Selectors: pure functions from what a blend has computed to one score per token; the highest are recomputed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from cacheblend_jax.blend.deviation import kv_deviation
from cacheblend_jax.errors import CacheBlendError

COSTLY_EVIDENCE = ("cross_mass", "oracle", "question_mass")  # computed only for selectors that need it


@struct.dataclass
class Evidence:
    """What is known about each token at a stage's border, where its K, V have just been computed.

    Attributes:
        valid: false for padding.
        positions, chunk_starts: of the token, and of the first token of its chunk, in the prompt.
        index: the token's number among the prompt's active tokens, the same at every border.
        k_fresh, v_fresh: what this layer has just computed, keys before RoPE.
        k_cached, v_cached: what the store holds for it.
        cross_mass, question_mass, oracle: zeros unless the selector needs them.
        seed: the configuration's.
        part: what the configuration measures deviation on: `"kv"`, `"k"` or `"v"`.
    """

    valid: Bool[Array, " tokens"]
    positions: Int[Array, " tokens"]
    chunk_starts: Int[Array, " tokens"]
    index: Int[Array, " tokens"]
    k_fresh: Float[Array, "tokens kv_heads head_dim"]
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
    """How tokens are chosen: by the highest score.

    Attributes:
        name: what results and messages call it.
        score: a pure, traceable function of `Evidence` to float32 `[tokens]`: one score per row, padding included.
            Programs are compiled for the function itself: make it once, not anew for each request.
        needs: which costly evidence it reads: `"cross_mass"` (attention that each token pays to other chunks),
            `"question_mass"` (attention that the question pays to each token), `"oracle"` (the true deviation).

    Raises:
        CacheBlendError: `needs` names unknown evidence.
    """

    name: str
    score: Callable[[Evidence], jax.Array]
    needs: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        object.__setattr__(self, "needs", frozenset(self.needs))  # a plain set could not name a program
        if unknown := sorted(self.needs - set(COSTLY_EVIDENCE)):
            raise CacheBlendError(f"unknown evidence {unknown[0]!r}; known: {', '.join(COSTLY_EVIDENCE)}")

    def __repr__(self) -> str:
        """The same in each process: hosts compare what they are asked by it."""
        return f"Selector({self.name!r}, needs={sorted(self.needs)})"

    def scores(self, evidence: Evidence) -> Float[Array, " tokens"]:
        """Returns one score per token.

        Raises:
            CacheBlendError: `score` returned another shape; found while a program is compiled.
        """
        scores = jnp.asarray(self.score(evidence), jnp.float32)
        if scores.shape != evidence.valid.shape:
            raise CacheBlendError(
                f"selector {self.name!r} must return one score per token, {list(evidence.valid.shape)}, "
                f"got {list(scores.shape)}"
            )
        return scores


def _hkvd(evidence: Evidence) -> jax.Array:
    """KV deviation. Source: CacheBlend (arXiv 2405.16444) §4.3."""
    return evidence.deviation()


def _cross(evidence: Evidence) -> jax.Array:
    """Attention that the token pays to other chunks in the last layer computed in full.

    The paper's intuition (§4.3) taken literally: other chunks cannot have changed a token that attends to none.
    """
    return evidence.cross_mass


def _query(evidence: Evidence) -> jax.Array:
    """The question's attention to the token times its deviation, after ProphetKV (arXiv 2602.02579); and first tokens.

    The first token of every chunk is always chosen, whatever its score: it was a text's beginning when it was stored,
    and models attend to that. On Gemma 3 270M this recovers 84 % of plain reuse's loss, not 75 (docs/results.md).
    """
    scores = evidence.question_mass * evidence.deviation()
    return jnp.where(evidence.positions == evidence.chunk_starts, jnp.finfo(jnp.float32).max, scores)


def _epic(evidence: Evidence) -> jax.Array:
    """First tokens of each chunk. Source: EPIC's LegoLink (arXiv 2410.15332)."""
    # Positions alone decide: chunks take turns, and where the budget ends within a turn, earlier chunks come first.
    return (evidence.chunk_starts - evidence.positions).astype(jnp.float32)


def _random(evidence: Evidence) -> jax.Array:
    """The control: an order drawn once per prefill, the same at every border."""
    key = jax.random.key(evidence.seed)

    def draw(index: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(key, index), dtype=jnp.float32)

    return jax.vmap(draw)(evidence.index)


def _oracle(evidence: Evidence) -> jax.Array:
    """True deviation over all layers, from a full prefill: what a perfect predictor would pick. For study only."""
    return evidence.oracle


_registered: dict[str, Selector] = {
    selector.name: selector
    for selector in (
        Selector("hkvd", _hkvd),
        Selector("cross", _cross, frozenset({"cross_mass"})),
        Selector("query", _query, frozenset({"question_mass"})),
        Selector("epic", _epic),
        Selector("random", _random),
        Selector("oracle", _oracle, frozenset({"oracle"})),
    )
}
SELECTORS: Mapping[str, Selector] = MappingProxyType(_registered)
"""The selectors by name. Read-only: `register_selector` adds to it."""


def selector_of(selector: str | Selector | None) -> Selector:
    """Returns the selector of that name, or the selector itself.

    Raises:
        CacheBlendError: no selector has that name; the message lists those that exist.
    """
    if isinstance(selector, Selector):
        return selector
    if not isinstance(selector, str) or selector not in SELECTORS:
        raise CacheBlendError(f"unknown selector {selector!r}; known: {', '.join(sorted(SELECTORS))}")
    return SELECTORS[selector]


def register_selector(
    name: str, score: Callable[[Evidence], jax.Array], needs: frozenset[str] = frozenset()
) -> Selector:
    """Adds a selector under a new name, for this process's configurations; returns it.

    A `Selector` can also be used without being registered: `BlendConfig(selector=Selector(…))`.

    Raises:
        CacheBlendError: the name is taken, or `needs` names unknown evidence.
    """
    if name in SELECTORS:
        raise CacheBlendError(f"selector {name!r} exists already; choose another name")
    _registered[name] = Selector(name, score, needs)
    return _registered[name]
