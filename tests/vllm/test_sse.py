"""The grammar of streams (I5), on events as vLLM's own classes write them."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from borg_serve.gate.sse import DONE, Grammar

HOSTILE = (
    '"finish_reason":"stop"',
    '{"choices":[{"finish_reason":"abort"}]}',
    '"choices":[],"usage":{}',
    'data: {"error":{"message":"x"}}\n\n',
    "data: [DONE]\n\n",
    '\\"finish_reason\\":\\"stop\\"',
    "\n\n\r\n\r\n\u2028\u2029\x85",
)


def event(index: int = 0, finish: str | None = None, usage: bool = False, **delta: Any) -> bytes:
    """One chunk as vLLM's chat handler writes it."""
    from vllm.entrypoints.generate.base.protocol import DeltaMessage
    from vllm.entrypoints.openai.chat_completion.protocol import (
        ChatCompletionResponseStreamChoice,
        ChatCompletionStreamResponse,
    )
    from vllm.entrypoints.serve.engine.protocol import UsageInfo

    choice = ChatCompletionResponseStreamChoice(
        index=index, delta=DeltaMessage(**delta), logprobs=None, finish_reason=finish
    )
    chunk = ChatCompletionStreamResponse(id="chatcmpl-1", created=1, model="borg", choices=[choice])
    if usage:
        chunk.usage = UsageInfo(prompt_tokens=5, completion_tokens=1, total_tokens=6)
    return f"data: {chunk.model_dump_json(exclude_unset=True)}\n\n".encode()


def usage_event() -> bytes:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionStreamResponse
    from vllm.entrypoints.serve.engine.protocol import UsageInfo

    usage = UsageInfo(prompt_tokens=2320, completion_tokens=2, total_tokens=2322)
    chunk = ChatCompletionStreamResponse(id="chatcmpl-1", created=1, model="borg", choices=[], usage=usage)
    return f"data: {chunk.model_dump_json(exclude_unset=True, exclude_none=True)}\n\n".encode()


def failure(message: str = "boom") -> bytes:
    from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse

    error = ErrorResponse(error=ErrorInfo(message=message, type="InternalServerError", code=500))
    return f"data: {error.model_dump_json()}\n\n".encode()


def fed(grammar: Grammar, *chunks: bytes) -> bytes:
    out = b"".join(grammar.feed(chunk) for chunk in chunks)
    grammar.close()
    return out


# -------------------------------------------------------------------------------------------------- good ends


def test_stream_passes_a_success_unchanged() -> None:
    chunks = [event(role="assistant", content=""), event(content="Hi"), event(content="!", finish="stop"), DONE]
    grammar = Grammar(1, keep_usage=False)
    assert fed(grammar, *chunks) == b"".join(chunks)
    assert grammar.done
    assert grammar.error is None


@pytest.mark.parametrize("reason", ["stop", "length", "tool_calls", "content_filter"])
def test_stream_takes_every_reason_that_is_an_end(reason: str) -> None:
    grammar = Grammar(1, keep_usage=False)
    fed(grammar, event(content="x", finish=reason), DONE)
    assert grammar.done


def test_stream_hides_the_usage_event_but_reads_it() -> None:
    chunks = [event(content="Hi"), event(content="", finish="stop")]
    grammar = Grammar(1, keep_usage=False)
    assert fed(grammar, *chunks, usage_event(), DONE) == b"".join([*chunks, DONE])
    assert grammar.usage is not None
    assert grammar.usage["total_tokens"] == 2322


def test_stream_shows_the_usage_event_to_who_asked() -> None:
    chunks = [event(content="Hi", finish="stop"), usage_event(), DONE]
    grammar = Grammar(1, keep_usage=True)
    assert fed(grammar, *chunks) == b"".join(chunks)
    assert grammar.usage is not None


@pytest.mark.parametrize("keep", [True, False])
def test_stream_with_usage_in_every_event_loses_no_text(keep: bool) -> None:
    chunks = [event(content="Hi", usage=True), event(content="", finish="stop", usage=True)]
    expected = b"".join([*chunks, usage_event(), DONE] if keep else [*chunks, DONE])
    assert fed(Grammar(1, keep_usage=keep), *chunks, usage_event(), DONE) == expected


def test_stream_of_several_choices_needs_a_finish_of_each() -> None:
    chunks = [event(0, content="a"), event(1, content="b"), event(1, "stop", content=""), event(0, "length"), DONE]
    grammar = Grammar(2, keep_usage=False)
    assert fed(grammar, *chunks) == b"".join(chunks)
    assert grammar.done


def test_stream_takes_several_events_in_one_chunk() -> None:
    parts = [event(content="a"), event(content="b", finish="stop"), usage_event(), DONE]
    grammar = Grammar(1, keep_usage=False)
    assert grammar.feed(b"".join(parts)) == b"".join([*parts[:2], DONE])
    assert grammar.done
    assert grammar.usage is not None


