"""From conversations to prompts: chunks stand together, the rest is as the chat template prints it."""

from __future__ import annotations

import copy

import pytest
from conftest import HF

import cacheblend_jax as cb
from cacheblend_jax.model.checkpoint import load_tokenizer
from cacheblend_jax.model.encoding import encode
from cacheblend_jax.serving.conversation import Conversation, KnownTemplates, Message, prompt_of

CHUNKS = ("The sky is blue.", "Grass <|turn|> is green.")
TURNS = "{% for m in messages %}<|start|>{{ m.role }}<|turn|>{{ m.content }}{% endfor %}<|start|>assistant<|turn|>"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TURNS
DOCUMENTS = "{% for d in documents or [] %}<|start|>document {{ loop.index }}<|turn|>{{ d.text }}{% endfor %}"
DOCUMENTS += "<|start|>read<|turn|>" + TURNS


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(HF / "llama3")


def with_template(tokenizer, template: str | None):
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def user(*parts: str) -> Message:
    return Message("user", parts)


def whole(prompt: cb.Prompt, tokenizer) -> str:
    return tokenizer.decode([*prompt.prefix, *(each for chunk in prompt.chunks for each in chunk), *prompt.suffix])


def printed(tokenizer, text: str) -> list[int]:
    return encode(tokenizer, text, control_tokens=True)


def test_one_turn_is_the_prompt_of_from_chat_template(tokenizer):
    wanted = cb.Prompt.from_chat_template(tokenizer, system="Be brief.", chunks=CHUNKS, question="Why?")
    system = Message("system", ("Be brief.",))
    assert prompt_of(Conversation((system, user(*CHUNKS, "Why?"))), tokenizer) == wanted
    assert prompt_of(Conversation((system, user("Why?")), CHUNKS), tokenizer) == wanted


def test_later_turns_follow_in_the_suffix_and_what_they_spell_out_is_text(tokenizer):
    turned = with_template(tokenizer, TURNS)
    said = (user(CHUNKS[0], "Why?"), Message("assistant", ("So <|turn|> it is.",)), user("And then?"))
    prompt = prompt_of(Conversation(said), turned)
    first = prompt_of(Conversation(said[:1]), turned)
    assert cb.Prompt(prompt.prefix, prompt.chunks) == cb.Prompt(first.prefix, first.chunks)
    suffix = prompt.suffix.tolist()
    assert suffix[: len(first.suffix)] == first.suffix.tolist()
    assert suffix.count(turned.convert_tokens_to_ids("<|turn|>")) == 3  # the template's own
    assert (
        whole(prompt, turned)
        .replace(" ", "")
        .endswith("assistant<|turn|>So<|turn|>itis.<|start|>user<|turn|>Andthen?<|start|>assistant<|turn|>")
    )


def test_chunks_of_a_later_message_come_after_what_was_said_before(tokenizer):
    turned = with_template(tokenizer, TURNS)
    said = (user("Hello."), Message("assistant", ("Hi.",)), user(*CHUNKS, "Why?"))
    prompt = prompt_of(Conversation(said), turned)
    assert [list(chunk) for chunk in prompt.chunks] == [encode(turned, text + "\n\n") for text in CHUNKS]
    assert "Hello." in turned.decode(prompt.prefix)
    assert prompt.suffix.tolist() == encode(turned, "Why?") + printed(turned, "<|start|>assistant<|turn|>")


def test_a_system_text_that_the_template_refuses_begins_the_users_message(tokenizer):
    refusing = with_template(tokenizer, NO_SYSTEM)
    said = (Message("system", ("Be brief.",)), user(*CHUNKS, "Why?"))
    wanted = cb.Prompt.from_chat_template(refusing, system="Be brief.", chunks=CHUNKS, question="Why?")
    assert prompt_of(Conversation(said), refusing) == wanted


def test_documents_stand_where_the_template_prints_them(tokenizer):
    printing = with_template(tokenizer, DOCUMENTS)
    prompt = prompt_of(Conversation((user("Why?"),), CHUNKS), printing)
    assert prompt.prefix.tolist() == printed(printing, "<|start|>document 1<|turn|>")
    first, second = map(list, prompt.chunks)
    assert first == encode(printing, CHUNKS[0])
    between = printed(printing, "<|start|>document 2<|turn|>")
    assert second[: len(between)] == between
    assert second[len(between) :] == encode(printing, CHUNKS[1]) + printed(
        printing, "<|start|>read<|turn|><|start|>user<|turn|>"
    )
    assert prompt.suffix.tolist() == encode(printing, "Why?") + printed(printing, "<|start|>assistant<|turn|>")


