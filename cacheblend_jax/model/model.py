"""A loaded model: configuration, parameters and tokenizer, with the fingerprint that ties stored KV to its weights."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from cacheblend_jax.model.config import ModelConfig
from cacheblend_jax.model.encoding import tokenizer_bytes
from cacheblend_jax.model.params import (
    Params,
    is_by_layer,
    shared_by_layer,
    suits_by_layer,
    suits_programs_of_layers,
)
from cacheblend_jax.model.sharding import CACHE_AXES, LAYER_AXES, ShardingRules, partition_of, result_shardings
from cacheblend_jax.model.transformer import axis_names, joined_by_layer, random_params
from cacheblend_jax.model.weights_digest import SameLeaves, WeightFiles, content_digest, params_digest
from cacheblend_jax.runtime.placing import own_range, placed
from cacheblend_jax.runtime.programs import Runner
from pallas_kernels.partition import Partition

# Where HKVD tokens are chosen, and how long prompts may be: stand-alone KV does not depend on them.
REQUEST_FIELDS = ("check_layer", "max_positions")


@dataclass(frozen=True, eq=False)
class Model:
    """A decoder ready to run. `tokenizer` is `None` where the checkpoint has none: prompts are then token ids.

    On a GPU, layers that are stacked in `params` are taken apart there, and projections of the same rows joined
    (`Params.take_apart`); `Params.separated` shows each by itself.
    """

    config: ModelConfig
    params: Params
    tokenizer: Any = None
    name: str = ""
    stop_token_ids: tuple[int, ...] = ()
    directory: Path | None = None  # the checkpoint's, if there is one
    weight_files: WeightFiles | None = None  # the files in it that the parameters were loaded from
    kernels: str | None = None  # the implementation that its programs prefer; `None`: what is best for the device
    partition: Partition | None = None  # how it is split over a mesh
    whole: Model | None = None  # the model that this is on one group of devices, see `groups`

    def __post_init__(self) -> None:
        if suits_by_layer(self.platform) and self.whole is None:
            alone = len(self.placement.device_set) == 1
            self.params.take_apart(joined_by_layer(self.config) if alone else None)

    def __repr__(self) -> str:
        layers = f"{self.config.num_layers} layers of {self.config.hidden_size}"
        return f"Model({self.name!r}, {self.config.architecture}, {layers}, {self.config.dtype}, on {self.platform})"

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over configuration, weights and tokenizer: stored KV is valid for them alone.

        The weights enter by the SHA-256 of the files they were loaded from, which the user's cache remembers; without
        files, or where these have changed since, by that of the parameters themselves. Computed once, and again after
        a parameter was replaced (by merging an adapter into `params.layers`, say).
        """
        if self.whole is not None:
            return self.whole.fingerprint
        known = self._hashed.get("fingerprint")
        if known is None or not known[0].as_in(self.params):
            known = self._hashed["fingerprint"] = (SameLeaves(self.params), self._computed_fingerprint())
        return known[1]

    def compute_fingerprint(self) -> None:
        """Has the fingerprint ready: hashing the weights takes a while, the first time."""
        self.fingerprint  # noqa: B018

    @property
    def weights_digest(self) -> str:
        """What the weights are recognised by, whatever they were cast to: a digest of samples of their files.

        Without files, or where a parameter was replaced, it is one of the parameters.
        """
        files = self.weight_files
        if files is not None and files.loaded.as_in(self.params):
            return content_digest(files.states)
        return params_digest(self.params)

    def _computed_fingerprint(self) -> str:
        digest = hashlib.sha256()
        parts = [_config_bytes(self.config), self._tokenizer_bytes]
        files = self.weight_files
        # Parameters that replaced loaded ones are not what the files hold.
        loaded = files.digest() if files is not None and files.loaded.as_in(self.params) else None
        parts.append(f"files {loaded}".encode() if loaded else f"params {params_digest(self.params)}".encode())
        for part in parts:
            digest.update(len(part).to_bytes(8, "little") + part)
        return digest.hexdigest()

    @cached_property
    def _hashed(self) -> dict[str, tuple[SameLeaves, str]]:
        return {}

    @cached_property
    def _tokenizer_bytes(self) -> bytes:
        return tokenizer_bytes(self.tokenizer)

    @cached_property
    def runner(self) -> Runner:
        """Runs this model's programs; shared by all its engines that want the same kernels."""
        if self.kernels not in self._runners:
            results = None if self.partition is None else partial(result_shardings, self.partition)
            runner = Runner(
                self.platform, self.placement, kernels=self.kernels, partition=self.partition, results=results
            )
            self._runners.setdefault(self.kernels, runner)
        return self._runners[self.kernels]

    @property
    def takes_layers(self) -> bool:
        """Whether programs of one layer are to take that layer's weights alone, though they are stacked in `params`."""
        return self.partition is None and suits_programs_of_layers(self.platform, self.params)

    @property
    def step_params(self) -> Params:
        """What programs of one layer take their weights from: `params`, or parts of the same memory by layer."""
        if not self.takes_layers:
            return self.params
        known = self._shared.get("layers")
        if known is None or not known[0].as_in(self.params):
            known = self._shared["layers"] = SameLeaves(self.params), shared_by_layer(self.params)
        return known[1]

    @cached_property
    def _shared(self) -> dict[str, tuple[SameLeaves, Params]]:
        return {}

    @property
    def groups(self) -> tuple[Model, ...]:
        """The model on each group of devices that decodes slots of its own, and prefills for them; else itself.

        Their parameters are what these devices hold of this model's: no copy. Each has programs of its own, since XLA
        compiles for given devices. Where several processes share the mesh, all of it is one group: they run the same
        programs in the same order.
        """
        if self.partition is None or self.partition.ways("slots") == 1 or self.spans_hosts:
            return (self,)
        return self._groups

    @cached_property
    def _groups(self) -> tuple[Model, ...]:
        assert self.partition is not None
        groups = []
        for partition in self.partition.groups("slots"):
            is_split = partition.mesh.size > 1
            placement = partition.sharding() if is_split else SingleDeviceSharding(partition.mesh.devices.item())
            params, own = _held_on(placement, self.params), partition if is_split else None
            groups.append(replace(self, params=params, partition=own, weight_files=None, whole=self))
        return tuple(groups)

    def follow_whole(self) -> None:
        """Has a group's parameters be what those of the whole model are now: some may have been replaced."""
        if self.whole is not None:
            now = _held_on(self.placement, self.whole.params)
            self.params.embedder.update(now.embedder)
            self.params.layers.update(now.layers)

    @cached_property
    def _runners(self) -> dict[str | None, Runner]:
        return {}

    def follow(self, outline: Model) -> None:
        """Has this model run by the programs compiled for its outline, and share what is known of the tokenizer."""
        self.__dict__.update(_runners=outline._runners, _tokenizer_bytes=outline._tokenizer_bytes)

    def with_kernels(self, kernels: str | None) -> Model:
        """Returns this model with programs that prefer an implementation of the kernels: always the same object."""
        if kernels == self.kernels:
            return self
        if kernels not in self._with_kernels:
            model = replace(self, kernels=kernels)
            # What is known of this model is known of all of them.
            known = {"_hashed": self._hashed, "_shared": self._shared}
            model.__dict__.update(known, _runners=self._runners, _with_kernels=self._with_kernels)
            self._with_kernels.setdefault(kernels, model)
        return self._with_kernels[kernels]

    @cached_property
    def _with_kernels(self) -> dict[str | None, Model]:
        return {self.kernels: self}

    @property
    def placement(self) -> jax.sharding.Sharding:
        """Where arrays other than parameters and KV go: the parameters' device, or all devices of their mesh."""
        sharding = jax.tree.leaves(self.params)[0].sharding
        if isinstance(sharding, jax.sharding.NamedSharding):
            return jax.sharding.NamedSharding(sharding.mesh, jax.P())
        return sharding

    @cached_property
    def cache_placement(self) -> jax.sharding.Sharding:
        """Where KV `[layers, keys, kv_heads, …]` goes: as `placement`, or split by heads."""
        return self.placement if self.partition is None else self.partition.sharding(*CACHE_AXES)

    @cached_property
    def layer_placement(self) -> jax.sharding.Sharding:
        """Where one layer's KV `[keys, kv_heads, …]` goes."""
        return self.placement if self.partition is None else self.partition.sharding(*LAYER_AXES)

    @property
    def kv_shares(self) -> int:
        """Into how many shares KV is split: a device holds one."""
        return 1 if self.partition is None else self.partition.ways("kv_heads")

    @cached_property
    def own_kv_heads(self) -> range:
        """The KV heads that this process's devices hold: all, unless others have some of the devices."""
        return own_range(self.layer_placement, (1, self.config.num_kv_heads, 1), axis=1)

    @property
    def spans_hosts(self) -> bool:
        """Whether some of its devices are other processes'."""
        return not self.placement.is_fully_addressable

    @property
    def platform(self) -> str:
        """The platform that the parameters are on: `"cpu"`, `"gpu"` or `"tpu"`."""
        device: Any = next(iter(self.placement.device_set))
        return device.platform


