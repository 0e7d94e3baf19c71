"""What the sharding rules come to for a model on a mesh; weights are read share by share."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from conftest import HF
from mesh_cases import CONFIGS, SHAPE, mesh_of

import cacheblend_jax as cb
from cacheblend_jax.model import ModelConfig, tensor_reading
from cacheblend_jax.model.sharding import ShardingRules, partition_of
from cacheblend_jax.model.weights import load_params, open_checkpoint

BOTH = ("model", "model_copies")


def config(heads: int, kv_heads: int, **options) -> ModelConfig:
    return ModelConfig(**SHAPE | {"num_heads": heads, "num_kv_heads": kv_heads} | options)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "shape", "of_heads", "of_kv"),
    [
        (8, 8, "1x8", ("model",), ("model",)),
        (32, 8, "2x4", ("model",), ("model",)),
        (8, 2, "1x8", BOTH, ("model",)),  # each KV head on four devices
        (8, 1, "1x8", ("model",), ()),  # the one KV head on all
        (12, 6, "2x4", ("model",), ("model",)),  # two groups of three KV heads: their queries can't be split further
        (4, 2, "1x8", ("model",), ("model",)),  # two query heads of a group, and four devices
        (6, 3, "1x8", (), ()),  # no number but 1 divides 3 and 8
        (8, 8, "8x1", ("model",), ()),
    ],
)
def test_heads_are_split_as_far_as_each_device_reads_its_kv_heads_alike(heads, kv_heads, shape, of_heads, of_kv):
    partition = partition_of(mesh_of(shape), config(heads, kv_heads))
    assert (partition.over("heads"), partition.over("kv_heads")) == (of_heads, of_kv)
    ways = int(shape[-1])
    assert partition.ways("mlp") == ways
    assert partition.ways("slots") == int(shape[0])
    assert partition.mesh.devices.size == mesh_of(shape).devices.size


def test_sizes_that_are_no_multiple_of_the_mesh_stay_whole():
    partition = partition_of(mesh_of("1x8"), config(8, 8, vocab_size=97, intermediate_size=60))
    assert partition.over("vocab") == partition.over("mlp") == ()


def test_rules_are_the_users():
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ("x", "y"))
    rules = ShardingRules(heads="y", kv_heads="y", mlp="x", expert_mlp=None, experts="y", vocab=None, slots=None)
    partition = partition_of(mesh, CONFIGS["experts"], rules)
    split = {name: axes for name, axes in partition.axes if axes}
    assert split == {"heads": ("y",), "kv_heads": ("y",), "mlp": ("x",), "experts": ("y",)}
    with pytest.raises(cb.CheckpointError, match=r"an axis named 'data' or 'model', got \('x', 'y'\); or pass rules="):
        partition_of(mesh, CONFIGS["experts"])


def test_no_axis_splits_both_rows_and_what_is_added_up_over_them():
    by_data = ShardingRules(experts="data")  # devices add up what each makes of the same rows
    partition = partition_of(mesh_of("2x4"), CONFIGS["experts"], by_data)
    assert (partition.over("experts"), partition.over("slots")) == (("data",), ())
    with pytest.raises(cb.CheckpointError, match="the experts and the inside of each by one axis, 'model'; set one"):
        partition_of(mesh_of("2x4"), CONFIGS["experts"], ShardingRules(experts="model"))


def test_of_each_parameter_one_share_at_a_time_is_read_into_host_memory(monkeypatch):
    checkpoint, read, allocated = open_checkpoint(HF / "mixtral"), [], []
    plain = cb.load_model(HF / "mixtral", dtype="float32")
    partition = partition_of(mesh_of("2x2"), plain.config)

    def allocate(shape, dtype):
        allocated.append(int(np.prod(shape)))
        return np.empty(shape, dtype)

    def note(view, rows, columns):
        read.append(rows_read(view, rows, columns))
        return read[-1]

    rows_read = tensor_reading._read_rows
    monkeypatch.setattr(tensor_reading, "aligned_empty", allocate)
    monkeypatch.setattr(tensor_reading, "_read_rows", note)
    params = load_params(checkpoint, plain.config, partition=partition)
    leaves = [(leaf, wanted) for leaf, wanted in zip(*map(jax.tree.leaves, (params, plain.params)), strict=True)]
    for leaf, wanted in leaves:
        np.testing.assert_array_equal(leaf, wanted)
    shares = [int(np.prod(leaf.sharding.shard_shape(leaf.shape))) for leaf, _ in leaves]
    assert sum(leaf.size // share for (leaf, _), share in zip(leaves, shares, strict=True)) == len(allocated)
    assert max(allocated) == max(shares) == max(leaf.size for leaf, _ in leaves) // 2
    assert sum(array.size for array in read) == sum(leaf.size for leaf, _ in leaves)  # nothing is read twice
