"""What a scheduler needs of an engine, and what it tells of itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from cacheblend_jax.blend import BlendConfig
from cacheblend_jax.blend.buckets import Buckets
from cacheblend_jax.engine.prompt import Prompt, TokenizedPrompt
from cacheblend_jax.engine.results import PrefillResult
from cacheblend_jax.errors import CacheBlendError, is_whole_number
from cacheblend_jax.model.decode import MOST_AT_ONCE
from cacheblend_jax.model.model import Model


@runtime_checkable
class Prefills(Protocol):
    """What a scheduler needs of an engine."""

    @property
    def model(self) -> Model:
        """The model that answers."""

    @property
    def buckets(self) -> Buckets:
        """How lengths are padded."""

    @property
    def lanes(self) -> int:
        """How many prompts each group of the model's devices (`Model.groups`) prefills at a time.

        As many threads decode a part of the slots each.
        """

    def check(self, prompt: Prompt, mode: str, blend: BlendConfig | str | None) -> TokenizedPrompt:
        """Returns the prompt's token ids.

        Raises:
            CacheBlendError: what `prefill` would raise for these arguments.
        """

    def prefill(
        self,
        prompt: TokenizedPrompt,
        mode: str = "blend",
        *,
        blend: BlendConfig | str | None = None,
        only_if_ready: bool = False,
        group: int | None = None,
        between: Callable[[], object] | None = None,
    ) -> PrefillResult:
        """Prefills a prompt, on one group of the model's devices. Several threads may call it.

        Args:
            prompt: what `check` has returned.
            between: called from time to time where that takes long; what it raises ends the prefill.

        Raises:
            NotReadyError: it would wait for something else first, with `only_if_ready`.
        """


@dataclass(frozen=True)
class SchedulerStats:
    """A snapshot of what a scheduler does, and has done.

    Attributes:
        waiting: requests that wait for a slot, or for the compiler.
        running: answers in slots, and those being prefilled.
        slots: how many there are.
        answered, cancelled, failed: requests that ended so.
        tokens: decoded, and drawn from prefills, for all requests.
    """

    waiting: int
    running: int
    slots: int
    answered: int = 0
    cancelled: int = 0
    failed: int = 0
    tokens: int = 0


def check_scheduling(model: Model, *, slots: int, max_tokens: int, waiting: int, steps: int) -> None:
    """Checks a scheduler's numbers, and that it can decode with a model.

    Raises:
        CacheBlendError: a number is out of its range, or the model is on several hosts.
    """
    most = model.config.max_positions
    limits = {"slots": (slots, 4096), "max_tokens": (max_tokens, most), "waiting": (waiting, 2**31)}
    for name, (value, largest) in (limits | {"steps": (steps, MOST_AT_ONCE)}).items():
        if not is_whole_number(value, least=1, below=largest + 1):
            raise CacheBlendError(f"{name} must be a whole number in [1, {largest}], got {value!r}")
    if model.spans_hosts:
        raise CacheBlendError(
            "a scheduler decodes what has arrived, which differs between hosts, and the model is on several; use "
            "Engine.generate, or a replica of the model on each host"
        )
