"""Schemathesis against the running server, from the OpenAPI document that it serves: all checks, both modes.

What JSON Schema cannot say the document says in words; answers that refuse for those reasons are told apart here.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.config import SchemathesisConfig
from schemathesis.openapi import from_dict

from borg_serve.api import openapi
from borg_serve.api.protocol import Bounds
from tests.engine.process import Server

CONFIG = {
    "generation": {"mode": "all", "max-examples": 8, "database": "none", "deterministic": True},
    "phases": {"coverage": {"enabled": True}, "fuzzing": {"enabled": True}, "stateful": {"enabled": False}},
}
CAPS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
BEYOND = re.compile(
    "last message|only when tools are given|must name one of the tools|at most max_|can be followed|context length"
    "|deep|exactly one tool|below 49152|keys in one object|must name each key once|only when"
)
"""Refusals of what the schema allows and the document's description forbids."""

FINE: set[tuple[str, str]] = set()
"""Sound requests, answered as described: the engine takes its time for each, and many differ in nulls only."""

DOCUMENT = openapi.openapi(Bounds(vocab_size=49_152))
load_all_checks()
# Routes that count tokens take the bodies of those that generate.
schema = from_dict(DOCUMENT, config=SchemathesisConfig.from_dict(CONFIG)).exclude(path_regex="_tokens$")


def cheap(path: str, body: Any) -> None:
    """Ask for one token where the request leaves the number open, or names one that is within bounds."""
    if not isinstance(body, dict):
        return
    for name in CAPS:
        if type(body.get(name)) in (int, float) and body[name] >= 1:
            body[name] = 1
    if all(body.get(name) is None for name in CAPS):
        body["max_output_tokens" if path.startswith("/v1/responses") else "max_tokens"] = 1
    if type(body.get("min_tokens")) in (int, float) and body["min_tokens"] > 1:
        body["min_tokens"] = 1


def misjudged(case: schemathesis.Case[Any], response: schemathesis.Response) -> Iterator[str]:
    """Yield the checks that would be wrong about this answer."""
    if response.status_code == 400 and BEYOND.search(response.text):
        yield "positive_data_acceptance"
    if response.status_code == 413:  # a refusal too
        yield "negative_data_rejection"
    if response.headers.get("content-type", [""])[0].startswith("text/event-stream"):
        yield "response_schema_conformance"  # it holds each event, taken apart, to the schema of the whole text
    seed = case.body.get("seed") if isinstance(case.body, dict) else None
    if type(seed) is int and seed == -(2**63) - 1:
        yield "negative_data_rejection"  # as a JSON number it is the smallest that is allowed


def sound_request(case: schemathesis.Case[Any]) -> tuple[str, str] | None:
    """Return path and body of a request that should be served, less its nulls: each is a field left out."""
    if not isinstance(case.body, dict) or case.meta is None or case.meta.generation.mode.is_negative:
        return None
    said = {name: value for name, value in case.body.items() if value is not None}
    return case.operation.path, json.dumps(said, sort_keys=True)


@schema.parametrize()
@settings(deadline=None, suppress_health_check=list(HealthCheck))
def test_schemathesis_finds_the_server_as_it_is_described(server: Server, case: schemathesis.Case[Any]) -> None:
    cheap(case.operation.path, case.body)
    request = sound_request(case)
    if request in FINE:
        return
    response = case.call(base_url=server.base_url, timeout=120)
    excluded: list[Any] = [CHECKS.get_one(name) for name in misjudged(case, response)]
    case.validate_response(response, excluded_checks=excluded)
    if request:
        FINE.add(request)


def test_schemathesis_reads_the_document_that_is_served(http: httpx.Client) -> None:
    assert http.get("/openapi.json").json() == json.loads(json.dumps(DOCUMENT))
