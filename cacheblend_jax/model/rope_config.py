"""A model's RoPE as its configuration states it: read from Hugging Face configurations, and written back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cacheblend_jax.errors import CheckpointError
from cacheblend_jax.model.config_fields import MAX_POSITIONS, Fields
from cacheblend_jax.model.family import Family
from cacheblend_jax.model.family_fields import LAYER_TYPES

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")
LONGROPE = "longrope"
NO_ROPE = "none"  # the type of a RoPE that turns nothing; no configuration names it


@dataclass(frozen=True)
class RopeConfig:
    """RoPE of one of the types in `ROPE_TYPES`; fields that a type does not read stay at 0.

    `attention_factor`, `mscale` and `mscale_all_dim` of 0 mean "not given", as an absent key does in a Hugging Face
    configuration.
    """

    type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 0.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True


USUAL_ROPE = RopeConfig()


def ropes_of(fields: Fields, family: Family) -> tuple[RopeConfig, RopeConfig | None]:
    """Returns the RoPE of the layers, and that of those with a window where the family has two."""
    theta = fields.number("rope_theta", 10000.0)
    if not family.ropes_by_type:
        parameters = _rope_fields(fields)
        if any(key.endswith("_attention") for key in parameters.content):
            raise CheckpointError("RoPE parameters that differ between layer types are not supported")
        return _rope(fields, parameters, theta, family.rope_types), None
    by_type = fields.nested("rope_parameters") or Fields({})
    if unknown := set(by_type.content) - set(LAYER_TYPES):
        raise by_type.wrong(min(unknown), f"absent: what is there is {' and '.join(LAYER_TYPES)}", by_type.content)
    full, local = (by_type.nested(kind) or Fields({}) for kind in LAYER_TYPES)
    if scaling := fields.nested("rope_scaling"):
        full = Fields({**full.content, **scaling.content}, "rope_scaling.")
    return _rope(fields, full, theta), _rope(fields, local, fields.number("rope_local_base_freq", 10000.0))


def _rope(fields: Fields, parameters: Fields, theta: float, names: Mapping[str, str] | None = None) -> RopeConfig:
    named = parameters.text("rope_type") or parameters.text("type") or "default"  # older ones say "type"
    rope_type = (names or {}).get(named, named)
    if rope_type not in ROPE_TYPES:
        raise CheckpointError(f"RoPE type {rope_type!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    if rope_type not in ("default", LONGROPE) and "factor" not in parameters:
        raise CheckpointError(f"RoPE type {rope_type!r} needs a factor")
    # As in transformers, the configuration's own key comes before that of its RoPE parameters.
    original, stated = "original_max_position_embeddings", fields.integer("max_position_embeddings")
    original_positions = (fields if original in fields else parameters).integer(original, stated)
    rope = RopeConfig(
        type=rope_type,
        theta=parameters.number("rope_theta", theta),
        factor=parameters.number("factor", stated / original_positions if rope_type == LONGROPE else 1.0),
        original_max_positions=original_positions,
        low_freq_factor=_given(parameters, "low_freq_factor"),
        high_freq_factor=_given(parameters, "high_freq_factor"),
        beta_fast=parameters.number("beta_fast", 32.0),
        beta_slow=parameters.number("beta_slow", 1.0),
        attention_factor=_given(parameters, "attention_factor"),
        mscale=_given(parameters, "mscale"),
        mscale_all_dim=_given(parameters, "mscale_all_dim"),
        truncate=parameters.flag("truncate", True),
    )
    if rope_type == "llama3" and (rope.low_freq_factor or 1.0) >= (rope.high_freq_factor or 4.0):
        raise parameters.wrong("high_freq_factor", "above low_freq_factor", rope.high_freq_factor or 4.0)
    return rope


def rope_divisors(fields: Fields, rope: RopeConfig, max_positions: int) -> tuple[float, ...]:
    """Returns the factors of LongRoPE for sequences of up to `max_positions`: one set for all, as in vLLM.

    transformers changes from one set to the other within a sequence, with which no KV that was stored before agrees.
    """
    if rope.type != LONGROPE:
        return ()
    key = "long_factor" if max_positions > rope.original_max_positions else "short_factor"
    return tuple(_rope_fields(fields).numbers(key))


def rotary_dim(fields: Fields, family: Family, head_dim: int) -> int | None:
    """Returns how many of a head's dimensions RoPE turns; `None`: all."""
    holder = fields if "partial_rotary_factor" in fields else _rope_fields(fields)
    if (share := holder.number("partial_rotary_factor", 1.0)) == 1.0:
        return None
    if not family.partial_rotary:
        raise CheckpointError("partial_rotary_factor other than 1 is not supported")
    return int(head_dim * share)


def _rope_fields(fields: Fields) -> Fields:
    """Returns the RoPE parameters: transformers 5 writes `rope_parameters`; before it was `rope_scaling`."""
    given = next((key for key in ("rope_scaling", "rope_parameters") if fields.content.get(key)), "rope_scaling")
    return fields.nested(given) or Fields({})


def scaled_positions(stated: int, rope: RopeConfig) -> int:
    """Returns how many positions a model takes, given `max_position_embeddings`, as vLLM derives it.

    What a `llama3` configuration states is scaled already; a `yarn` one may state the length before scaling or after.
    """
    if rope.type == "linear":
        return min(int(stated * rope.factor), MAX_POSITIONS)
    if rope.type == "yarn":
        return min(max(stated, int(rope.original_max_positions * rope.factor)), MAX_POSITIONS)
    return stated


def _given(parameters: Fields, key: str) -> float:
    """Returns a number, and 0 where none is given."""
    return parameters.number(key, 0.0) if key in parameters else 0.0


def rope_parameters(rope: RopeConfig) -> dict[str, Any]:
    """Returns what `_rope` reads."""
    parameters: dict[str, Any] = {"rope_type": rope.type, "rope_theta": rope.theta}
    if rope.type != "default":
        parameters["factor"] = rope.factor
    if rope.type in ("llama3", "yarn", LONGROPE):
        parameters["original_max_position_embeddings"] = rope.original_max_positions
    if rope.type == "llama3":
        parameters |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.type == "yarn":
        parameters |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
    if rope.type in ("yarn", LONGROPE):
        given = ("attention_factor", "mscale", "mscale_all_dim")
        parameters |= {name: getattr(rope, name) for name in given if getattr(rope, name)}
    return parameters
