"""The salt of a request's KV blocks: who shares them with whom, whatever the protocol."""

import json
from typing import Any

import pytest

from borg_serve.gate.cache_scope import CacheScope, cache_salt, heeded
from borg_serve.gate.keys import Key, KeyRing, new_key
from tests.asgi import CHAT, QUESTION, Application, Client, document, make_gate

ONE, OTHER = Key("one"), Key("other")


def salt(scope: CacheScope, key: Key | None, **body: Any) -> str | None:
    return cache_salt(scope, key, json.dumps({"messages": [], **body}).encode())


def test_salt_of_a_key_is_its_own_whatever_is_asked() -> None:
    assert salt("key", ONE) == salt("key", ONE, user="a") != salt("key", OTHER)
    assert salt("all", ONE) is None


@pytest.mark.parametrize(
    "named",
    [
        {"user": "a"},
        {"safety_identifier": "a"},
        {"metadata": {"user_id": "a"}},
        {"user": "", "metadata": {"user_id": "a"}},
    ],
)
def test_salt_of_a_user_is_of_its_key_too(named: dict[str, Any]) -> None:
    assert salt("user", ONE, **named) == salt("user", ONE, user="a")
    assert len({salt("user", key, **more) for key in (ONE, OTHER, None) for more in (named, {"user": "b"}, {})}) == 9


@pytest.mark.parametrize("odd", [{"user": 5}, {"user": None}, {"metadata": []}, {"metadata": {"user_id": {}}}])
def test_salt_takes_a_field_of_another_type_for_no_user(odd: dict[str, Any]) -> None:
    assert salt("user", ONE, **odd) == salt("user", ONE)


def test_salt_cannot_be_made_to_look_like_anothers() -> None:
    assert salt("user", Key("a"), user='b", "c') != salt("user", Key('a", "b'), user="c")


def test_fields_that_the_salt_depends_on_are_not_called_ignored() -> None:
    assert heeded(("user", "thinking"), "user") == ("thinking",)
    assert heeded(("user", "thinking"), "key") == ("user", "thinking")


async def test_gate_salts_by_key_where_there_are_keys(tmp_path: Any) -> None:
    (key, entry), (other, more) = new_key("one"), new_key("other")
    (tmp_path / "keys.yaml").write_text(entry + more)
    app = Application.whole(document())
    gate = make_gate(app, keys=KeyRing(tmp_path / "keys.yaml"))
    for bearer in (key, other, key):
        await Client(gate, CHAT, QUESTION, headers={"authorization": f"bearer {bearer}"}).run()
    first, second, third = (body["cache_salt"] for body in app.bodies)
    assert first == third != second


async def test_gate_salts_nothing_without_keys_nor_takes_a_clients_salt() -> None:
    app = Application.whole(document())
    assert (await Client(make_gate(app), CHAT, QUESTION | {"cache_salt": "mine"}).run()).status == 400
    await Client(make_gate(app), CHAT, QUESTION).run()
    assert ["cache_salt" in body for body in app.bodies] == [False]
