"""What OpenAI's own client gets of the server."""

from __future__ import annotations

import asyncio

import openai
import pytest
from serving_cases import CHUNKS, QUESTION, running

import cacheblend_jax as cb
from cacheblend_jax.engine.answer import AnswerToken
from cacheblend_jax.engine.prompt import Prompt
from cacheblend_jax.model.logprobs import TokenLogprobs
from cacheblend_jax.serving.token_logprobs import token_text


@pytest.fixture(scope="module")
def server():
    with running() as server:
        yield server


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def asked(*texts: str) -> list[dict]:
    return [{"role": "user", "content": parts(*texts)}]


def ask(client, messages=None, **options):
    return client.chat.completions.create(model="demo", messages=messages or asked(QUESTION), **options)


def test_a_chat_is_answered(client):
    answer = ask(client, [{"role": "user", "content": QUESTION}])
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "The office is in Oslo.")
    assert (choice.finish_reason, answer.object, answer.model) == ("stop", "chat.completion", "demo")
    assert answer.usage.completion_tokens == 5
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 5
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


@pytest.fixture
def with_logprobs(server):
    """Tokens 0 … 4, with log-probabilities -0.5 and less, and an alternative of each."""
    likeliest = [((number, -0.5 - number), (number + 5, -4.0)) for number in range(5)]
    known = [AnswerToken(0.25, TokenLogprobs(-0.5 - n, each)) for n, each in enumerate(likeliest)]
    before, server.scheduler.tokens = server.scheduler.tokens, known
    yield [token_text(server.engine.model.tokenizer, number) for number in range(5)]
    server.scheduler.tokens = before


def test_a_chat_has_log_probabilities_where_it_asks_for_them(client, server, with_logprobs):
    whole = ask(client, logprobs=True, top_logprobs=1).choices[0].logprobs
    assert [each.token for each in whole.content] == with_logprobs
    assert [each.logprob for each in whole.content] == [-0.5, -1.5, -2.5, -3.5, -4.5]
    assert [[(top.token, top.logprob) for top in each.top_logprobs] for each in whole.content] == [
        [(token, -0.5 - number)] for number, token in enumerate(with_logprobs)
    ]
    assert all(each.bytes is None or bytes(each.bytes).decode() == each.token for each in whole.content)
    assert server.scheduler.submitted[-1]["logprobs"] is True
    chunks = [chunk.choices[0].logprobs for chunk in ask(client, logprobs=True, stream=True)]
    streamed = [each for chunk in chunks if chunk is not None for each in chunk.content]
    assert [(each.token, each.logprob, each.top_logprobs) for each in streamed] == [
        (each.token, each.logprob, []) for each in whole.content
    ]
    assert ask(client).choices[0].logprobs is None
    assert server.scheduler.submitted[-1]["logprobs"] is False
    stopped = ask(client, logprobs=True, stop="is in").choices[0]
    assert stopped.message.content == "The office "
    assert [each.token for each in stopped.logprobs.content] == with_logprobs[:2]


def test_a_completion_has_log_probabilities_with_their_places_in_the_text(client, with_logprobs):
    got = client.completions.create(model="demo", prompt="In", logprobs=2, max_tokens=4).choices[0].logprobs
    lengths = [len(text) for text in with_logprobs]
    assert (got.tokens, got.token_logprobs) == (with_logprobs[:4], [-0.5, -1.5, -2.5, -3.5])
    assert got.text_offset == [sum(lengths[:number]) for number in range(4)]
    assert next(iter(got.top_logprobs[1].items())) == (with_logprobs[1], -1.5)
    assert list(got.top_logprobs[1].values()) == [-1.5, -4.0]
    with pytest.raises(openai.BadRequestError, match=r"logprobs must be in \[0, 20\], got 21"):
        client.completions.create(model="demo", prompt="In", logprobs=21)


def test_parts_and_documents_are_chunks_and_the_last_part_is_the_question(client, server):
    tokenizer = server.engine.model.tokenizer
    wanted = Prompt.to_answer(tokenizer, CHUNKS, QUESTION, system="Read.")
    system = {"role": "system", "content": "Read."}
    for messages, documents in (
        ([system, *asked(*CHUNKS, QUESTION)], []),
        ([system, *asked(QUESTION)], CHUNKS),
        ([system, *asked(CHUNKS[1], QUESTION)], [{"text": CHUNKS[0]}]),
    ):
        ask(client, messages, extra_body={"documents": documents})
        prompt = server.scheduler.submitted[-1]["prompt"]
        tokens = [server.engine.check(each, "blend", None) for each in (prompt, wanted)]
        assert [each.tolist() for each in tokens[0].chunks] == [each.tolist() for each in tokens[1].chunks]
        assert tokens[0].prefix.tolist() == tokens[1].prefix.tolist()
        assert tokens[0].suffix.tolist() == tokens[1].suffix.tolist()


