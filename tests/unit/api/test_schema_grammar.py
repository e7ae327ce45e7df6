"""What the compiled grammar lets the engine write is valid under the client's schema; jsonschema is the judge."""

import json
import random
import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import llguidance
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from borg_serve.api.json_schema import schema_problem
from borg_serve.api.schema_grammar import EQUAL_PATTERNS, FORMATS, enforced, refusal
from tests import schemas

jsonschema = pytest.importorskip("jsonschema")

BYTES = llguidance.LLTokenizer("byte")
CLOSING = b'"}]0e'
USUAL = b'"ab01-2.,:{}[] \\n'


def matcher(schema: dict[str, Any]) -> llguidance.LLMatcher:
    """The engine's grammar, which takes bytes for tokens."""
    grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(enforced(schema)))
    compiled = llguidance.LLMatcher(BYTES, grammar, log_level=0)
    assert not compiled.is_error(), compiled.get_error()
    return compiled


def writes(schema: dict[str, Any], text: str) -> bool:
    compiled = matcher(schema)
    return bool(compiled.consume_tokens(BYTES.tokenize_bytes(text.encode())) and compiled.is_accepting())


def is_valid(schema: dict[str, Any], text: str) -> bool:
    """Numbers are decimal, as they are written: 0.3 is no multiple of 0.1 in binary."""
    judge = jsonschema.Draft202012Validator(json.loads(json.dumps(schema), parse_float=Decimal))
    return bool(judge.is_valid(json.loads(text, parse_float=Decimal)))


def walks(schema: dict[str, Any], count: int, seed: int) -> Iterator[str]:
    """Texts that end where the grammar lets them, each byte drawn from its mask; after a while those that close."""
    chance = random.Random(seed)
    compiled = matcher(schema)
    for _ in range(count):
        compiled.reset()
        text = bytearray()
        while len(text) < 200 and not (compiled.is_accepting() and (len(text) > 40 or chance.random() < 0.2)):
            mask = compiled.compute_logit_bias()
            allowed = [byte for byte in range(256) if mask[byte]]
            likely = CLOSING if len(text) > 40 else USUAL if chance.random() < 0.9 else bytes(allowed)
            if not allowed:
                break
            byte = chance.choice([byte for byte in likely if mask[byte]] or allowed)
            text.append(byte)
            assert compiled.consume_token(byte)
        if compiled.is_accepting():
            yield text.decode()


@pytest.mark.parametrize("case", schemas.CASES.values(), ids=schemas.CASES.keys())
def test_schema_is_followed(case: schemas.Case) -> None:
    assert schema_problem({"here": case.schema}) is None
    assert [text for text in case.fits if not writes(case.schema, text)] == []
    assert [text for text in case.misfits if writes(case.schema, text)] == []
    written = list(walks(case.schema, 10, seed=1))
    assert written
    assert [text for text in written if not is_valid(case.schema, text)] == []


@pytest.mark.parametrize(("schema", "says"), schemas.REFUSED.values(), ids=schemas.REFUSED.keys())
def test_schema_that_is_not_enforced_is_refused_by_pointer(schema: dict[str, Any], says: str) -> None:
    problem = schema_problem({"here": schema})
    assert problem is not None
    assert problem[1].startswith(says)


@settings(max_examples=50, deadline=None)
@given(schemas.schemas)
def test_schema_that_passes_is_followed(schema: dict[str, Any]) -> None:
    assume(schema_problem({"here": schema}) is None)
    for text in walks(schema, 4, seed=0):
        assert is_valid(schema, text), text


@settings(max_examples=300, deadline=None)
@given(st.text("a'.+_@-é", max_size=6), st.sampled_from(["@b.cd", "@b-.c.de", "@b..cd", "@b.c", "@.cd", ""]))
def test_pattern_without_look_ahead_holds_where_it_did(start: str, end: str) -> None:
    (email,) = EQUAL_PATTERNS
    assert bool(re.search(email, start + end)) == bool(re.search(EQUAL_PATTERNS[email], start + end))


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_format_that_is_enforced_is_one_of_the_compilers(name: str) -> None:
    assert refusal({"format": name}) is None
    assert not writes({"format": name}, '"?"')
