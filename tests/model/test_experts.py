"""Mixtures of experts: what is computed, how much of it, and whichever way a checkpoint stores them."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FAMILIES, HF, edit_json, family_model, refusal
from safetensors.numpy import load_file, save_file

import cacheblend_jax as cb
from cacheblend_jax.blend.flops import prefill_flops
from cacheblend_jax.evaluation.bench import bench
from cacheblend_jax.evaluation.shapes import SHAPES
from cacheblend_jax.model import experts
from cacheblend_jax.model.config import ModelConfig
from cacheblend_jax.model.experts import (
    Kernels,
    block_by_block,
    by_copies,
    by_ragged_dot,
    sorted_by_expert,
    tile_by_tile,
)
from cacheblend_jax.model.params import OfLayer
from cacheblend_jax.model.transformer import layer_at

TOKENS, EXPERTS, CHOSEN, HIDDEN, SIZE = 40, 6, 2, 8, 12
USED = 4  # experts that any token is computed by


def kernels(rng: np.random.Generator) -> list[np.ndarray]:
    """Two layers of them; of the second, those of unused experts and of the other layer are NaN."""
    shapes = [(HIDDEN, SIZE), (HIDDEN, SIZE), (SIZE, HIDDEN)]
    drawn = [rng.normal(size=(2, EXPERTS, *shape)).astype(np.float32) for shape in shapes]
    for stack in drawn:
        stack[0] = stack[1, USED:] = np.nan
    return drawn


@pytest.mark.parametrize("product", [tile_by_tile, block_by_block, by_copies])
def test_rows_are_multiplied_by_their_own_experts_alone(product, monkeypatch):
    """NaN in what has no rows, and in rows of padding, does not spread: neither is read."""
    monkeypatch.setattr(experts, "BLOCK_BYTES", 3 * HIDDEN * SIZE * 4)  # several blocks, the last of them not full
    monkeypatch.setattr(experts, "TILES", (4, 8))
    rng = np.random.default_rng(0)
    stacks, rows = kernels(rng), rng.normal(size=(TOKENS, HIDDEN)).astype(np.float32)
    chosen = np.sort(rng.permuted(np.tile(np.arange(USED), (TOKENS, 1)), axis=1)[:, :CHOSEN]).astype(np.int32)
    valid = np.arange(TOKENS) < 33
    chosen[~valid] = EXPERTS - 1
    rows[~valid] = np.nan

    @jax.jit
    def computed(rows, chosen, valid):
        groups = sorted_by_expert(chosen, valid, num_experts=EXPERTS)
        of_layer = Kernels(*(OfLayer(jnp.asarray(stack), 1) for stack in stacks))
        return product(rows[groups.tokens], groups, of_layer, lambda gate, up: jax.nn.relu(gate) * up)[groups.places]

    out = computed(rows, chosen, valid)
    for token, place in np.ndindex(33, CHOSEN):
        gate, up, down = (stack[1, chosen[token, place]] for stack in stacks)
        wanted = (np.maximum(rows[token] @ gate, 0) * (rows[token] @ up)) @ down
        np.testing.assert_allclose(out[token, place], wanted, rtol=1e-4, atol=1e-5)


def test_all_products_are_one():
    """That of each platform, by the weights of a model."""
    layer = layer_at(family_model("every_option").params, FAMILIES["every_option"], 2)
    rng = np.random.default_rng(3)
    rows, chosen = rng.normal(size=(30, 32)).astype(np.float32), rng.integers(0, 4, (30, 2)).astype(np.int32)
    projections = layer.experts.gate_proj, layer.experts.up_proj, layer.experts.down_proj
    stacks = [projection.stacks for projection in projections]
    of_layer = Kernels(*(kernel for kernel, _ in stacks), *(bias for _, bias in stacks))

    @partial(jax.jit, static_argnums=2)
    def computed_by(rows, chosen, product):
        groups = sorted_by_expert(chosen, jnp.arange(30) < 29, num_experts=4)
        return product(rows[groups.tokens], groups, of_layer, layer.gated)[: 2 * 29]

    computed = [
        computed_by(rows, chosen, product) for product in (tile_by_tile, block_by_block, by_ragged_dot, by_copies)
    ]
    for other in computed[1:]:
        np.testing.assert_allclose(other, computed[0], rtol=1e-4, atol=1e-6)


def test_layers_of_their_own_have_the_experts_of_a_stack():
    config = FAMILIES["every_option"]
    rng = np.random.default_rng(5)
    rows = rng.normal(size=(9, 32)).astype(np.float32)
    attended = rng.normal(size=(9, config.num_heads, config.head_dim)).astype(np.float32)
    stacked, by_layer = (cb.model.random_model(config, seed=7, by_layer=form).params for form in (False, True))

    @jax.jit
    def finish(params, rows, attended):
        return layer_at(params, config, 3).finish(rows, attended, jnp.arange(9) < 8)

    finished = [finish(params, rows, attended) for params in (stacked, by_layer, by_layer.only_layer(3))]
    for other in finished[1:]:
        np.testing.assert_allclose(other, finished[0], rtol=1e-5, atol=1e-5)


DOT = re.compile(r"= f32\[(\d+),(\d+)\]\S* dot\(.*?lhs_contracting_dims=\{1\}")


@pytest.mark.once
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="reads the program of a CPU's product")
@pytest.mark.parametrize(("tokens", "padding"), [(300, 0), (600, 0), (600, 300)])
def test_what_is_computed_grows_with_the_routed_tokens_alone(tokens, padding):
    """Counted: a tile's products in the compiled program, times how often it runs."""
    rng = np.random.default_rng(0)
    stacks, rows = kernels(rng), rng.normal(size=(tokens, HIDDEN)).astype(np.float32)
    chosen = np.sort(rng.permuted(np.tile(np.arange(USED), (tokens, 1)), axis=1)[:, :CHOSEN]).astype(np.int32)
    valid = np.arange(tokens) < tokens - padding
    tiles = []

    def gated(gate, up):
        tiles.append(gate.shape)
        return jax.nn.relu(gate) * up

    def computed(rows, chosen, valid):
        groups = sorted_by_expert(chosen, valid, num_experts=EXPERTS)
        of_layer = Kernels(*(OfLayer(jnp.asarray(stack), 1) for stack in stacks))
        return tile_by_tile(rows[groups.tokens], groups, of_layer, gated)

    program = jax.jit(computed).lower(rows, chosen, valid).compile().as_text()
    inner = {SIZE: HIDDEN, HIDDEN: SIZE}  # what a product sums over, by its columns
    products = [2 * int(rows) * int(columns) * inner[int(columns)] for rows, columns in DOT.findall(program)]
    assert len(products) == 3
    tiles.clear()
    with jax.disable_jit():
        computed(*map(jnp.asarray, (rows, chosen, valid)))
    needed = CHOSEN * valid.sum() * 6 * HIDDEN * SIZE
    assert needed <= sum(products) * len(tiles) < 1.1 * needed


