"""The decoder's configuration: frozen, hashable, read from Hugging Face configurations of every supported family."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

from cacheblend_jax.errors import CheckpointError
from cacheblend_jax.model.config_fields import Fields, shown
from cacheblend_jax.model.families import FAMILIES, family_of, text_tower
from cacheblend_jax.model.rope_config import (
    LONGROPE,
    NO_ROPE,
    USUAL_ROPE,
    RopeConfig,
    rope_divisors,
    rope_parameters,
    ropes_of,
    rotary_dim,
    scaled_positions,
)

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "relu")


class ScoreOptions(TypedDict):
    """How `pallas_kernels` makes attention's scores of products of queries and keys: arguments of its functions."""

    scale: float | None
    soft_cap: float | None


@dataclass(frozen=True)
class ModelConfig:
    """Shape and options of a decoder.

    Attributes:
        max_positions: how long a sequence may be, with RoPE scaling.
        rope: of all layers, unless there is a `local_rope`: of those with a window.
        norm_offset: what norms add to their weight.
        pre_norms: whether what attention and MLP read is normalised.
        post_norms: whether what attention and MLP return is normalised before it is added.
        qk_norm_over_heads: whether `qk_norm` normalises a token's heads together, not each by itself.
        embedding_scale: the factor of embeddings.
        attention_scale: the factor of attention's scores; `None` for `head_dim ** -0.5`.
        attention_soft_cap: scaled scores become `cap * tanh(score / cap)`; `None`: they stay as they are.
        attention_sinks: whether each head has a logit that takes part in the softmax's denominator alone.
        residual_scale: the factor of what attention and MLP return, before it is added.
        logits_scale: the factor of logits.
        logits_soft_cap: as `attention_soft_cap`, of scaled logits.
        rotated: whether each layer has RoPE at all; by default all have.
        rotary_dim: how many of a head's dimensions RoPE turns; `None`: all.
        rope_divisors: by what LongRoPE divides each frequency, for sequences of up to `max_positions`.
        windows: each layer's sliding window, `None` for none.
        num_experts: of how many MLPs each layer has its own; 0: of one, for all tokens.
        experts_per_token: by how many of a layer's experts each token is computed.
        expert_size: the intermediate size of an expert.
        expert_bias: whether the router and the experts' projections have a bias.
        glu_alpha, glu_limit: of gpt-oss's activation, `min(gate, limit) * sigmoid(alpha * min(gate, limit)) *
            (clip(up, -limit, limit) + 1)`; where the limit is `None`, it is `activation(gate) * up`.
        experts_sum_to_one: whether the weights of a token's experts are divided by their sum.

    Raises:
        CheckpointError: a value that no model can have; it is named.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rope: RopeConfig = USUAL_ROPE
    rms_norm_eps: float = 1e-6
    activation: str = "silu"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False
    windows: tuple[int | None, ...] = ()
    dtype: str = "float32"
    check_layer: int = 1
    local_rope: RopeConfig | None = None
    norm_offset: float = 0.0
    post_norms: bool = False
    embedding_scale: float = 1.0
    attention_scale: float | None = None
    attention_soft_cap: float | None = None
    attention_sinks: bool = False
    logits_soft_cap: float | None = None
    pre_norms: bool = True
    qk_norm_over_heads: bool = False
    rotated: tuple[bool, ...] = ()
    residual_scale: float = 1.0
    logits_scale: float = 1.0
    rotary_dim: int | None = None
    rope_divisors: tuple[float, ...] = ()
    num_experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    experts_sum_to_one: bool = False
    expert_bias: bool = False
    glu_alpha: float = 1.0
    glu_limit: float | None = None

    def __post_init__(self) -> None:
        if not self.windows:
            object.__setattr__(self, "windows", (None,) * self.num_layers)
        if all(self.rotated):
            object.__setattr__(self, "rotated", ())
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
            if getattr(self, name) < 1:
                raise CheckpointError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"num_attention_heads must be a multiple of num_key_value_heads, "
                f"got {self.num_heads} and {self.num_kv_heads}"
            )
        positive: dict[str, float | None] = {"rms_norm_eps": self.rms_norm_eps, "embedding_scale": self.embedding_scale}
        positive |= {"attention_scale": self.attention_scale, "rope_theta": min(rope.theta for rope in self.ropes)}
        positive |= {"residual_scale": self.residual_scale, "logits_scale": self.logits_scale}
        positive |= {"attention_soft_cap": self.attention_soft_cap, "logits_soft_cap": self.logits_soft_cap}
        for name, value in positive.items():
            if value is not None and not 0 < value < math.inf:
                raise CheckpointError(f"{name} must be a positive number, got {value!r}")
        if self.head_dim % 2 or self.head_dim < 2:
            raise CheckpointError(f"head_dim must be even and positive, got {self.head_dim}")
        turned = self.rotary_dim or self.head_dim
        if turned % 2 or turned > self.head_dim:
            raise CheckpointError(f"RoPE must turn an even number of {self.head_dim} dimensions, got {turned}")
        if self.rope.type == LONGROPE and len(self.rope_divisors) != turned // 2:
            raise CheckpointError(f"LongRoPE needs {turned // 2} factors, got {len(self.rope_divisors)}")
        if len(self.windows) != self.num_layers:
            raise CheckpointError(f"{len(self.windows)} layer types for {self.num_layers} layers")
        if self.rotated and len(self.rotated) != self.num_layers:
            raise CheckpointError(f"no_rope_layers has {len(self.rotated)} entries for {self.num_layers} layers")
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            raise CheckpointError(
                f"num_experts_per_tok must be in [1, {self.num_experts}], the number of experts, "
                f"got {self.experts_per_token}"
            )

    @property
    def weights_per_token(self) -> int:
        """By how many of an MLP's weights each token is multiplied: those of its experts, and the router's."""
        if self.num_experts:
            return self.hidden_size * (3 * self.experts_per_token * self.expert_size + self.num_experts)
        return 3 * self.hidden_size * self.intermediate_size

    @property
    def has_key_bias(self) -> bool:
        """Whether the keys of all tokens have something in common: a bias that no norm changes."""
        return self.qkv_bias and not self.qk_norm

    @property
    def score_options(self) -> ScoreOptions:
        """What all that computes attention's scores must pass on."""
        return {"scale": self.attention_scale, "soft_cap": self.attention_soft_cap}

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """The RoPEs of the model: tables are made of each. Where some layers have none, the last turns nothing."""
        local = () if self.local_rope is None else (self.local_rope,)
        return (self.rope, *local, *((RopeConfig(NO_ROPE),) if self.rotated else ()))

    @property
    def rope_of_layer(self) -> tuple[int, ...]:
        """Which of `ropes` each layer has."""
        of_window = 0 if self.local_rope is None else 1
        ropes = [0 if window is None else of_window for window in self.windows]
        last = len(self.ropes) - 1
        turned = self.rotated or (True,) * self.num_layers
        return tuple(rope if turns else last for rope, turns in zip(ropes, turned, strict=True))

    @classmethod
    def from_hugging_face(
        cls, raw: Mapping[str, Any], dtype: str | None = None, max_positions: int | None = None
    ) -> ModelConfig:
        """Reads a Hugging Face configuration as its `config.json` or `to_dict()` gives it, of transformers 4 or 5.

        `dtype` and `max_positions` override what is stated. Absent keys have the defaults of transformers'
        configuration classes.

        Raises:
            CheckpointError: the architecture, RoPE type, activation or a value is not supported; it is named.
        """
        raw = text_tower(raw)
        architecture = family_of(Fields(raw))
        family = FAMILIES[architecture]
        given = {key: value for key, value in raw.items() if key != "rope_parameters" or value is not None}
        fields = Fields({**family.defaults, **given})
        hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
        num_layers = fields.integer("num_hidden_layers")
        attention_bias, mlp_bias = (fields.flag(key) and key in family.biases for key in ("attention_bias", "mlp_bias"))
        _check_unsupported(fields, architecture)
        rope, local_rope = ropes_of(fields, family)
        if max_positions is None:
            max_positions = fields.integer("max_position_embeddings")
            if not family.states_scaled_positions:
                max_positions = scaled_positions(max_positions, rope)
        head_dim = fields.integer("head_dim", family.defaults.get("head_dim", hidden // heads))
        return cls(
            architecture=architecture,
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=fields.integer("intermediate_size"),
            num_layers=num_layers,
            num_heads=heads,
            num_kv_heads=fields.integer("num_key_value_heads", heads),
            head_dim=head_dim,
            max_positions=max_positions,
            rope=rope,
            rope_divisors=rope_divisors(fields, rope, max_positions),
            rotary_dim=rotary_dim(fields, family, head_dim),
            local_rope=local_rope,
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            norm_offset=family.norm_offset,
            pre_norms=family.pre_norms,
            post_norms=family.post_norms,
            activation=_activation(fields, family.activation_key),
            qkv_bias=family.qkv_bias or attention_bias,
            output_bias=attention_bias,
            mlp_bias=mlp_bias,
            qk_norm=family.qk_norm,
            qk_norm_over_heads=family.qk_norm_over_heads,
            tied_embeddings=fields.flag("tie_word_embeddings"),
            embedding_scale=family.embedding_scale(fields),
            attention_scale=family.attention_scale(fields),
            attention_sinks=family.attention_sinks,
            attention_soft_cap=family.attention_soft_cap(fields),
            logits_soft_cap=family.logits_soft_cap(fields),
            residual_scale=family.residual_scale(fields),
            logits_scale=family.logits_scale(fields),
            rotated=family.rotated(fields, num_layers),
            **family.experts(fields, num_layers),
            windows=family.windows(fields, num_layers),
            dtype=dtype or stated_dtype(raw) or "float32",
        )

    def to_hugging_face(self) -> dict[str, Any]:
        """Returns the configuration as `from_hugging_face` reads it, under transformers 5's names."""
        family = FAMILIES[self.architecture]
        window = next((window for window in self.windows if window is not None), None)
        stretch = self.rope.factor if self.rope.type == "linear" and not family.states_scaled_positions else 1
        rope = rope_parameters(self.rope)
        if self.rope_divisors:  # one set, which serves for both: that of `max_positions`
            rope |= {key: list(self.rope_divisors) for key in ("short_factor", "long_factor")}
        if self.rotary_dim is not None:
            rope["partial_rotary_factor"] = self.rotary_dim / self.head_dim
        if self.local_rope is not None:
            rope = {"full_attention": rope, "sliding_attention": rope_parameters(self.local_rope)}
        content = {
            "architectures": [self.architecture],
            "model_type": family.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": math.ceil(self.max_positions / stretch),
            "rope_parameters": rope,
            "rms_norm_eps": self.rms_norm_eps,
            family.activation_key: self.activation,
            "attention_bias": self.output_bias or (self.qkv_bias and not family.qkv_bias),
            "mlp_bias": self.mlp_bias,
            "tie_word_embeddings": self.tied_embeddings,
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "layer_types": ["full_attention" if w is None else "sliding_attention" for w in self.windows],
            "dtype": self.dtype,
        }
        return content | family.own_keys(self)


def _check_unsupported(fields: Fields, architecture: str) -> None:
    for key in FAMILIES[architecture].unsupported:
        if (value := fields.content.get(key)) not in (None, False):
            raise CheckpointError(f"{key} {shown(value)} is not supported; {architecture} is read where it is null")


def _activation(fields: Fields, key: str) -> str:
    activation = fields.text(key, "silu")
    if activation not in ACTIVATIONS:
        raise CheckpointError(f"{key} {activation!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
    return activation


def stated_dtype(raw: Mapping[str, Any]) -> str | None:
    """Returns the dtype that a Hugging Face configuration states; `None` where it states none."""
    fields = Fields(raw)
    value = fields.text("dtype") or fields.text("torch_dtype")
    return value.removeprefix("torch.") if value else None
