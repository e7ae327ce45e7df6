"""Streams read line by line: what is a token, what is a whole answer, how the others are called."""

import json

import pytest

from loadtests.generator.records import Outcome
from loadtests.generator.sse import Stream, refusal

ROLE = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
WORD = {"choices": [{"index": 0, "delta": {"content": "word"}, "finish_reason": None}]}
FINISH = {"choices": [{"index": 0, "delta": {"content": ""}, "finish_reason": "stop"}]}
USAGE = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 3}}
ERROR = {"error": {"message": "lost", "code": "engine_lost"}}
LATE = {"error": {"message": "late", "code": "deadline_exceeded"}}
DONE = "[DONE]"


def read(*events: object, broken: str | None = None) -> tuple[Stream, Outcome, str]:
    stream = Stream()
    for number, event in enumerate(events):
        text = event if isinstance(event, str) else json.dumps(event)
        stream.feed(b"data: " + text.encode() + b"\r\n", 1000 * number)
        stream.feed(b"\r\n", 1000 * number)
    return stream, *stream.outcome(broken)


def test_stream_times_only_events_with_content() -> None:
    stream, outcome, detail = read(ROLE, WORD, WORD, WORD, FINISH, USAGE, DONE)
    assert (outcome, detail) == (Outcome.OK, "stop")
    assert (stream.first_us, stream.last_us, stream.itl_us) == (1000, 3000, [1000, 1000])
    assert stream.usage["completion_tokens"] == 3
    assert "".join(stream.text) == "wordwordword"


def test_stream_takes_a_finish_reason_with_content_and_comments() -> None:
    stream = Stream()
    last = {"choices": [{"index": 0, "delta": {"content": "x"}, "finish_reason": "length"}]}
    for line in (b": keep-alive", b"data: " + json.dumps(last).encode(), b"data:" + json.dumps(USAGE).encode()):
        stream.feed(line, 7)
    stream.feed(b"data: [DONE]", 8)
    assert stream.outcome() == (Outcome.OK, "length")
    assert stream.first_us == 7


@pytest.mark.parametrize(
    ("events", "detail"),
    [
        ((WORD, FINISH, USAGE), "no [DONE]"),
        ((WORD, USAGE, DONE), "0 finish reasons"),
        ((WORD, FINISH, FINISH, USAGE, DONE), "2 finish reasons"),
        ((WORD, FINISH, DONE), "no usage"),
        ((WORD, FINISH, USAGE, DONE, WORD), "something after the end"),
        ((WORD, "{no json", FINISH, USAGE, DONE), "an event that is no chat chunk"),
        ((WORD, {"choices": [{}]}, FINISH, USAGE, DONE), "an event that is no chat chunk"),
        ((WORD, "[]", FINISH, USAGE, DONE), "an event that is no chat chunk"),
        ((), "no [DONE]"),
    ],
)
def test_stream_of_wrong_grammar_says_what_is_wrong(events: tuple[object, ...], detail: str) -> None:
    assert read(*events)[1:] == (Outcome.GRAMMAR, detail)


def test_stream_that_breaks_is_broken_unless_it_had_ended() -> None:
    assert read(WORD, broken="ConnectionError")[1:] == (Outcome.BROKEN, "ConnectionError")
    assert read(WORD, FINISH, USAGE, DONE, broken="ConnectionError")[1] == Outcome.OK


def test_stream_that_ends_with_an_error_is_no_success() -> None:
    assert read(WORD, ERROR)[1:] == (Outcome.SERVER_ERROR, "engine_lost")
    assert read(WORD, LATE)[1:] == (Outcome.DEADLINE, "deadline_exceeded")


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (503, b'{"error": {"code": "busy"}}', (Outcome.REFUSED, "busy")),
        (429, b'{"error": {"type": "limit", "code": null}}', (Outcome.REFUSED, "limit")),
        (504, b'{"error": {"code": "deadline_exceeded"}}', (Outcome.DEADLINE, "deadline_exceeded")),
        (400, b'{"error": {"message": "no"}}', (Outcome.REJECTED, "no")),
        (500, b"oops", (Outcome.SERVER_ERROR, "oops")),
        (502, b"[]", (Outcome.SERVER_ERROR, "[]")),
    ],
)
def test_refusal_is_called_by_its_kind(status: int, body: bytes, expected: tuple[Outcome, str]) -> None:
    assert refusal(status, body) == expected
