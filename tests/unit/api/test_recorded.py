"""Requests that clients sent at their defaults, recorded with the versions that `recorded.json` names.

Texts are replaced by their lengths, of like tools two are kept, and schemas have lost their prose. `reaches` says what
of a request the engine gets, and what is ignored.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from borg_serve.api.protocol import Bounds
from borg_serve.gate.routes import PROTOCOLS

BOUNDS = Bounds(model_aliases=("claude-*",))
RECORDED = json.loads(Path(__file__).with_name("recorded.json").read_text())


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda recorded: recorded["client"])
def test_recorded_request_reaches_the_engine(recorded: dict[str, Any]) -> None:
    raw = json.dumps(recorded["body"]).encode()
    body, answer = PROTOCOLS[recorded["path"]].parse(raw, BOUNDS, lambda text: text)
    assert recorded["reaches"] == {
        "roles": [message["role"] for message in body["messages"]],
        "tools": [tool["function"]["name"] for tool in body.get("tools", ())],
        "ignored": list(answer.ignored),
    }
