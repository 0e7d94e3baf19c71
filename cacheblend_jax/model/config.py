"""The decoder's configuration: frozen, hashable, read from Hugging Face configurations of every supported family."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cacheblend_jax.errors import CheckpointError
from cacheblend_jax.model.config_fields import MAX_POSITIONS, Fields

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
LAYER_TYPES = ("full_attention", "sliding_attention")
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "relu")
# What transformers takes for keys that a configuration lacks, where families differ. Shapes have no default here: a
# checkpoint that doesn't state them is refused.
DEFAULTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"num_key_value_heads": None, "max_position_embeddings": 2048, "sliding_window": None},
    "MistralForCausalLM": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "Qwen2ForCausalLM": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096},
    "Qwen3ForCausalLM": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096},
}


@dataclass(frozen=True)
class RopeConfig:
    """RoPE of one of the types `default`, `linear`, `llama3`, `yarn`; fields that a type does not read stay at 0.

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


@dataclass(frozen=True)
class ModelConfig:
    """Shape and options of a Llama-form decoder.

    `windows` holds each layer's sliding window, `None` for none; `max_positions` is how long a sequence may be, with
    RoPE scaling.

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
    rope: RopeConfig = RopeConfig()
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

    def __post_init__(self) -> None:
        if not self.windows:
            object.__setattr__(self, "windows", (None,) * self.num_layers)
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
            if getattr(self, name) < 1:
                raise CheckpointError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"num_attention_heads must be a multiple of num_key_value_heads, "
                f"got {self.num_heads} and {self.num_kv_heads}"
            )
        if not 0 < self.rms_norm_eps < math.inf:
            raise CheckpointError(f"rms_norm_eps must be a positive number, got {self.rms_norm_eps!r}")
        if not 0 < self.rope.theta < math.inf:
            raise CheckpointError(f"rope_theta must be a positive number, got {self.rope.theta!r}")
        if self.head_dim % 2 or self.head_dim < 2:
            raise CheckpointError(f"head_dim must be even and positive, got {self.head_dim}")
        if len(self.windows) != self.num_layers:
            raise CheckpointError(f"{len(self.windows)} layer types for {self.num_layers} layers")

    @classmethod
    def from_hugging_face(cls, raw: Mapping[str, Any], dtype: str | None = None) -> ModelConfig:
        """Reads a Hugging Face configuration as its `config.json` or `to_dict()` gives it, of transformers 4 or 5.

        `dtype` overrides the stated one. Absent keys have the defaults of transformers' configuration classes.

        Raises:
            CheckpointError: the architecture, RoPE type, activation or a value is not supported; it is named.
        """
        architecture = _architecture(Fields(raw))
        fields = Fields({**DEFAULTS[architecture], **raw})
        hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
        num_layers = fields.integer("num_hidden_layers")
        qwen2, qwen3 = architecture.startswith("Qwen2"), architecture.startswith("Qwen3")
        attention_bias = fields.flag("attention_bias") and architecture.startswith(("Llama", "Qwen3"))
        rope = _rope(fields)
        return cls(
            architecture=architecture,
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=fields.integer("intermediate_size"),
            num_layers=num_layers,
            num_heads=heads,
            num_kv_heads=fields.integer("num_key_value_heads", heads),
            head_dim=fields.integer("head_dim", 128 if qwen3 else hidden // heads),
            max_positions=_max_positions(fields.integer("max_position_embeddings"), rope),
            rope=rope,
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            activation=_activation(fields),
            qkv_bias=qwen2 or attention_bias,
            output_bias=attention_bias,
            mlp_bias=fields.flag("mlp_bias") and architecture.startswith("Llama"),
            qk_norm=qwen3,
            tied_embeddings=fields.flag("tie_word_embeddings"),
            windows=_windows(fields, architecture, num_layers),
            dtype=dtype or stated_dtype(raw) or "float32",
        )

    def to_hugging_face(self) -> dict[str, Any]:
        """Returns the configuration as `from_hugging_face` reads it, under transformers 5's names."""
        rope = self.rope
        parameters: dict[str, Any] = {"rope_type": rope.type, "rope_theta": rope.theta}
        if rope.type != "default":
            parameters["factor"] = rope.factor
        if rope.type in ("llama3", "yarn"):
            parameters["original_max_position_embeddings"] = rope.original_max_positions
        if rope.type == "llama3":
            parameters |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
        if rope.type == "yarn":
            parameters |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
            given = ("attention_factor", "mscale", "mscale_all_dim")
            parameters |= {name: getattr(rope, name) for name in given if getattr(rope, name)}
        window = next((window for window in self.windows if window is not None), None)
        return {
            "architectures": [self.architecture],
            "model_type": self.architecture.removesuffix("ForCausalLM").lower(),
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": math.ceil(self.max_positions / (rope.factor if rope.type == "linear" else 1)),
            "rope_parameters": parameters,
            "rms_norm_eps": self.rms_norm_eps,
            "hidden_act": self.activation,
            "attention_bias": self.output_bias or (self.qkv_bias and not self.architecture.startswith("Qwen2")),
            "mlp_bias": self.mlp_bias,
            "tie_word_embeddings": self.tied_embeddings,
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "layer_types": ["full_attention" if w is None else "sliding_attention" for w in self.windows],
            "dtype": self.dtype,
        }