def random_model(config: ModelConfig, seed: int = 0, *, by_layer: bool | None = None) -> Model:
    """Returns a model with random weights, drawn on the device: for benchmarks and tests of shape and speed.

    Args:
        by_layer: each layer's weights as arrays of their own; `None`: on a GPU.
    """
    return Model(config, random_params(jax.random.key(seed), config, by_layer=by_layer), name="random")


def split_model(model: Model, mesh: jax.sharding.Mesh, rules: ShardingRules | None = None) -> Model:
    """Returns a model on the devices of a mesh, as `load_model(…, mesh=…, rules=…)` would load it.

    Its layers must be stacked, or each projection by itself.
    """
    partition = partition_of(mesh, model.config, rules)

    def placed(leaf: Any, names: jax.P) -> Any:
        if isinstance(leaf, tuple):
            return jax.device_put(leaf, partition.sharding(*names[1:]))
        return jax.device_put(leaf, partition.sharding(*names))

    params = jax.tree.map(placed, model.params, axis_names(model.config), is_leaf=is_by_layer)
    return replace(model, params=params, weight_files=None, partition=partition if mesh.size > 1 else None)


def _held_on(placement: jax.sharding.Sharding, params: Params) -> Params:
    """Returns parameters as the devices of a placement hold them, which are some of theirs, and hold all."""

    def of(leaf: Any) -> Any:
        where = placement
        if isinstance(placement, jax.sharding.NamedSharding):
            where = jax.sharding.NamedSharding(placement.mesh, leaf.sharding.spec)
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
        return placed(leaf, where)

    return jax.tree.map(of, params)


def _config_bytes(config: ModelConfig) -> bytes:
    """Returns what stand-alone KV depends on.

    Options at their defaults are left out, so that a new option, of another family, changes no model's fingerprint.
    """
    wanted = (field for field in fields(config) if field.name not in REQUEST_FIELDS)
    changed = {field.name for field in wanted if getattr(config, field.name) != field.default}
    options = {name: value for name, value in asdict(config).items() if name in changed}
    return json.dumps(options, sort_keys=True).encode()
