"""How a model is split over a mesh: the rules, which users may replace, and what they come to for one model."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import jax

from cacheblend_jax.errors import CheckpointError
from cacheblend_jax.model.config import ModelConfig
from cacheblend_jax.model.kv_cache import GrowingCache, KVCache, LayerKV
from cacheblend_jax.model.slot_cache import SlotCache
from pallas_kernels import QuantisedKV
from pallas_kernels.partition import Axes, Partition

CACHE_AXES: Axes = None, None, "kv_heads"  # of `[layers, keys, kv_heads, …]`
LAYER_AXES: Axes = CACHE_AXES[1:]


@dataclass(frozen=True)
class ShardingRules:
    """Which axis of the mesh splits each axis of a model's arrays; `None`, or an axis that the mesh lacks: none does.

    Each device has its heads of queries, its KV heads and its part of the MLP, of weights and KV alike: of stored KV on
    its way, of what stays on the device, and of caches that decoding extends. Where an axis is no multiple of the
    mesh's, it stays whole on each device.

    KV heads that are fewer than the devices, or no multiple of them, are split into as many groups as divide both
    numbers, and each group is on several devices: 2 KV heads on 8 devices are each on four of them. Query heads are
    then split over all devices if each has but one KV head (and its query heads allow it), else into the same groups.

    Attributes:
        heads: query heads: of their projection, of the output projection, and of attention sinks.
        kv_heads: key and value heads.
        mlp: the inner size of the MLP.
        expert_mlp: that of each expert.
        experts: the experts; each device then computes its own, so that its work depends on the tokens.
        vocab: of the embedding, and of the projection to logits.
        slots: answers that are decoded together (data parallelism).
    """

    heads: str | None = "model"
    kv_heads: str | None = "model"
    mlp: str | None = "model"
    expert_mlp: str | None = "model"
    experts: str | None = None
    vocab: str | None = "model"
    slots: str | None = "data"


def partition_of(mesh: jax.sharding.Mesh, config: ModelConfig, rules: ShardingRules | None = None) -> Partition:
    """Returns what the rules come to for a model on a mesh.

    An axis of the mesh that has more devices than there are groups of KV heads becomes two: the groups, by its own
    name, and the `…_copies` of each.

    Raises:
        CheckpointError: the rules name no axis of the mesh.
    """
    rules = ShardingRules() if rules is None else rules
    wanted = asdict(rules)
    named = sorted({axis for axis in wanted.values() if axis is not None})
    if not set(named) & set(mesh.axis_names):
        raise CheckpointError(
            f"mesh must have an axis named {' or '.join(map(repr, named))}, got {mesh.axis_names}; or pass rules="
        )
    groups = math.gcd(config.num_kv_heads, mesh.shape.get(rules.kv_heads, 1))
    mesh, parts = _with_copies(mesh, rules.kv_heads, groups)
    sizes = {"mlp": config.intermediate_size, "expert_mlp": config.expert_size}
    sizes |= {"experts": config.num_experts, "vocab": config.vocab_size}
    axes = {"slots": parts.get(rules.slots, ()), "kv_heads": parts.get(rules.kv_heads, ())[:1] if groups > 1 else ()}
    for name, size in sizes.items():
        over = parts.get(wanted[name], ())
        axes[name] = over if size and size % _ways(mesh, over) == 0 else ()
    axes["heads"] = _heads_axes(mesh, config, parts.get(rules.heads, ()), axes["kv_heads"])
    return Partition(mesh, tuple(sorted(axes.items())))


def _with_copies(
    mesh: jax.sharding.Mesh, axis: str | None, groups: int
) -> tuple[jax.sharding.Mesh, dict[str | None, tuple[str, ...]]]:
    """Returns the mesh with one axis as groups and copies, where it must be, and what each axis has become."""
    parts: dict[str | None, tuple[str, ...]] = {name: (name,) for name in mesh.axis_names}
    shape = [(name, mesh.shape[name]) for name in mesh.axis_names]
    if axis in parts and 1 < groups < mesh.shape[axis]:
        at = mesh.axis_names.index(axis)
        shape[at : at + 1] = [(axis, groups), (f"{axis}_copies", mesh.shape[axis] // groups)]
        parts[axis] = str(axis), f"{axis}_copies"
    names, sizes = zip(*shape, strict=True)
    automatic = (jax.sharding.AxisType.Auto,) * len(names)  # from jax 0.12 on meshes are explicit by default
    return jax.sharding.Mesh(mesh.devices.reshape(sizes), names, axis_types=automatic), parts


def _heads_axes(
    mesh: jax.sharding.Mesh, config: ModelConfig, wanted: tuple[str, ...], of_kv: tuple[str, ...]
) -> tuple[str, ...]:
    """Returns what splits query heads: `wanted` where each device's queries then read all of its KV heads alike."""
    kv_ways = _ways(mesh, of_kv)
    if wanted[: len(of_kv)] != of_kv:
        return of_kv
    copies = _ways(mesh, wanted) // kv_ways
    shares_one = config.num_kv_heads == kv_ways and config.num_heads // config.num_kv_heads % copies == 0
    return wanted if copies == 1 or shares_one else of_kv


def _ways(mesh: jax.sharding.Mesh, axes: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def result_shardings(partition: Partition, results: Any) -> Any:
    """Returns how a program's results are split, given their shapes: KV by its heads, all else on every device."""

    def of(leaf: Any) -> Any:
        if isinstance(leaf, SlotCache):
            shardings = [partition.sharding(*axes) for axes in leaf.axes(partition)]
            return jax.tree.unflatten(jax.tree.structure(leaf), shardings)
        if isinstance(leaf, LayerKV) or (isinstance(leaf, QuantisedKV) and len(leaf.k.shape) == 3):
            names = LAYER_AXES
        else:
            names = CACHE_AXES if isinstance(leaf, KVCache | GrowingCache | QuantisedKV) else ()
        return jax.tree.map(lambda _: partition.sharding(*names), leaf)

    records = KVCache, LayerKV, GrowingCache, QuantisedKV, SlotCache
    return jax.tree.map(of, results, is_leaf=lambda leaf: isinstance(leaf, records))
