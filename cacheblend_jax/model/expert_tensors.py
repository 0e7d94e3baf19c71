"""Tensors that hold a projection of all of a layer's experts, as transformers 5 has them, shown as one for each."""

from __future__ import annotations

from collections.abc import Iterator

from cacheblend_jax.model.config import ModelConfig
from cacheblend_jax.model.fused_tensors import Part, SeparateTensors, TensorSource
from cacheblend_jax.model.tensor_names import LAYER_MODULES, layer_modules

STACKED = {
    "mlp.experts.gate_up_proj": ("experts.gate_proj", "experts.up_proj"),
    "mlp.experts.down_proj": ("experts.down_proj",),
}


def separate_experts(checkpoint: TensorSource, config: ModelConfig) -> TensorSource:
    """Returns the checkpoint with each expert's projections as tensors of their own, whichever way they are stored."""
    if not config.num_experts or not any(name.endswith(tuple(STACKED)) for name in checkpoint.tensor_files()):
        return checkpoint
    return SeparateTensors(checkpoint, dict(_parts(config)))


def _parts(config: ModelConfig) -> Iterator[tuple[str, Part]]:
    modules, count = layer_modules(config.architecture), config.num_experts
    heights = dict.fromkeys(("experts.gate_proj", "experts.up_proj"), config.expert_size)
    heights |= {"experts.down_proj": config.hidden_size}
    for layer in range(config.num_layers):
        at = f"model.layers.{layer}."
        for tensor, names in STACKED.items():
            total = count * sum(heights[name] for name in names)
            begin = 0
            for expert in range(count):
                for name in names:
                    rows = range(begin, begin + heights[name])
                    yield f"{at}{modules[name].format(expert)}.weight", Part(f"{at}{tensor}", rows, total)
                    begin += heights[name]
        router = f"{at}{LAYER_MODULES['router']}.weight"
        yield f"{at}{modules['router']}.weight", Part(router, range(count), count)
