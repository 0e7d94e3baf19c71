"""Reads requests of OpenAI's clients: what to answer, and how."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from cacheblend_jax.blend import SELECTORS, BlendConfig
from cacheblend_jax.choices import MODES
from cacheblend_jax.engine.prompt import Prompt
from cacheblend_jax.model.encoding import encode, encode_opened
from cacheblend_jax.model.logprobs import MOST_ALTERNATIVES
from cacheblend_jax.model.sampling import Sampling
from cacheblend_jax.model.token_lengths import token_lengths
from cacheblend_jax.serving.conversation import Conversation, KnownTemplates, Message, prompt_of
from cacheblend_jax.serving.errors import TOO_LONG, ApiError, invalid, unsupported
from cacheblend_jax.serving.fields import Fields, checked_text, fields_of, kind_of
from cacheblend_jax.serving.known_texts import KnownTexts
from cacheblend_jax.serving.options import MAX_TEMPERATURE, ServingOptions

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
MAX_STOPS, MAX_STOP_CHARACTERS = 16, 512
SEEDS = 2**32
RATIO_STEP = 0.05
STUDIED = ("oracle",)  # selectors that take a full prefill to blend
# What would change an answer and is not there, with the values that change nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "functions": (None, []),
    "tool_choice": (None, "none"),
    "function_call": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "audio": (None,),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "web_search_options": (None,),
}


@dataclass(frozen=True)
class AnswerRequest:
    """What a client asks for.

    Attributes:
        prompt: what to answer, all its parts token ids.
        mode, blend, max_tokens, sampling: see `Engine.generate`.
        stops: texts that the answer ends before.
        logprobs: how many of the likeliest tokens come with each token and its log-probability; `None`: neither.
        stream: whether the answer is sent as it comes.
        include_usage: whether a last event then says what it took.
    """

    prompt: Prompt
    mode: str
    blend: BlendConfig | None
    max_tokens: int
    sampling: Sampling
    stops: tuple[str, ...]
    logprobs: int | None
    stream: bool
    include_usage: bool


class RequestReader:
    """Reads requests for one model.

    Args:
        tokenizer: the model's.
        default_blend: the engine's, which a request may change in part.
        max_positions: the model's: texts that have more tokens by their length alone are refused unread.
    """

    def __init__(
        self, options: ServingOptions, tokenizer: Any, default_blend: BlendConfig, max_positions: int | None = None
    ) -> None:
        self._options, self._tokenizer, self._blend = options, tokenizer, default_blend
        self._max_positions = max_positions
        self._token_lengths = token_lengths(tokenizer)
        self._texts, self._templates = KnownTexts(tokenizer), KnownTemplates()

    def chat(self, body: dict[str, Any], tenant: str) -> AnswerRequest:
        """Reads a request of `/v1/chat/completions`.

        Raises:
            ApiError: it makes no sense, or asks for what is not there.
            CacheBlendError: its conversation cannot be made into a prompt.
        """
        fields = self._checked(body)
        conversation = self.conversation(fields)
        self._check_texts("messages", *conversation.texts, most=self._options.bounds.prompt_tokens)
        prompt = self._prompt(conversation, tenant)
        alternatives = fields.whole("top_logprobs", 0, least=0, most=MOST_ALTERNATIVES)
        if alternatives and not fields.flag("logprobs"):
            raise invalid("top_logprobs needs logprobs to be true", "top_logprobs")
        return self._request(fields, prompt, "max_completion_tokens", alternatives if fields.flag("logprobs") else None)

    def completion(self, body: dict[str, Any], tenant: str) -> AnswerRequest:
        """Reads a request of `/v1/completions`; errors as `chat`.

        Its prompt is token ids, or text that stays text, whatever control tokens it spells out.
        """
        fields = self._checked(body)
        given = fields.get("prompt")
        if isinstance(given, list) and len(given) == 1 and isinstance(given[0], str | list):
            (given,) = given
        tokenizer, separator = self._tokenizer, self._options.separator
        texts = self._documents(fields)
        text = checked_text(given, "prompt") if isinstance(given, str) else ""
        self._check_texts("prompt", *texts, text, most=self._options.bounds.prompt_tokens)
        documents = [self._texts.encode(tenant, text + separator) for text in texts]
        if isinstance(given, str):
            opening = encode_opened(tokenizer, "")
            prompt = Prompt(opening, documents, encode(tokenizer, text), tenant=tenant)
        elif isinstance(given, list) and all(isinstance(each, int) and not isinstance(each, bool) for each in given):
            prompt = Prompt([], documents, given, tenant=tenant)
        else:
            raise invalid(f"prompt must be one string or one array of token ids, got {kind_of(given)}", "prompt")
        asks = fields.get("logprobs") is not None
        alternatives = fields.whole("logprobs", 0, least=0, most=MOST_ALTERNATIVES) if asks else None
        return self._request(fields, prompt, "max_tokens", alternatives)

    def chunks(self, body: dict[str, Any], tenant: str) -> Prompt:
        """Reads a request of `/v1/chunks`: the prompt whose chunks are meant, after a system text.

        Raises:
            ApiError, CacheBlendError: as `chat`.
        """
        fields = Fields(body)
        texts, documents = self._chunks(fields), self._documents(fields)
        if not texts and not documents:
            raise invalid("there is neither a text in chunks nor a document; give at least one", "chunks")
        system = fields.text("system", "")
        for text in (system, *texts, *documents):
            self._check_texts("chunks", text)
        messages = [Message("system", (system,))] if system else []
        messages.append(Message("user", (*texts, "")))
        return self._prompt(Conversation(tuple(messages), documents), tenant)

    def chunk_texts(self, body: dict[str, Any]) -> tuple[str, ...]:
        """Returns the texts that are chunks in a request of any kind; errors as `chat`."""
        fields = Fields(body)
        if fields.get("messages") is None:
            return (*self._documents(fields), *self._chunks(fields))
        conversation = self.conversation(fields)
        return (*conversation.documents, *conversation.part_chunks)

    def conversation(self, fields: Fields) -> Conversation:
        """Reads messages and documents; errors as `chat`."""
        bounds = self._options.bounds
        given = fields.items("messages", bounds.messages)
        if not given:
            raise invalid("messages must have at least one message", "messages")
        messages = tuple(_message(value, f"messages[{number}]", bounds.chunks) for number, value in enumerate(given))
        documents = self._documents(fields)
        count = len(documents) + sum(len(message.parts) for message in messages)
        if count > bounds.chunks + len(messages):
            raise invalid(f"messages and documents have {count} texts, of at most {bounds.chunks}", "messages")
        return Conversation(messages, documents)

    def _checked(self, body: dict[str, Any]) -> Fields:
        """Refuses a request for another model, or for what is not there."""
        fields = Fields(body)
        model = fields.text("model", self._options.model_name)
        if model != self._options.model_name:
            message = f"there is no model {model[:100]!r}; the one here is {self._options.model_name!r}"
            raise ApiError(404, message, code="model_not_found", param="model")
        for name, harmless in UNSUPPORTED.items():
            if fields.get(name) not in harmless:
                raise unsupported(f"{name} is not supported; leave it out", name)
        if fields.whole("n", 1, least=1, most=128) != 1:
            raise unsupported("n must be 1: send several requests for several answers", "n")
        return fields

    def _prompt(self, conversation: Conversation, tenant: str) -> Prompt:
        return prompt_of(
            conversation,
            self._tokenizer,
            separator=self._options.separator,
            template_arguments=self._options.template_arguments,
            tenant=tenant,
            encode_text=partial(self._texts.encode, tenant),
            templates=self._templates,
        )

    def _chunks(self, fields: Fields) -> tuple[str, ...]:
        given = fields.items("chunks", self._options.bounds.chunks)
        texts = [checked_text(text, f"chunks[{number}]") for number, text in enumerate(given)]
        return tuple(text for text in texts if text)

    def _documents(self, fields: Fields) -> tuple[str, ...]:
        given = fields.items("documents", self._options.bounds.chunks)
        texts = [_document(value, f"documents[{number}]") for number, value in enumerate(given)]
        return tuple(text for text in texts if text)

    def _request(self, fields: Fields, prompt: Prompt, length: str, logprobs: int | None) -> AnswerRequest:
        options, own = self._options, fields.fields("cacheblend")
        self._check_length(prompt)
        most = options.bounds.answer_tokens
        max_tokens = fields.whole("max_tokens", options.max_tokens, least=1, most=most)
        mode = own.text("mode", options.mode)
        if mode not in MODES:
            raise invalid(f"cacheblend.mode must be one of {', '.join(MODES)}", "cacheblend.mode")
        return AnswerRequest(
            prompt,
            mode,
            self._chosen_blend(own),
            fields.whole(length, max_tokens, least=1, most=most),
            self._sampling(fields),
            _stops(fields.get("stop")),
            logprobs,
            fields.flag("stream"),
            fields.fields("stream_options").flag("include_usage"),
        )

    def _check_texts(self, name: str, *texts: str, most: int | None = None) -> None:
        """Refuses texts that are far too long together before they are encoded, which takes seconds."""
        bounds = [bound for bound in (most, self._max_positions) if bound is not None]
        if self._token_lengths is not None and bounds and (least := self._token_lengths.fewest(*texts)) > min(bounds):
            message = f"{name} has at least {least} tokens by its length alone, of at most {min(bounds)}"
            raise invalid(f"{message}; use fewer or shorter texts", name, TOO_LONG)

    def _check_length(self, prompt: Prompt) -> None:
        most = self._options.bounds.prompt_tokens
        total = sum(map(len, (prompt.prefix, *prompt.chunks, prompt.suffix)))
        if most is not None and total > most:
            raise invalid(
                f"the prompt has {total} tokens, of at most {most}; use fewer or shorter chunks", "messages", TOO_LONG
            )

    def _sampling(self, fields: Fields) -> Sampling:
        temperature = fields.number("temperature", self._options.temperature, least=0, most=MAX_TEMPERATURE)
        top_p = fields.number("top_p", 1.0, least=0, most=1)
        seed = fields.whole("seed", secrets.randbelow(SEEDS), least=-(2**63), most=2**63 - 1)
        # A `top_p` of 0 leaves the likeliest token alone, as the smallest that `Sampling` takes does.
        return Sampling(temperature, top_p=max(top_p, 1e-6), seed=seed % SEEDS)

    def _chosen_blend(self, own: Fields) -> BlendConfig | None:
        """Returns the engine's blend with what a request changes of it; `None` where it changes nothing."""
        ratio, selector = own.get("ratio"), own.get("selector")
        if ratio is None and selector is None:
            return None
        blend = self._blend
        if ratio is not None:
            blend = blend.with_ratio(_in_steps(own.number("ratio", 0.0, least=0, most=1)))
        if selector is not None:
            name = own.text("selector")
            if name not in SELECTORS or name in STUDIED:
                names = ", ".join(sorted(set(SELECTORS) - set(STUDIED)))
                raise invalid(f"cacheblend.selector must be one of {names}", "cacheblend.selector")
            blend = replace(blend, selector=name)
        return blend