# --------------------------------------------------------------------------------------------------- bad ends


def test_stream_with_an_error_event_has_failed_and_the_event_is_kept_back() -> None:
    begun = event(content="Hi")
    grammar = Grammar(1, keep_usage=False)
    assert fed(grammar, begun, failure("secret path /x"), DONE) == begun
    assert not grammar.done
    assert grammar.error is not None
    assert json.loads(grammar.error)["error"]["message"] == "secret path /x"


def test_stream_with_an_error_event_among_others_in_a_chunk_has_failed() -> None:
    begun = event(content="Hi")
    grammar = Grammar(1, keep_usage=False)
    assert fed(grammar, begun + failure() + DONE) == begun
    assert grammar.error is not None


@pytest.mark.parametrize("choices", [1, 2])
def test_stream_that_says_done_early_has_failed(choices: int) -> None:
    chunks = [event(content="Hi")] + [event(0, "stop", content="")] * (choices - 1)
    grammar = Grammar(choices, keep_usage=False)
    assert fed(grammar, *chunks, DONE) == b"".join(chunks)
    assert grammar.error == f"[DONE] after {choices - 1} of {choices} finish reasons"
    assert not grammar.done


@pytest.mark.parametrize("chunks", [0, 1, 2, 3])
def test_stream_that_breaks_off_has_failed(chunks: int) -> None:
    whole = [event(content="Hi"), event(content="!", finish="stop"), usage_event(), DONE]
    grammar = Grammar(1, keep_usage=False)
    fed(grammar, *whole[:chunks])
    assert grammar.error is not None
    assert not grammar.done


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_stream_whose_engine_gave_up_has_failed(reason: str) -> None:
    begun = event(content="Hi")
    grammar = Grammar(1, keep_usage=False)
    assert fed(grammar, begun, event(content="", finish=reason), DONE) == begun
    assert grammar.error == "the engine gave up the request"


def test_stream_with_more_ends_than_choices_has_failed() -> None:
    first = event(content="", finish="stop")
    grammar = Grammar(1, keep_usage=False)
    assert fed(grammar, first, event(content="", finish="stop"), DONE) == first
    assert grammar.error is not None


def test_stream_lets_nothing_through_after_its_end() -> None:
    for end in (DONE, failure()):
        grammar = Grammar(1, keep_usage=True)
        grammar.feed(event(content="", finish="stop"))
        grammar.feed(end)
        assert grammar.ended
        assert [grammar.feed(chunk) for chunk in (event(content="x"), usage_event(), failure(), DONE)] == [b""] * 4


# ------------------------------------------------------------------------------------------------ hostile text


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("where", ["content", "tool", "logprobs"])
def test_stream_reads_no_grammar_out_of_a_text(text: str, where: str) -> None:
    from vllm.entrypoints.generate.base.protocol import DeltaFunctionCall, DeltaToolCall

    if where == "content":
        begun = event(content=text)
    elif where == "tool":
        begun = event(
            tool_calls=[DeltaToolCall(index=0, id="1", function=DeltaFunctionCall(name=text, arguments=text))]
        )
    else:
        begun = event(content="x").replace(b'"logprobs":null', b'"logprobs":' + logprobs(text))
        assert b"top_logprobs" in begun
    assert begun.count(b"\n\n") == 1
    grammar = Grammar(1, keep_usage=False)
    assert grammar.feed(begun) == begun
    assert (grammar.finished, grammar.error, grammar.done, grammar.usage) == (0, None, False, None)


def logprobs(text: str) -> bytes:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionLogProbs, ChatCompletionLogProbsContent

    content = ChatCompletionLogProbsContent(token=text, logprob=-1.0, bytes=None, top_logprobs=[])
    return ChatCompletionLogProbs(content=[content]).model_dump_json().encode()


@settings(deadline=None)
@given(
    st.lists(st.text(max_size=20) | st.sampled_from(HOSTILE), max_size=6),
    st.lists(st.booleans(), min_size=8, max_size=8),
    st.sampled_from([DONE, None, b"error"]),
)
def test_stream_succeeds_only_when_it_ends_well(texts: list[str], glued: list[bool], end: bytes | None) -> None:
    """However the events are glued into chunks, the client sees all data events, and [DONE] only after a success."""
    data = [event(content=text) for text in texts]
    last = [event(content="", finish="stop")] if end != b"error" else [failure()]
    events = [*data, *last, *([DONE] if end is not None else [])]
    chunks = [b""]
    for item, glue in zip(events, glued, strict=False):
        if glue:
            chunks[-1] += item
        else:
            chunks.append(item)
    grammar = Grammar(1, keep_usage=False)
    out = fed(grammar, *(chunk for chunk in chunks if chunk))
    assert out.startswith(b"".join(data))
    assert grammar.done == (end == DONE)
    assert out.endswith(DONE) == (end == DONE)
    assert (grammar.error is None) == grammar.done
