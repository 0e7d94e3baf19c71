"""How a model is split over a mesh: the rules, which users may replace, and what they come to for one model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import jax

from cacheblend_jax.errors import CheckpointError
from cacheblend_jax.model.config import ModelConfig
from cacheblend_jax.model.kv_cache import GrowingCache, KVCache, LayerKV
from cacheblend_jax.model.slot_cache import SlotCache
from cacheblend_jax.model.slots import Slots
from pallas_kernels import QuantisedKV
from pallas_kernels.partition import Axes, Partition

CACHE_AXES: Axes = None, None, "kv_heads"  # of `[layers, keys, kv_heads, …]`
LAYER_AXES: Axes = CACHE_AXES[1:]


@dataclass(frozen=True)
class ShardingRules:
    """Which axis of the mesh splits each axis of a model's arrays; `None`, or an axis that the mesh lacks: none does.

    Query heads follow their KV heads, whatever `heads` says: the same axis splits them, and they are split further only
    where a device's queries read one KV head alone.

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
        slots: answers that are decoded together (data parallelism); not split by an axis that splits anything else,
            over which devices add up what they have of the same rows.
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
        CheckpointError: the rules name no axis of the mesh, or one twice for the same array.
    """
    shape, axes = _split(dict(mesh.shape), config, ShardingRules() if rules is None else rules)
    automatic = (jax.sharding.AxisType.Auto,) * len(shape)  # from jax 0.12 on meshes are explicit by default
    devices = mesh.devices.reshape(tuple(shape.values()))
    return Partition(jax.sharding.Mesh(devices, tuple(shape), axis_types=automatic), tuple(sorted(axes.items())))


def ways_of(shape: Mapping[str, int], config: ModelConfig, rules: ShardingRules | None = None) -> dict[str, int]:
    """Returns into how many shares a mesh of that shape splits each axis that `ShardingRules` names, without devices.

    Raises:
        CheckpointError: as `partition_of`.
    """
    shape, axes = _split(dict(shape), config, ShardingRules() if rules is None else rules)
    return {name: _ways(shape, over) for name, over in axes.items()}


def _split(
    shape: dict[str, int], config: ModelConfig, rules: ShardingRules
) -> tuple[dict[str, int], dict[str, tuple[str, ...]]]:
    """Returns the mesh's shape, an axis of it in two where it must be, and which of its axes split each array axis."""
    wanted = asdict(rules)
    named = sorted({axis for axis in wanted.values() if axis is not None})
    if not set(named) & set(shape):
        raise CheckpointError(
            f"mesh must have an axis named {' or '.join(map(repr, named))}, got {tuple(shape)}; or pass rules="
        )
    groups = math.gcd(config.num_kv_heads, shape.get(rules.kv_heads or "", 1))
    shape, parts = _with_copies(shape, rules.kv_heads, groups)
    sizes = {"mlp": config.intermediate_size, "expert_mlp": config.expert_size}
    sizes |= {"experts": config.num_experts, "vocab": config.vocab_size}
    axes = {"slots": parts.get(rules.slots, ()), "kv_heads": parts.get(rules.kv_heads, ())[:1] if groups > 1 else ()}
    for name, size in sizes.items():
        over = parts.get(wanted[name], ())
        axes[name] = over if size and size % _ways(shape, over) == 0 else ()
    if set(axes["experts"]) & set(axes["expert_mlp"]):
        raise CheckpointError(
            f"rules split the experts and the inside of each by one axis, {rules.experts!r}; set one of experts and "
            "expert_mlp to None, or to another axis"
        )
    axes["heads"] = _heads_axes(shape, config, parts.get(rules.heads, ()), axes["kv_heads"])
    if set(axes["slots"]) & {axis for name, over in axes.items() if name != "slots" for axis in over}:
        axes["slots"] = ()
    return shape, axes


def _with_copies(
    shape: dict[str, int], axis: str | None, groups: int
) -> tuple[dict[str, int], dict[str | None, tuple[str, ...]]]:
    """Returns a mesh's shape with one axis as groups and copies, where it must be, and what each axis has become."""
    parts: dict[str | None, tuple[str, ...]] = {name: (name,) for name in shape}
    divided: dict[str, int] = {}
    for name, size in shape.items():
        if name == axis and 1 < groups < size:
            divided |= {name: groups, f"{name}_copies": size // groups}
            parts[name] = name, f"{name}_copies"
        else:
            divided[name] = size
    return divided, parts


def _heads_axes(
    shape: dict[str, int], config: ModelConfig, wanted: tuple[str, ...], of_kv: tuple[str, ...]
) -> tuple[str, ...]:
    """Returns what splits query heads: `wanted` where each device's queries then read all of its KV heads alike."""
    kv_ways = _ways(shape, of_kv)
    if wanted[: len(of_kv)] != of_kv:
        return of_kv
    copies = _ways(shape, wanted) // kv_ways
    shares_one = config.num_kv_heads == kv_ways and config.num_heads // config.num_kv_heads % copies == 0
    return wanted if copies == 1 or shares_one else of_kv


def _ways(shape: Mapping[str, int], axes: tuple[str, ...]) -> int:
    return math.prod(shape[axis] for axis in axes)


def result_shardings(partition: Partition, results: Any) -> Any:
    """Returns how a program's results are split, given their shapes: KV by its heads, slots by what splits those.

    All else is on every device.
    """

    def of(leaf: Any) -> Any:
        if isinstance(leaf, Slots):
            of_slots = partition.sharding(leaf.cache.rows_axis(partition))
            return Slots(of(leaf.cache), jax.tree.map(lambda _: of_slots, leaf.turn))
        if isinstance(leaf, SlotCache):
            shardings = [partition.sharding(*axes) for axes in leaf.axes(partition)]
            return jax.tree.unflatten(jax.tree.structure(leaf), shardings)
        if isinstance(leaf, LayerKV) or (isinstance(leaf, QuantisedKV) and len(leaf.k.shape) == 3):
            names = LAYER_AXES
        else:
            names = CACHE_AXES if isinstance(leaf, KVCache | GrowingCache | QuantisedKV) else ()
        return jax.tree.map(lambda _: partition.sharding(*names), leaf)

    records = KVCache, LayerKV, GrowingCache, QuantisedKV, SlotCache, Slots
    return jax.tree.map(of, results, is_leaf=lambda leaf: isinstance(leaf, records))