def _architecture(fields: Fields) -> str:
    named, model_type = fields.texts("architectures"), fields.text("model_type")
    by_type = {name.removesuffix("ForCausalLM").lower(): name for name in ARCHITECTURES}
    architecture = named[0] if named else by_type.get(model_type or "")
    if architecture not in ARCHITECTURES:
        got = architecture or model_type or "none"
        raise CheckpointError(f"architecture {got!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
    return architecture


def _activation(fields: Fields) -> str:
    activation = fields.text("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        raise CheckpointError(f"hidden_act {activation!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
    return activation


def stated_dtype(raw: Mapping[str, Any]) -> str | None:
    """Returns the dtype that a Hugging Face configuration states; `None` where it states none."""
    fields = Fields(raw)
    value = fields.text("dtype") or fields.text("torch_dtype")
    return value.removeprefix("torch.") if value else None


def _rope(fields: Fields) -> RopeConfig:
    # transformers 5 writes rope_parameters; before it were rope_theta and rope_scaling, whose type was once "type".
    given = next((key for key in ("rope_scaling", "rope_parameters") if fields.content.get(key)), "rope_scaling")
    parameters = fields.nested(given) or Fields({})
    if any(key.endswith("_attention") for key in parameters.content):
        raise CheckpointError(f"{given} that differ between layer types are not supported")
    rope_type = parameters.text("rope_type") or parameters.text("type") or "default"
    if rope_type not in ROPE_TYPES:
        raise CheckpointError(f"RoPE type {rope_type!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    partial = fields if "partial_rotary_factor" in fields else parameters
    if partial.number("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError("partial_rotary_factor other than 1 is not supported")
    if rope_type != "default" and "factor" not in parameters:
        raise CheckpointError(f"RoPE type {rope_type!r} needs a factor")
    # As in transformers, the configuration's own key comes before that of its RoPE parameters.
    original = "original_max_position_embeddings"
    holder = fields if original in fields else parameters
    rope = RopeConfig(
        type=rope_type,
        theta=parameters.number("rope_theta", fields.number("rope_theta", 10000.0)),
        factor=parameters.number("factor", 1.0),
        original_max_positions=holder.integer(original, fields.integer("max_position_embeddings")),
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


def _max_positions(stated: int, rope: RopeConfig) -> int:
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


def _windows(fields: Fields, architecture: str, num_layers: int) -> tuple[int | None, ...]:
    is_qwen = architecture.startswith("Qwen")
    if architecture.startswith("Llama") or (is_qwen and not fields.flag("use_sliding_window")):
        return (None,) * num_layers
    if "sliding_window" not in fields:  # an explicit null means no window
        return (None,) * num_layers
    window = fields.integer("sliding_window")
    if not is_qwen:  # transformers' Mistral has one window for all layers, whatever layer_types says
        return (window,) * num_layers
    if kinds := fields.texts("layer_types"):
        if unknown := set(kinds) - set(LAYER_TYPES):
            raise CheckpointError(f"layer type {min(unknown)!r} is not supported; supported: {', '.join(LAYER_TYPES)}")
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    first = fields.integer("max_window_layers", 28)
    return tuple(window if layer >= first else None for layer in range(num_layers))