def test_what_was_stored_ahead_is_hit_and_counts_as_cached(client, server):
    texts = ["Martin is usually called Granite.", "The black car was given to Granite."]
    keys = [
        each["id"] for each in client.post("/chunks", body={"chunks": texts, "system": "Cars."}, cast_to=object)["data"]
    ]
    messages = [{"role": "system", "content": "Cars."}, *asked(*texts, "Which car was given to Martin?")]
    answer = ask(client, messages)
    assert (answer.cacheblend["hits"], answer.cacheblend["misses"]) == (2, 0)
    assert answer.cacheblend["loaded"] == [True, True]
    assert answer.usage.prompt_tokens_details.cached_tokens == answer.cacheblend["reused_tokens"] > 0
    assert [each.key for each in server.engine.look_up(server.scheduler.submitted[-1]["prompt"])] == keys


def test_an_answer_comes_as_events(client):
    events = list(ask(client, stream=True, stream_options={"include_usage": True}))
    *texts, last, usage = events
    assert texts[0].choices[0].delta.role == "assistant"
    assert "".join(event.choices[0].delta.content for event in texts) == "The office is in Oslo."
    assert [event.usage for event in events[:-1]] == [None] * (len(events) - 1)
    assert (last.choices[0].finish_reason, last.cacheblend["mode"]) == ("stop", "blend")
    assert (usage.choices, usage.usage.completion_tokens) == ([], 5)
    assert usage.usage.prompt_tokens_details.cached_tokens == 0
    assert len({event.id for event in events}) == 1


def test_usage_comes_with_events_only_where_it_is_asked_for(client):
    assert all(event.usage is None and event.choices for event in ask(client, stream=True))


def test_a_completion_is_answered_whole_and_as_events(client, server):
    answer = client.completions.create(model="demo", prompt="Reyes is", max_tokens=3)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("The office is in ", "length")
    assert answer.object == "text_completion"
    stream = client.completions.create(model="demo", prompt="Reyes is", stream=True)
    assert "".join(event.choices[0].text for event in stream) == "The office is in Oslo."
    client.completions.create(model="demo", prompt=[5, 6, 7], extra_body={"documents": CHUNKS})
    prompt = server.scheduler.submitted[-1]["prompt"]
    assert (list(prompt.prefix), list(prompt.suffix), len(prompt.chunks)) == ([], [5, 6, 7], 2)


@pytest.mark.parametrize(
    ("stop", "shown"),
    [
        (["office"], "The "),
        ("e is", "The offic"),  # across the border of two tokens
        (["Oslo", "is in"], "The office "),
        ("nothing of it", "The office is in Oslo."),
        (".!", "The office is in Oslo."),  # what might have begun it is said in the end
    ],
)
def test_an_answer_ends_before_a_stop_string(client, server, stop, shown):
    assert ask(client, stop=stop).choices[0].message.content == shown
    events = list(ask(client, stop=stop, stream=True))
    assert "".join(event.choices[0].delta.content or "" for event in events) == shown
    assert events[-1].choices[0].finish_reason == "stop"
    while not server.scheduler.answers.empty():
        assert server.scheduler.answers.get().cancelled.is_set()
    assert server.holds_no_slot()


def test_sampling_and_blending_are_as_the_request_says(client, server):
    ask(client, temperature=0.5, top_p=0.9, seed=-1, max_completion_tokens=7)
    said = server.scheduler.submitted[-1]
    assert (said["sampling"].temperature, said["sampling"].top_p, said["sampling"].seed) == (0.5, 0.9, 2**32 - 1)
    assert (said["max_new_tokens"], said["mode"], said["blend"]) == (7, "blend", None)
    ask(client, max_tokens=9, extra_body={"cacheblend": {"mode": "reuse", "ratio": 0.31, "selector": "hkvd"}})
    said = server.scheduler.submitted[-1]
    assert (said["max_new_tokens"], said["mode"]) == (9, "reuse")
    assert (said["blend"].recompute_ratio, said["blend"].selector) == (0.3, "hkvd")  # ratios come in steps
    assert said["sampling"].temperature == 1
    assert ask(client, seed=7).cacheblend["seed"] == 7


def test_the_one_model_is_listed_and_others_are_not_found(client):
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.chat.completions.create(model="other", messages=asked(QUESTION))
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_a_full_queue_is_the_clients_to_try_again(client, server):
    server.scheduler.is_full = True
    try:
        with pytest.raises(openai.RateLimitError, match="try again later") as error:
            ask(client)
        assert error.value.response.headers["retry-after"] == "1"
        assert error.value.body["code"] == "queue_full"
    finally:
        server.scheduler.is_full = False


@pytest.mark.parametrize("error", [RuntimeError, cb.CacheBlendError])
def test_a_failure_before_the_first_token_has_a_status_and_tells_nothing(client, server, caplog, error):
    server.scheduler.fails = error("secret of the prompt")
    try:
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError, match="its log says why"):
                ask(client, stream=stream)
    finally:
        server.scheduler.fails = None
    assert "secret" not in caplog.text
    assert error.__name__ in caplog.text


def test_many_clients_are_answered_at_a_time(server):
    async def all_answers() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            answers = [
                client.chat.completions.create(model="demo", messages=asked(*CHUNKS, QUESTION)) for _ in range(20)
            ]
            return [answer.choices[0].message.content for answer in await asyncio.gather(*answers)]

    assert asyncio.run(all_answers()) == ["The office is in Oslo."] * 20