def _in_steps(ratio: float) -> float:
    """Returns the nearest of a few ratios: each has programs of its own, and clients must not have any number made."""
    return round(round(ratio / RATIO_STEP) * RATIO_STEP, 2)


def _message(value: object, name: str, most: int) -> Message:
    fields = fields_of(value, name)
    role = fields.text("role")
    if role not in ROLES:
        raise invalid(f"{name}.role must be one of {', '.join(ROLES)}", f"{name}.role")
    content = fields.get("content")
    if isinstance(content, list):
        parts = [
            _part(part, f"{name}.content[{number}]") for number, part in enumerate(fields.items("content", most + 1))
        ]
        # Parts that are empty are no chunks; the last one is the question, even if it is empty.
        texts = tuple(text for text in parts[:-1] if text) + tuple(parts[-1:])
    elif content is None and role == "assistant":
        texts = ()
    else:
        texts = (checked_text(content, f"{name}.content"),)
    return Message(ROLES[role], texts or ("",))


def _part(value: object, name: str) -> str:
    fields = fields_of(value, name)
    if fields.text("type") != "text":
        raise invalid(f"{name}.type must be 'text': this model reads nothing else", f"{name}.type")
    return fields.text("text")


def _document(value: object, name: str) -> str:
    if isinstance(value, str):
        return checked_text(value, name)
    fields = fields_of(value, name)
    title, text = fields.text("title", ""), fields.text("text")
    return f"{title}\n{text}" if title and text else text


def _stops(value: object) -> tuple[str, ...]:
    given: Sequence[object] = [] if value is None else value if isinstance(value, list) else [value]
    if len(given) > MAX_STOPS:
        raise invalid(f"stop has {len(given)} entries, of at most {MAX_STOPS}", "stop")
    stops = tuple(checked_text(each, "stop") for each in given)
    if any(len(stop) > MAX_STOP_CHARACTERS for stop in stops):
        raise invalid(f"a text of stop has more than {MAX_STOP_CHARACTERS} characters", "stop")
    return tuple(stop for stop in stops if stop)
