"""Server-sent events as bytes."""

import json

from borg_serve.api.events import data_event, named_event


def test_event_is_one_event_with_the_body() -> None:
    body = {"error": {"message": "a\n\nb", "type": "server_error", "param": None, "code": None}}
    raw = data_event(body)
    assert raw.count(b"\n\n") == 1
    assert raw.endswith(b"\n\n")
    assert json.loads(raw.removeprefix(b"data: ")) == body
    assert named_event("error", body) == b"event: error\n" + raw
