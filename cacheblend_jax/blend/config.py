"""How a blend chooses the tokens to recompute: what users configure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from cacheblend_jax.blend.selectors import Selector, selector_of
from cacheblend_jax.errors import CacheBlendError, is_whole_number

AUTO_RATIOS = (0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0)


@dataclass(frozen=True)
class BlendConfig:
    """How a blend chooses the tokens to recompute.

    Attributes:
        recompute_ratio: HKVD tokens / candidates, averaged over the layers after the check layer; in [0, 1]. `"auto"`:
            the controller chooses one of `auto_ratios` for each request, and which stored chunks to load.
        selector: the name of a selector (`cacheblend_jax.SELECTORS`), or a `Selector`. `None`: `"query"`, which
            recovers most on real models; with an automatic ratio `"hkvd"`, whose blend runs while KV loads, where
            `"query"` first takes the KV of all layers.
        check_layer: the layer where tokens are first chosen; `None`: the model's own.
        deviation: what the KV deviation is measured on: `"kv"`, `"k"` or `"v"`.
        num_stages: groups of layers after the check layer; the set shrinks between them (gradual filtering).
        seed: of the `random` selector.
        auto_ratios: what `"auto"` chooses among, ascending. The first is the least that quality requires. Each has
            compiled programs of its own, so they are few.

    Raises:
        CacheBlendError: an invalid value; the message names it.
    """

    recompute_ratio: float | Literal["auto"] = 0.15
    selector: str | Selector | None = None
    check_layer: int | None = None
    deviation: str = "kv"
    num_stages: int = 4
    seed: int = 0
    auto_ratios: tuple[float, ...] = AUTO_RATIOS

    def __post_init__(self) -> None:
        ratio = self.recompute_ratio
        if ratio != "auto" and not (_is_number(ratio) and 0 <= ratio <= 1):
            raise CacheBlendError(
                f"recompute_ratio must be in [0, 1], got {ratio!r}; 'auto' lets the controller choose"
            )
        if self.selector is None:
            object.__setattr__(self, "selector", "hkvd" if ratio == "auto" else "query")
        selector_of(self.selector)
        if self.deviation not in ("kv", "k", "v"):
            raise CacheBlendError(f"deviation must be 'kv', 'k' or 'v', got {self.deviation!r}")
        if not is_whole_number(self.num_stages, least=1):
            raise CacheBlendError(f"num_stages must be a whole number of at least 1, got {self.num_stages!r}")
        if self.check_layer is not None and not is_whole_number(self.check_layer, least=1):
            raise CacheBlendError(f"check_layer must be None or a whole number of at least 1, got {self.check_layer!r}")
        if not is_whole_number(self.seed, least=0, below=2**31):
            raise CacheBlendError(f"seed must be a whole number in [0, 2^31), got {self.seed!r}")
        ratios = self.auto_ratios
        if not ratios or any(not _is_number(ratio) or not 0 < ratio <= 1 for ratio in ratios):
            raise CacheBlendError(
                f"auto_ratios must be ratios in (0, 1], got {ratios!r}; mode 'reuse' recomputes nothing"
            )
        if list(ratios) != sorted(set(ratios)):
            raise CacheBlendError(f"auto_ratios must be ascending, got {ratios!r}")

    @property
    def is_auto(self) -> bool:
        """Whether the controller chooses the ratio."""
        return self.recompute_ratio == "auto"

    @property
    def ratio(self) -> float:
        """The recompute ratio, where it is fixed.

        Raises:
            ValueError: it is `"auto"`.
        """
        if self.recompute_ratio == "auto":
            raise ValueError("a prefill is planned at a fixed recompute ratio, got 'auto'")
        return self.recompute_ratio

    def with_ratio(self, ratio: float) -> BlendConfig:
        """Returns the same configuration at a fixed ratio."""
        return replace(self, recompute_ratio=ratio)

    def fixed(self) -> list[BlendConfig]:
        """Returns the configurations that requests may get: this one, or one for each of `auto_ratios` if automatic."""
        return [self.with_ratio(ratio) for ratio in self.auto_ratios] if self.is_auto else [self]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def blend_config(blend: BlendConfig | str | None) -> BlendConfig:
    """Returns what users mean: `"auto"` leaves the ratio to the controller, `None` is the default.

    Raises:
        CacheBlendError: it is neither, nor a `BlendConfig`.
    """
    if blend is None:
        return BlendConfig()
    if blend == "auto":
        return BlendConfig(recompute_ratio="auto")
    if not isinstance(blend, BlendConfig):
        raise CacheBlendError(f"blend must be a BlendConfig or 'auto', got {blend!r}")
    return blend
