"""What the tensors of Hugging Face checkpoints are called, and which leaf of `Params` each of them is (part of)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from cacheblend_jax.model.config import ModelConfig
from cacheblend_jax.model.fused_tensors import fuse
from cacheblend_jax.model.gpt_oss_tensors import fuse_gpt_oss
from cacheblend_jax.model.params import Params, is_by_layer

# The path of a leaf in `Params` and its name in a checkpoint; `{}` is the layer, and a second one the expert. Kernels
# are stored [in, out] here and [out, in] there.
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
EMBEDDER_NAMES = {"embedding": EMBEDDING, "final_norm.scale": "model.norm.weight", "lm_head.kernel": HEAD}
LAYER_MODULES = {
    "input_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    **{name: f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")},
    **{name: f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")},
    "router": "mlp.gate",
    **{f"experts.{name}": f"mlp.experts.{{}}.{name}" for name in ("gate_proj", "up_proj", "down_proj")},
}
SINKS = "model.layers.{}.self_attn.sinks"
GEMMA_NORMS = {
    "attention_out_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
}
# Where a family's names differ, by architecture.
OTHER_MODULES = {
    "Olmo2ForCausalLM": {
        "attention_out_norm": "post_attention_layernorm",
        "mlp_out_norm": "post_feedforward_layernorm",
    },
    "MixtralForCausalLM": {
        "router": "block_sparse_moe.gate",
        "experts.gate_proj": "block_sparse_moe.experts.{}.w1",
        "experts.up_proj": "block_sparse_moe.experts.{}.w3",
        "experts.down_proj": "block_sparse_moe.experts.{}.w2",
    },
    "GptOssForCausalLM": {"router": "mlp.router"},
    "Gemma2ForCausalLM": GEMMA_NORMS,
    "Gemma3ForCausalLM": GEMMA_NORMS,
}
KERNEL_ENDINGS = ("_proj.weight", HEAD, ".gate.weight", ".router.weight", ".w1.weight", ".w2.weight", ".w3.weight")
# What the text tower's names in multimodal checkpoints begin with in place of "model.", of transformers before 4.52
# and since; and what those of the other towers do.
TEXT_TOWERS = ("language_model.model.", "model.language_model.")
OTHER_TOWERS = tuple(f"{at}{tower}." for at in ("", "model.") for tower in ("vision_tower", "multi_modal_projector"))


def tensor_names(params: Params, config: ModelConfig) -> Params:
    """Returns the name of each leaf's tensor, or tensors, in a checkpoint of a text model."""
    modules = layer_modules(config.architecture)

    def of_layers(path: str) -> str:
        if path == "sinks":
            return SINKS
        module, leaf = path.rsplit(".", 1)
        return f"model.layers.{{}}.{modules[module]}.{'bias' if leaf == 'bias' else 'weight'}"

    return Params(
        embedder=_map_paths(params.embedder, lambda path: EMBEDDER_NAMES[path]),
        layers=_map_paths(params.layers, of_layers),
    )


def layer_modules(architecture: str) -> dict[str, str]:
    """Returns what a layer's modules are called in checkpoints of an architecture, by their names here."""
    return LAYER_MODULES | OTHER_MODULES.get(architecture, {})


def stored_name(name: str, stored: Collection[str]) -> str:
    """Returns what a tensor of a text model is called in a checkpoint that has the names `stored`."""
    tower = next((tower for tower in TEXT_TOWERS if tower + EMBEDDING.removeprefix("model.") in stored), "model.")
    if name.startswith("model."):
        return tower + name.removeprefix("model.")
    return f"language_model.{name}" if tower == "language_model.model." else name  # the head stands beside the tower


def is_kernel(name: str) -> bool:
    """Returns whether a tensor is a matrix that is stored [out, in]."""
    return name.endswith(KERNEL_ENDINGS)


def numbered(name: str, shape: Sequence[int], first: int = 0) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields the tensors that a name with `{}` stands for, and where each is in a leaf of this shape.

    Args:
        first: the number of the leaf's first layer.
    """
    for at in np.ndindex(*shape[: name.count("{}")]):
        yield name.format(*(number + first * (axis == 0) for axis, number in enumerate(at))), at


def hugging_face_tensors(params: Params, config: ModelConfig) -> dict[str, np.ndarray]:
    """Returns the parameters under their Hugging Face names and in their shapes: what `load_params` reads."""
    tensors: dict[str, np.ndarray] = {}
    params = params.separated()
    names, leaves = jax.tree.leaves(tensor_names(params, config)), jax.tree.leaves(params, is_leaf=is_by_layer)
    for name, leaf in zip(names, leaves, strict=True):
        layers = enumerate(leaf) if "{}" in name else [(0, leaf)]
        for layer, of_layer in layers:
            array = np.asarray(of_layer)
            whole = array[None] if "{}" in name else array
            for place, at in numbered(name, whole.shape, first=layer):
                tensors[place] = whole[at].T if is_kernel(name) else whole[at]
    return fuse_gpt_oss(fuse(tensors, config), config)


def _map_paths(tree: dict[str, Any], name: Callable[[str], str]) -> dict[str, Any]:
    return jax.tree.map_with_path(lambda path, _: name(_dotted(path)), tree, is_leaf=is_by_layer)


def _dotted(path: Sequence[Any]) -> str:
    return ".".join(entry.key for entry in path)
