"""What a server needs of whatever answers prompts: `Scheduler` is the one that decodes many together."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

from cacheblend_jax.blend import BlendConfig
from cacheblend_jax.engine.answer import AnswerToken
from cacheblend_jax.engine.prompt import Prompt
from cacheblend_jax.engine.results import Generation, PrefillStats
from cacheblend_jax.model.sampling import Sampling


@runtime_checkable
class SchedulerStats(Protocol):
    """What is under way, and what was done so far."""

    @property
    def waiting(self) -> int:
        """Requests that wait for their prefill."""

    @property
    def running(self) -> int:
        """Requests that are being answered."""

    @property
    def slots(self) -> int:
        """How many may be answered at a time."""


@runtime_checkable
class Answer(Protocol):
    """An answer as it comes: iterate over `(token id, text that it adds)`, in a thread or in an event loop."""

    @property
    def prefill_stats(self) -> PrefillStats | None:
        """What the prefill did, once it has run."""

    @property
    def finish_reason(self) -> str | None:
        """`"stop"`, `"length"` or `"cancelled"`; `None` before the end."""

    def __iter__(self) -> Iterator[tuple[int, str]]: ...

    def __aiter__(self) -> AsyncIterator[tuple[int, str]]: ...

    def when_readable(self, call: Callable[[], object]) -> None:
        """Calls `call` once there is a token to read, or the end: at once, or in whichever thread brings it."""

    def token(self, number: int) -> AnswerToken:
        """Returns what is known of a token that has come, counted from 0."""

    def cancel(self) -> None:
        """Ends the answer and frees its slot. Calling it again does nothing."""

    def result(self) -> Generation:
        """Waits for the end."""


@runtime_checkable
class Scheduling(Protocol):
    """Answers prompts, several at a time."""

    @property
    def stats(self) -> SchedulerStats:
        """A snapshot."""

    def submit(
        self,
        prompt: Prompt,
        *,
        mode: str = "blend",
        blend: BlendConfig | None = None,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
        stop_token_ids: Sequence[int] | None = None,
        logprobs: bool = False,
    ) -> Answer:
        """Queues a prompt.

        Raises:
            QueueFull: too many wait.
            SchedulerClosed: no more are taken.
            PromptError: the prompt cannot be served.
        """

    def close(self, timeout_s: float | None = None) -> None:
        """Finishes what runs, for so long, and takes no more."""
