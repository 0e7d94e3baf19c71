"""A chat template, rendered around a placeholder: what the tokenizer prints before a user's message and after it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import TemplateSyntaxError

from cacheblend_jax.errors import PromptError, one_line
from cacheblend_jax.model.encoding import check_text, encode

MESSAGE, SYSTEM = "[[cacheblend:user message]]", "[[cacheblend:system message]]"
ANSWER = "[[cacheblend:answer]]"
# What `apply_chat_template` takes and we set, or what changes the kind of its result.
RESERVED = (
    *("conversation", "messages", "tokenize", "add_generation_prompt", "continue_final_message", "return_dict"),
    *("return_tensors", "return_assistant_tokens_mask", "padding", "truncation", "max_length", "tokenizer_kwargs"),
    "sanitize_control_tokens",
)


def encode_around_message(
    tokenizer: Any, system: str | None, arguments: Mapping[str, Any]
) -> tuple[list[int], list[int]]:
    """Returns the ids that the template puts before the user's message, the system text among them, and after it.

    Control tokens of the template are tokens; those that the system text spells out are text. If the template refuses
    system messages, or drops them, the system text begins the user's message.

    Args:
        arguments: of the template, beside the messages (`{"enable_thinking": False}`, say); `"chat_template"` is the
            name of one of several templates.

    Raises:
        PromptError: there is no template or no default among several, it fails, or doesn't print the message once.
    """
    check_template(tokenizer, arguments)
    messages, before, after = _render_around(tokenizer, system, arguments)
    if system is None or encode(tokenizer, system) == encode(tokenizer, system, control_tokens=True):
        ids = encode(tokenizer, before, control_tokens=True)
    else:
        head, text, tail = _around_system(tokenizer, system, messages, before, arguments)
        ids = encode(tokenizer, head, control_tokens=True) + encode(tokenizer, text)
        ids += encode(tokenizer, tail, control_tokens=True)
    return ids, encode(tokenizer, after, control_tokens=True)


def encode_around_next_message(tokenizer: Any, arguments: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Returns the ids that the template puts between an answer and the user's next message, and after that.

    Raises:
        PromptError: as for `encode_around_message`, or the template doesn't print an answer and a next message once.
    """
    check_template(tokenizer, arguments)
    roles = ("user", "first"), ("assistant", ANSWER), ("user", MESSAGE)
    rendered = render(tokenizer, [{"role": role, "content": content} for role, content in roles], arguments)
    between, _, after = rendered.partition(ANSWER)[2].partition(MESSAGE)
    if (rendered.count(ANSWER), rendered.count(MESSAGE)) != (1, 1) or not after:
        raise PromptError("the tokenizer's chat template does not print an answer and the next message exactly once")
    return encode(tokenizer, between, control_tokens=True), encode(tokenizer, after, control_tokens=True)


def check_template(tokenizer: Any, arguments: Mapping[str, Any]) -> None:
    """Checks that there is a template, and that it can take the arguments.

    Raises:
        PromptError: there is none, or no default among several; or an argument is one that is set for every prompt.
    """
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise PromptError("the tokenizer has no chat template; build Prompt(prefix=…, chunks=…, suffix=…) instead")
    if not isinstance(arguments, Mapping) or not all(isinstance(name, str) for name in arguments):
        raise PromptError(f"template_arguments must map names to values, got {arguments!r}")
    if reserved := sorted(set(RESERVED) & set(arguments)):
        raise PromptError(
            f"template_arguments must not have {reserved[0]!r}, which is set for every prompt; leave it out"
        )
    if isinstance(template, Mapping) and arguments.get("chat_template") is None and "default" not in template:
        names = ", ".join(sorted(template))
        raise PromptError(
            f"the tokenizer has the chat templates {names}, and no default; "
            f'choose one: template_arguments={{"chat_template": {min(template)!r}}}'
        )


def _render_around(
    tokenizer: Any, system: str | None, arguments: Mapping[str, Any]
) -> tuple[list[dict[str, str]], str, str]:
    """Returns the messages that the template takes, and what it prints before and after the placeholder."""
    user = {"role": "user", "content": MESSAGE}
    messages = [user] if system is None else [{"role": "system", "content": system}, user]
    try:
        rendered = render(tokenizer, messages, arguments)
        refused = system is not None and system.strip() not in rendered
    except PromptError:  # templates raise whatever they like to refuse a role
        if system is None:
            raise
        refused = True
    if refused:
        messages = [{"role": "user", "content": f"{system}\n\n{MESSAGE}"}]
        rendered = render(tokenizer, messages, arguments)
    if rendered.count(MESSAGE) != 1:
        raise PromptError("the tokenizer's chat template does not print the user's message exactly once")
    before, _, after = rendered.partition(MESSAGE)
    return messages, before, after


def _around_system(
    tokenizer: Any, system: str, messages: list[dict[str, str]], before: str, arguments: Mapping[str, Any]
) -> tuple[str, str, str]:
    """Splits what stands before the user's message around the system text."""
    marked = [message | {"content": message["content"].replace(system, SYSTEM, 1)} for message in messages]
    head, _, tail = render(tokenizer, marked, arguments).partition(MESSAGE)[0].partition(SYSTEM)
    for text in (system, system.strip()):  # many templates strip what they print
        if before == head + text + tail:
            return head, text, tail
    raise PromptError(
        "the system text spells out control tokens, and the tokenizer's chat template changes it, "
        "so that they can't be kept as text; leave them out"
    )


def render(tokenizer: Any, messages: list[dict[str, str]], arguments: Mapping[str, Any]) -> str:
    """Returns what the template prints for messages, and to open the answer.

    Raises:
        PromptError: it fails, or a message isn't valid Unicode.
    """
    for message in messages:
        check_text(message["content"], "the system text")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **arguments)
    except TemplateSyntaxError as error:
        raise PromptError(
            f"the tokenizer's chat template has a syntax error in line {error.lineno}: {one_line(error)}"
        ) from error
    except Exception as error:
        raise PromptError(f"the tokenizer's chat template fails: {one_line(error)} ({type(error).__name__})") from error
