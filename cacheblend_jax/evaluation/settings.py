"""Settings: the ways to answer that are compared with each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cacheblend_jax.blend import BlendConfig
from cacheblend_jax.choices import MODES, PLAIN, SELECTORS_COMPARED
from cacheblend_jax.engine.contexts import named_context
from cacheblend_jax.errors import CacheBlendError
from cacheblend_jax.store.quantise import check_kv_dtype


@dataclass(frozen=True)
class Setting:
    """One way to answer: a mode and, for `blend`, how it chooses the tokens to recompute (see `BlendConfig`).

    `context` names what chunks are precomputed after, see `engine.contexts.named_context`; `kv_dtype` is what their KV
    is quantised to.
    """

    mode: str
    selector: str = ""
    ratio: float = 0.0
    deviation: str = "kv"
    num_stages: int = 4
    check_layer: int | None = None
    context: str = PLAIN
    kv_dtype: str | None = None

    @property
    def label(self) -> str:
        """Names the setting in tables, plots and result files: short, and different for different settings."""
        of_mode = [self.selector, f"{self.ratio:g}"] if self.mode == "blend" else [self.mode]
        return " ".join([*of_mode, *self._unusual])

    @property
    def name(self) -> str:
        """The label without the ratio: the same for all points of one curve."""
        return " ".join([self.selector if self.mode == "blend" else self.mode, *self._unusual])

    @property
    def _unusual(self) -> list[str]:
        usual = Setting("blend")
        words = [f"after {Path(self.context).stem}"] if self.context != PLAIN else []
        words += [f"in {self.kv_dtype}"] if self.kv_dtype is not None else []
        words += [f"{self.deviation} only"] if self.deviation != usual.deviation else []
        words += [f"{self.num_stages} stages"] if self.num_stages != usual.num_stages else []
        return words + ([f"check {self.check_layer}"] if self.check_layer is not None else [])

    def blend_config(self) -> BlendConfig:
        """Returns the configuration of an engine that answers so.

        Raises:
            CacheBlendError: a value is out of its range, or the selector is unknown.
        """
        if self.mode != "blend":
            return BlendConfig()
        return BlendConfig(self.ratio, self.selector, self.check_layer, self.deviation, self.num_stages)


def settings_for(
    *,
    modes: Sequence[str] = ("full", "reuse", "blend"),
    selectors: Sequence[str] = SELECTORS_COMPARED,
    ratios: Sequence[float] = (0.15,),
    deviations: Sequence[str] = ("kv",),
    num_stages: Sequence[int] = (4,),
    check_layer: int | None = None,
    contexts: Sequence[str] = (PLAIN,),
    kv_dtypes: Sequence[str | None] = (None,),
) -> list[Setting]:
    """Returns every mode and, in place of `blend`, every selector at every ratio, deviation and number of stages.

    Each of them with every context and every dtype of stored KV, except `full`, which loads no chunks.

    Raises:
        CacheBlendError: a mode, a selector or a dtype is unknown, or a value is out of its range.
    """
    for kv_dtype in kv_dtypes:
        check_kv_dtype(kv_dtype)
    if unknown := [mode for mode in modes if mode not in MODES]:
        raise CacheBlendError(f"unknown mode {unknown[0]!r}; known: {', '.join(MODES)}")
    settings = [
        Setting(mode, context=context, kv_dtype=kv_dtype)
        for mode in modes
        for context in (contexts if mode != "full" else (PLAIN,))
        for kv_dtype in (kv_dtypes if mode != "full" else (None,))
        if mode != "blend"
    ]
    if "blend" in modes:
        settings += [
            Setting("blend", selector, ratio, deviation, stages, check_layer, context, kv_dtype)
            for context in contexts
            for kv_dtype in kv_dtypes
            for selector in selectors
            for ratio in ratios
            for deviation in deviations
            for stages in num_stages
        ]
    for setting in settings:
        setting.blend_config()  # so that a bad value is found before any work
    for context in dict.fromkeys(setting.context for setting in settings):
        named_context(context)
    return settings