def test_documents_that_the_template_prints_after_the_question_stand_before_it_instead(tokenizer):
    after = with_template(tokenizer, TURNS + "{% for d in documents or [] %}{{ d.text }}{% endfor %}")
    plain = with_template(tokenizer, TURNS)
    conversation = Conversation((user("Why?"),), CHUNKS)
    assert prompt_of(conversation, after) == prompt_of(conversation, plain)


@pytest.mark.parametrize("template", [TURNS, NO_SYSTEM, DOCUMENTS, TURNS + "{{ strftime_now('%S') }}"])
def test_a_template_is_run_once_for_conversations_of_a_form(tokenizer, monkeypatch, template):
    known, turned = KnownTemplates(), with_template(tokenizer, template)
    read, reply = Message("system", ("Read.",)), (Message("assistant", ("So.",)), user("And?"))
    said = [Conversation((read, user(*CHUNKS, "Why?")), documents) for documents in ((), CHUNKS[:1], CHUNKS)]
    said += [Conversation((*each.messages, *reply), each.documents) for each in said]
    said += [Conversation((read, user("Hi."), *reply, user(*CHUNKS, "c")))]
    wanted, runs, render = [prompt_of(each, turned) for each in said], [], turned.apply_chat_template
    monkeypatch.setattr(turned, "apply_chat_template", lambda *given, **how: runs.append(0) or render(*given, **how))
    for _ in range(2):
        before = len(runs)
        if "strftime" not in template:  # what it prints now, the next request's is not
            assert [prompt_of(each, turned, templates=known) for each in said] == wanted
            continue
        for each in said:
            prompt_of(each, turned, templates=known)
    assert (len(runs) > before) == ("strftime" in template)


@pytest.mark.parametrize("name", [None, "dated"])
def test_a_template_among_the_arguments_is_the_one_that_is_known(tokenizer, monkeypatch, name):
    """As a text of its own, or the name of one of several."""
    known, dated = KnownTemplates(), TURNS + "{{ strftime_now('%S') }}"
    turned = with_template(tokenizer, TURNS if name is None else {"default": TURNS, name: dated})
    arguments, runs, render = {"chat_template": name or dated}, [], turned.apply_chat_template
    monkeypatch.setattr(turned, "apply_chat_template", lambda *given, **how: runs.append(0) or render(*given, **how))
    for _ in range(2):
        before = len(runs)
        prompt_of(Conversation((user("Why?"),)), turned, template_arguments=arguments, templates=known)
    assert len(runs) > before


def test_no_more_than_some_forms_of_conversations_are_known(tokenizer, monkeypatch):
    monkeypatch.setattr("cacheblend_jax.serving.conversation.MOST_FORMS", 2)
    known, turned = KnownTemplates(), with_template(tokenizer, TURNS)
    for turns in (1, 2, 3):
        prompt_of(Conversation((user("Hi."),) * turns), turned, templates=known)
    assert len(known._known) == 1


@pytest.mark.parametrize(
    "template", [TURNS + "{{ messages[0].content }}", "{{ messages[-1].content }}", "nothing", "{{"]
)
def test_a_template_that_does_not_print_every_message_once_is_an_error(tokenizer, template):
    said = (user("Hello."), Message("assistant", ("Hi.",)), user("Why?"))
    with pytest.raises(cb.PromptError, match="chat template"):
        prompt_of(Conversation(said), with_template(tokenizer, template))


def test_without_a_template_turns_are_written_as_questions_and_answers(tokenizer):
    plain = with_template(tokenizer, None)
    one = prompt_of(Conversation((Message("system", ("Read.",)), user(*CHUNKS, "Why?"))), plain)
    wanted = cb.Prompt.to_answer(plain, CHUNKS, "Why?", system="Read.")
    assert one.suffix == encode(plain, wanted.suffix)
    said = (user(*CHUNKS, "Why?"), Message("assistant", ("So.",)), user("And?"))
    turns = prompt_of(Conversation(said), plain)
    assert turns.suffix == encode(plain, "Question: Why?\nAnswer: So.\n\nQuestion: And?\nAnswer:")


def test_a_conversation_needs_a_user(tokenizer):
    with pytest.raises(cb.PromptError, match="none of the role 'user'"):
        prompt_of(Conversation((Message("assistant", ("Hi.",)),)), tokenizer)
