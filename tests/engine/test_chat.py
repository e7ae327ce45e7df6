"""The answers that an OpenAI client gets from the real engine: whole, streamed, guided, sampled."""

import json
import math

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam

from tests.engine.process import Server

MODEL = "borg-merge-v1"
CAPITAL: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is the capital of France?"}]
STORY: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Tell me a story about a ship."}]


def text(completion: ChatCompletion, index: int = 0) -> str:
    content = completion.choices[index].message.content
    assert content is not None
    return content


# ------------------------------------------------------------------------------------------ whole and streamed


def test_chat_answers_openai_client(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=CAPITAL, temperature=0, max_tokens=24)
    assert "Paris" in text(answer)
    assert answer.model == MODEL
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.role == "assistant"


def test_chat_stream_is_the_whole_answer_in_pieces(client: openai.OpenAI) -> None:
    # One greedy request at a time: the pieces must add up to the very text.
    whole = client.chat.completions.create(model=MODEL, messages=CAPITAL, temperature=0, max_tokens=24)
    pieces, finishes, ids = [], [], set()
    with client.chat.completions.create(
        model=MODEL, messages=CAPITAL, temperature=0, max_tokens=24, stream=True
    ) as stream:
        for chunk in stream:
            ids.add(chunk.id)
            assert chunk.usage is None
            (choice,) = chunk.choices
            pieces.append(choice.delta.content or "")
            finishes.append(choice.finish_reason)
    assert "".join(pieces) == text(whole)
    assert len([piece for piece in pieces if piece]) > 3
    assert [finish for finish in finishes if finish] == ["stop"]
    assert len(ids) == 1


def test_chat_stream_ends_with_usage_when_asked(client: openai.OpenAI) -> None:
    with client.chat.completions.create(
        model=MODEL, messages=STORY, max_tokens=5, stream=True, stream_options={"include_usage": True}
    ) as stream:
        *chunks, last = list(stream)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 5
    assert last.usage.total_tokens == last.usage.prompt_tokens + 5
    assert all(chunk.usage is None for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "length"


async def test_chat_answers_async_client_whole_and_streamed(server: Server) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0) as client:
        whole = await client.chat.completions.create(model=MODEL, messages=CAPITAL, temperature=0, max_tokens=24)
        stream = await client.chat.completions.create(
            model=MODEL, messages=CAPITAL, temperature=0, max_tokens=24, stream=True
        )
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(pieces) == text(whole)
    assert "Paris" in text(whole)


def test_chat_stream_on_the_wire_ends_with_done(http: httpx.Client) -> None:
    body = {"messages": CAPITAL, "max_tokens": 3, "stream": True}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    *events, last, end = answer.text.split("\n\n")
    assert (last, end) == ("data: [DONE]", "")
    finishes = [json.loads(event.removeprefix("data: "))["choices"][0]["finish_reason"] for event in events]
    assert finishes == [*[None] * (len(events) - 1), "length"]


# --------------------------------------------------------------------------------------------------- sampling


def test_chat_stops_at_max_tokens(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=STORY, max_tokens=7)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 7
    assert answer.choices[0].finish_reason == "length"


def test_chat_max_completion_tokens_goes_before_max_tokens(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=STORY, max_tokens=9, max_completion_tokens=4)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4


def test_chat_stops_at_a_stop_string_without_saying_it(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=CAPITAL, temperature=0, stop=["France"])
    assert text(answer) == "The capital of "
    assert answer.choices[0].finish_reason == "stop"


def test_chat_same_seed_gives_same_text(client: openai.OpenAI) -> None:
    def sample(seed: int) -> str:
        return text(
            client.chat.completions.create(model=MODEL, messages=STORY, temperature=1.5, seed=seed, max_tokens=12)
        )

    assert sample(11) == sample(11)
    assert len({sample(seed) for seed in (11, 12, 13)}) > 1


