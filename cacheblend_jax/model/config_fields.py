"""What each key of a configuration may hold: every value is checked when it is read, before anything is made of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from cacheblend_jax.errors import CheckpointError, is_whole_number

SHOWN_CHARACTERS = 60  # of a wrong value


class Range(NamedTuple):
    """The numbers from `least` to `most`, both included."""

    least: float
    most: float


# Upper bounds are far beyond any model: what they refuse would only end in a lack of memory, or after minutes.
MAX_POSITIONS = 2**31 - 1  # positions are int32
POSITIONS = Range(1, MAX_POSITIONS)
POSITIVE = 1e-30
LEAST_DIVISOR = 1e-3  # of a frequency; those published are around 1 and above
INTEGERS = {
    "vocab_size": Range(1, 2**24),
    "hidden_size": Range(1, 2**17),
    "intermediate_size": Range(1, 2**20),
    "num_hidden_layers": Range(1, 2**12),
    "num_attention_heads": Range(1, 2**12),
    "num_key_value_heads": Range(1, 2**12),
    "head_dim": Range(2, 2**12),
    "max_position_embeddings": POSITIONS,
    "original_max_position_embeddings": POSITIONS,
    "sliding_window": POSITIONS,
    "max_window_layers": Range(0, 2**31 - 1),
    "sliding_window_pattern": Range(1, 2**12),
    "query_pre_attn_scalar": Range(1, 2**20),
    "no_rope_layer_interval": Range(1, 2**12),
    "num_experts": Range(0, 2**12),
    "num_local_experts": Range(0, 2**12),
    "num_experts_per_tok": Range(1, 2**12),
    "moe_intermediate_size": Range(1, 2**20),
    "decoder_sparse_step": Range(1, 2**12),
}
NUMBERS = {
    "rms_norm_eps": Range(POSITIVE, 1),
    "rope_theta": Range(2, 1e38),
    "rope_local_base_freq": Range(2, 1e38),
    "partial_rotary_factor": Range(POSITIVE, 1),
    "factor": Range(1, 1e6),
    "low_freq_factor": Range(POSITIVE, 1e6),
    "high_freq_factor": Range(POSITIVE, 1e6),
    "beta_fast": Range(POSITIVE, 1e6),
    "beta_slow": Range(POSITIVE, 1e6),
    "attention_factor": Range(POSITIVE, 1e6),
    "mscale": Range(0, 1e6),  # 0: not given
    "mscale_all_dim": Range(0, 1e6),
    "attention_multiplier": Range(POSITIVE, 1e6),
    "embedding_multiplier": Range(POSITIVE, 1e6),
    "residual_multiplier": Range(POSITIVE, 1e6),
    "logits_scaling": Range(POSITIVE, 1e6),
    "swiglu_alpha": Range(POSITIVE, 1e6),
    "swiglu_limit": Range(POSITIVE, 1e6),
    "attn_logit_softcapping": Range(POSITIVE, 1e6),
    "final_logit_softcapping": Range(POSITIVE, 1e6),
}


class Fields:
    """A JSON object, read key by key; a key whose value is null is absent.

    Args:
        prefix: stands before the keys in messages.

    Raises:
        CheckpointError: by each method, for a value of another type or out of its key's range; both are named.
    """

    def __init__(self, content: Mapping[str, Any], prefix: str = "") -> None:
        self.content, self._prefix = content, prefix

    def __contains__(self, key: str) -> bool:
        return self.content.get(key) is not None

    def integer(self, key: str, default: int | None = None) -> int:
        """Returns an integer; without a `default`, the key must be there."""
        least, most = INTEGERS[key]
        value = self._value(key, default)
        if not is_whole_number(value, least=int(least), below=most + 1):
            raise self.wrong(key, f"an integer in [{least}, {most}]", value)
        return value

    def number(self, key: str, default: float) -> float:
        """Returns an integer or a float, as a float."""
        least, most = NUMBERS[key]
        value = self._value(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
            raise self.wrong(key, f"a number in [{least:g}, {most:g}]", value)
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """Returns true or false."""
        return self._typed(key, bool, "true or false", default)

    def text(self, key: str, default: str | None = None) -> str | None:
        """Returns text."""
        return self._typed(key, str, "text", default)

    def texts(self, key: str) -> list[str] | None:
        """Returns a list of texts."""
        values = self._typed(key, list, "a list of texts", None)
        if values is not None and not all(isinstance(value, str) for value in values):
            raise self.wrong(key, "a list of texts", values)
        return values

    def switches(self, key: str) -> list[bool] | None:
        """Returns a list of switches, which stand there as 0 or 1."""
        values = self._typed(key, list, "a list of 0 and 1", None)
        if values is None:
            return None
        if not all(is_whole_number(value, least=0, below=2) for value in values):
            raise self.wrong(key, "a list of 0 and 1", values)
        return [bool(value) for value in values]

    def layers(self, key: str) -> list[int]:
        """Returns a list of layers' numbers, an empty one where the key is absent."""
        values = self._typed(key, list, "a list of layers", [])
        if not all(is_whole_number(value, least=0, below=2**12) for value in values):
            raise self.wrong(key, "a list of layers", values)
        return values

    def numbers(self, key: str) -> list[float]:
        """Returns what RoPE's frequencies are divided by: a list of numbers, an empty one where the key is absent."""
        values = self._typed(key, list, "a list of numbers", [])
        least, most = LEAST_DIVISOR, NUMBERS["factor"].most
        for value in values:
            if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
                raise self.wrong(key, f"a list of numbers in [{least:g}, {most:g}]", values)
        return [float(value) for value in values]

    def nested(self, key: str) -> Fields | None:
        """Returns the JSON object that stands there."""
        value = self._typed(key, Mapping, "a JSON object", None)
        return None if value is None else Fields(value, f"{self._prefix}{key}.")

    def token_ids(self, key: str) -> list[int]:
        """Returns token ids, of which one may stand without a list."""
        value = self._value(key, [])
        ids = value if isinstance(value, list) else [value]
        if not all(is_whole_number(token, least=0, below=2**31) for token in ids):
            raise self.wrong(key, "a token id or a list of them", value)
        return ids

    def wrong(self, key: str, expected: str, value: object) -> CheckpointError:
        """Returns the error that names the key, what was expected, and what is there."""
        return CheckpointError(f"{self._prefix}{key} must be {expected}, got {shown(value)}")

    def _value(self, key: str, default: Any) -> Any:
        value = self.content.get(key)
        return default if value is None else value

    def _typed(self, key: str, kind: type, expected: str, default: Any) -> Any:
        value = self._value(key, default)
        if value is not None and not isinstance(value, kind):
            raise self.wrong(key, expected, value)
        return value


def shown(value: object) -> str:
    """Returns a value as messages show it: on one line, and not at any length."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"
