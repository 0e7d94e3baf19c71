"""What a server is told when it starts: names, defaults and bounds."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from cacheblend_jax.choices import MODES
from cacheblend_jax.errors import CacheBlendError

MAX_TEMPERATURE = 2  # OpenAI's


@dataclass(frozen=True)
class Bounds:
    """What a request may cost before it is refused.

    Attributes:
        body_bytes: of a request.
        prompt_tokens: `None`: as many as the model takes.
        chunks: of a prompt, all messages and documents together.
        messages: of a conversation.
        answer_tokens: that a request may ask for.
        requests: under way at a time, waiting ones included.
        head_s, body_s: seconds until a request's head, and its body, must have come.
        write_s: seconds until a client must have taken what is sent.
    """

    body_bytes: int = 4 * 2**20
    prompt_tokens: int | None = None
    chunks: int = 256
    messages: int = 256
    answer_tokens: int = 4096
    requests: int = 256
    head_s: float = 15.0
    body_s: float = 30.0
    write_s: float = 60.0


@dataclass(frozen=True)
class ServingOptions:
    """How a server answers.

    Attributes:
        model_name: what `/v1/models` calls the model, and requests must.
        mode: of prefills, unless a request says otherwise.
        max_tokens: of an answer, unless a request says otherwise.
        temperature: unless a request says otherwise; OpenAI's own default is 1.
        separator: after each chunk.
        template_arguments: what the model's chat template takes beside the messages.
        bounds: see `Bounds`.
        stop_s: seconds until the server, told to end, has ended. Half of them are for the connections to finish what
            runs (`run_server` sees to that), half to write what is to be stored.
        hosts: names that requests may be sent to; `None`: any. See `HostCheck`.

    Raises:
        CacheBlendError: an unknown mode, or a temperature out of range.
    """

    model_name: str = "cacheblend"
    mode: str = "blend"
    max_tokens: int = 256
    temperature: float = 1.0
    separator: str = "\n\n"
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    bounds: Bounds = Bounds()
    stop_s: float = 30.0
    hosts: Collection[str] | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise CacheBlendError(f"unknown mode {self.mode!r}; expected one of {', '.join(MODES)}")
        if not 0 <= self.temperature <= MAX_TEMPERATURE:
            raise CacheBlendError(f"temperature must be in [0, {MAX_TEMPERATURE}], got {self.temperature:g}")