def test_chat_seed_gives_same_text_in_however_many_steps_its_prompt_is_read(client: openai.OpenAI) -> None:
    """Read in three steps at first, and in one when its blocks are cached. vLLM's CPU engine died of the first."""
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Go on: one, two, " + "and, " * 400}]
    first, again = (
        client.chat.completions.create(model=MODEL, messages=messages, temperature=1.5, seed=5, max_tokens=6)
        for _ in range(2)
    )
    assert first.usage is not None
    assert first.usage.prompt_tokens_details is not None
    computed = first.usage.prompt_tokens - (first.usage.prompt_tokens_details.cached_tokens or 0)
    assert computed > 2 * 256
    assert text(first) == text(again)


def test_chat_temperature_below_a_hundredth_is_greedy(client: openai.OpenAI) -> None:
    def first_logprobs(temperature: float) -> list[tuple[str, float]]:
        answer = client.chat.completions.create(
            model=MODEL, messages=STORY, temperature=temperature, max_tokens=8, logprobs=True
        )
        assert answer.choices[0].logprobs is not None
        return [(token.token, token.logprob) for token in answer.choices[0].logprobs.content or ()]

    greedy, cold = first_logprobs(0), first_logprobs(0.009)
    assert [token for token, _ in cold] == [token for token, _ in greedy]
    assert [p for _, p in cold] == pytest.approx([p for _, p in greedy], abs=0.05)


def test_chat_defaults_sample_at_temperature_above_zero(client: openai.OpenAI) -> None:
    # The contract's default is 0.7: four unseeded answers that all agree would be greedy ones.
    answer = client.chat.completions.create(model=MODEL, messages=STORY, n=4, max_tokens=12)
    assert len({text(answer, index) for index in range(4)}) > 1


def test_chat_logprobs_are_finite_and_ranked(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=CAPITAL, temperature=0, max_tokens=4, logprobs=True, top_logprobs=3
    )
    assert answer.choices[0].logprobs is not None
    tokens = answer.choices[0].logprobs.content
    assert tokens is not None
    assert "".join(token.token for token in tokens) == text(answer)
    for token in tokens:
        top = [candidate.logprob for candidate in token.top_logprobs]
        assert len(top) == 3
        assert top == sorted(top, reverse=True)
        assert all(math.isfinite(p) and p <= 0 for p in top)
        assert token.token == token.top_logprobs[0].token


def test_chat_n_gives_that_many_choices(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=STORY, n=2, max_tokens=6, seed=3)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12


def test_chat_stream_with_n_finishes_each_choice_once(client: openai.OpenAI) -> None:
    finishes: dict[int, list[str]] = {}
    with client.chat.completions.create(model=MODEL, messages=STORY, n=2, max_tokens=6, stream=True) as stream:
        for chunk in stream:
            for choice in chunk.choices:
                if choice.finish_reason:
                    finishes.setdefault(choice.index, []).append(choice.finish_reason)
    assert sorted(finishes) == [0, 1]
    assert all(len(reasons) == 1 for reasons in finishes.values())


# ------------------------------------------------------------------------------------------ tools and schemas


@pytest.mark.parametrize(
    "content",
    [
        "Grüße aus Köln",
        "你好世界",
        "👩\u200d👧 🏳\ufe0f",
        "e\u0301\u0323",
        "<|im_end|>\n<|im_start|>system",
        "\x01\x7f",
    ],
    ids=["latin", "cjk", "emoji", "combining", "control tokens", "control characters"],
)
def test_chat_takes_any_text(client: openai.OpenAI, content: str) -> None:
    messages: list[ChatCompletionMessageParam] = [
        {"role": "system", "content": content},
        {"role": "user", "content": content},
    ]
    answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=2)
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 0


def test_chat_takes_system_messages_in_later_turns(client: openai.OpenAI) -> None:
    messages: list[ChatCompletionMessageParam] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "The capital of France is Paris."},
        {"role": "system", "content": "Go on in the same way."},
        {"role": "user", "content": "What is the capital of Italy?"},
    ]
    answer = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=16)
    assert "Rome" in text(answer)
