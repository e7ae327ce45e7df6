"""The chat page's client: what it sends for a history, and what it shows of every kind of answer."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from borg_serve.chat_page.client import ChatOptions, Client, Update, read_key, request, turns
from borg_serve.errors import ConfigError
from tests import scripted_api
from tests.scripted_api import Api

PAIRS = st.lists(st.tuples(st.text(min_size=1), st.text()))


@pytest.fixture(scope="module")
def api() -> Iterator[Api]:
    with scripted_api.running() as api:
        yield api


async def said(api: Api, message: str, history: Any = (), key: str | None = None, **options: Any) -> list[Update]:
    client = Client(api.url, key)
    return [update async for update in client.ask(history, message, ChatOptions(**options), "session")]


def test_turns_takes_pairs_and_leaves_empty_halves_out() -> None:
    assert turns([("a", "b"), ("c", ""), ("d", None)]) == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "user", "content": "d"},
    ]


def test_turns_takes_messages_with_parts_and_leaves_notes_out() -> None:
    history = [
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "content": "b", "metadata": {"title": None}},
        {"role": "assistant", "content": "", "metadata": {"title": "3 tokens"}},
        {"role": "assistant", "content": "", "metadata": None},
    ]
    assert turns(history) == [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@given(PAIRS)
def test_turns_is_the_same_for_pairs_and_messages(pairs: list[tuple[str, str]]) -> None:
    messages = [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    assert turns(pairs) == turns(messages)


def test_request_says_what_the_user_set() -> None:
    body = request([("a", "b")], "c", ChatOptions("  Be brief. ", 64, 0.5, 0.8))
    assert [message["role"] for message in body["messages"]] == ["system", "user", "assistant", "user"]
    assert body["messages"][0]["content"] == "Be brief."
    assert (body["max_tokens"], body["temperature"], body["top_p"]) == (64, 0.5, 0.8)
    assert "system" not in {message["role"] for message in request([], "c", ChatOptions(" \n"))["messages"]}


@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 0.9), (0.005, 0.9), (0.7, 0.0)])
def test_request_greedy_is_within_the_bounds_of_the_api(temperature: float, top_p: float) -> None:
    body = request([], "a", ChatOptions(temperature=temperature, top_p=top_p))
    assert (body["temperature"], body["top_p"]) == (0, 1)


async def test_client_text_grows_and_ends_with_its_figures(api: Api) -> None:
    updates = await said(api, "hello")
    assert updates[-1].text.strip() == "You said: hello."
    assert updates[-1].note.startswith("3 tokens · first after")
    assert not updates[-1].trouble
    lengths = [len(update.text) for update in updates]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) >= 3


@pytest.mark.parametrize(
    ("message", "note"),
    [
        ("cut", "Cut at 3 tokens"),
        ("deadline", "longer than the server allows"),
        ("break", "The connection broke"),
    ],
)
async def test_client_keeps_what_came_of_an_answer_that_was_cut(api: Api, message: str, note: str) -> None:
    end = (await said(api, message))[-1]
    assert end.text.strip() == f"You said: {message}."
    assert note in end.note
    assert end.trouble


async def test_client_waits_for_a_full_server_and_says_its_place(api: Api) -> None:
    api.refusals = 1
    updates = await said(api, "busy")
    assert "number 1 of 1 waiting" in updates[0].note
    assert updates[0].waiting
    assert updates[-1].text.strip() == "You said: busy."


async def test_client_places_of_waiting_sessions_differ(api: Api) -> None:
    client, places = Client(api.url), []
    all_wait = asyncio.Barrier(3)

    async def session(name: int) -> None:
        async for update in client.ask([], f"busy {name}", ChatOptions()):
            if "number" in update.note:
                places.append(update.note.partition("number ")[2][:1])
                await all_wait.wait()  # who left the line would make room in it
                return

    api.refusals = 3
    await asyncio.gather(*(session(name) for name in range(3)))
    assert sorted(places) == ["1", "2", "3"]
    api.refusals = 0


async def test_client_lets_the_server_choose_the_length_where_the_wanted_one_is_too_much(api: Api) -> None:
    end = (await said(api, "too long"))[-1]
    assert "You said" in end.text
    assert "max_tokens" not in api.requests[-1]


async def test_client_says_whose_fault_a_refused_key_is(api: Api) -> None:
    (end,) = await said(api, "forbidden", key="secret")
    assert "key is not accepted" in end.note
    assert "secret" not in end.note
    assert api.headers[-1]["authorization"] == "Bearer secret"
    assert api.headers[-1]["x-session-id"] == "session"


async def test_client_without_a_server_says_so() -> None:
    client = Client("http://127.0.0.1:9")
    (end,) = [update async for update in client.ask([], "a", ChatOptions())]
    assert "No server" in end.note
    assert "No server answers" in await client.trouble()


async def test_client_that_is_left_ends_the_stream(api: Api) -> None:
    gone = api.gone
    stream = Client(api.url).ask([], "endless", ChatOptions())
    async for update in stream:
        if update.text:
            break
    await stream.aclose()  # type: ignore[attr-defined]
    for _ in range(200):
        if api.gone > gone:
            return
        await asyncio.sleep(0.05)
    raise AssertionError("the stream went on")


async def test_client_trouble_is_the_servers_reason(api: Api) -> None:
    client = Client(api.url)
    assert await client.trouble() == ""
    api.ready = False
    assert "the server is being replaced" in await client.trouble()
    api.ready = True


def test_read_key_is_strict(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("borg-abc\n")
    assert read_key(file) == "borg-abc"
    for text in ("", "two keys", "schlüssel"):
        file.write_text(text)
        with pytest.raises(ConfigError, match="--key-file: must hold one key"):
            read_key(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_key(tmp_path / "none")