def stacked_as_transformers_5_may(source: Path, target: Path) -> Path:
    """Writes a checkpoint with the tensors of all experts of a layer in one, and no others of transformers 4."""
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    tensors = {name.replace(".block_sparse_moe.", ".mlp."): tensor for name, tensor in tensors.items()}
    for old, new in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
        tensors = {name.replace(f".{old}.", f".{new}."): tensor for name, tensor in tensors.items()}
    config = json.loads((source / "config.json").read_text())
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}.mlp.experts"
        of = {
            name: np.stack([tensors.pop(f"{at}.{i}.{name}.weight") for i in range(config["num_local_experts"])])
            for name in ("gate_proj", "up_proj", "down_proj")
        }
        tensors[f"{at}.gate_up_proj"] = np.concatenate([of["gate_proj"], of["up_proj"]], axis=1)
        tensors[f"{at}.down_proj"] = of["down_proj"]
    save_file(tensors, target / "model.safetensors")
    return target


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe"])
def test_experts_are_read_from_one_tensor_of_all(case, tmp_path):
    wanted = cb.load_model(HF / case)
    path = stacked_as_transformers_5_may(HF / case, tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, cb.load_model(path).params, wanted.params)
    edit_json(path / "config.json", num_local_experts=wanted.config.num_experts + 1)
    assert "of experts" in refusal(path)


def test_a_missing_expert_is_named(tmp_path):
    path = shutil.copytree(HF / "qwen3_moe", tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    tensors.pop("model.layers.1.mlp.experts.4.up_proj.weight")
    save_file(tensors, path / "model.safetensors")
    assert "1 tensors are missing, among them model.layers.1.mlp.experts.4.up_proj.weight" in refusal(path)
    edit_json(path / "config.json", num_local_experts=4)
    assert "have no place in Qwen3MoeForCausalLM, among them 'model.layers.0.mlp.experts.4." in refusal(path)


REFUSED = [
    ({"num_experts_per_tok": 7}, "num_experts_per_tok must be in [1, 6], the number of experts, got 7"),
    ({"mlp_only_layers": [1]}, "mlp_only_layers must be such that all layers have experts, or none, got [1]"),
    ({"mlp_only_layers": "all"}, "mlp_only_layers must be a list of layers, got 'all'"),
    ({"decoder_sparse_step": 2}, "decoder_sparse_step must be such that all layers have experts, or none, got 2"),
    ({"n_shared_experts": 1}, "n_shared_experts 1 is not supported"),
    ({"scoring_func": "sigmoid"}, "scoring_func 'sigmoid' is not supported"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=lambda value: str(value)[:30])
def test_routers_of_another_kind_are_refused(changes, message, tmp_path):
    path = shutil.copytree(HF / "qwen3_moe", tmp_path / "model")
    edit_json(path / "config.json", **changes)
    assert message in refusal(path)


def test_a_mixture_of_no_experts_is_dense():
    raw = json.loads((HF / "qwen3_moe" / "config.json").read_text())
    assert ModelConfig.from_hugging_face(raw).num_experts == 6
    for dense in ({"num_experts": 0}, {"mlp_only_layers": [0, 1, 2]}, {"decoder_sparse_step": 7}):
        assert ModelConfig.from_hugging_face(raw | dense).num_experts == 0


def test_a_prefill_counts_the_experts_of_its_tokens_and_the_router():
    dense, mixture = SHAPES["bench-16l"], SHAPES["bench-16l-experts"]
    positions = [np.arange(100)] * 16
    router = 2 * 512 * 8 * (15 * 100 + 1)  # of the last layer, for the last token
    assert prefill_flops(mixture, positions) - prefill_flops(dense, positions) == router


def test_the_peer_is_not_timed_with_experts_and_says_so_before_anything_is():
    with pytest.raises(cb.CacheBlendError, match="--peer torch times dense models, and random has 4 experts a layer"):
        bench(family_model("every_option"), tokens=(64,), peer="torch", announce=pytest.fail)
