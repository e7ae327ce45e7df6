"""The prompt that the engine really gets: the identity first, and found in its cache (I1, I2)."""

import json
from functools import cache
from typing import Any
from uuid import uuid4

import httpx
import pytest

from tests import qwen
from tests.engine.process import Server

BLOCK_TOKENS = 32
USER = {"role": "user", "content": "What is the capital of France?"}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "user only": [USER],
    "own instructions": [{"role": "system", "content": "  Answer in French.\n"}, USER],
    "two leading": [{"role": "system", "content": "Be brief."}, {"role": "developer", "content": "Be kind."}, USER],
    "late system": [
        USER,
        {"role": "assistant", "content": "Paris."},
        {"role": "system", "content": "Now rhyme."},
        USER,
    ],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "What is"}, {"type": "text", "text": "this?"}]}],
    "unicode": [
        {"role": "system", "content": "👩\u200d👧 héllo 你好"},
        {"role": "user", "content": "e\u0301 \u2028 😀"},
    ],
    "long": [{"role": "user", "content": "One two three. " * 400}, {"role": "assistant", "content": "Yes."}, USER],
}
FOLDED: dict[str, list[dict[str, Any]]] = {
    "two leading": [{"role": "system", "content": "Be brief.\n\nBe kind."}, USER],
    "parts": [{"role": "user", "content": "What is\nthis?"}],
}


def identity_tokens() -> int:
    return len(qwen.prefix("smollm2").token_ids)


def full_blocks() -> int:
    return identity_tokens() // BLOCK_TOKENS * BLOCK_TOKENS


def usage(http: httpx.Client, messages: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    body = {"messages": messages, "max_tokens": 1, **more}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    document: dict[str, Any] = answer.json()["usage"]
    return document


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_prompt_has_the_tokens_of_the_stock_template_behind_the_identity(http: httpx.Client, name: str) -> None:
    messages = FOLDED.get(name, CONVERSATIONS[name])
    tokenizer = qwen.tokenizer("smollm2")
    own = messages[0]["content"].strip() if messages[0]["role"] == "system" else ""
    system = {"role": "system", "content": f"{qwen.BORG.text}\n\n{own}" if own else qwen.BORG.text}
    rest = messages[1:] if own else messages
    expected = tokenizer.apply_chat_template([system, *rest], tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(expected, add_special_tokens=False)
    counts = usage(http, CONVERSATIONS[name])
    assert counts["prompt_tokens"] == len(ids)
    assert counts["prompt_tokens"] > 2000


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_prompt_of_a_new_user_finds_the_identity_cached(http: httpx.Client, name: str) -> None:
    # Unique from its first word on: all that can be cached of it is the identity.
    messages = [{"role": "system", "content": uuid4().hex}, *CONVERSATIONS[name]]
    assert usage(http, messages)["prompt_tokens_details"]["cached_tokens"] == full_blocks()


def test_prompt_grows_the_cache_from_turn_to_turn(http: httpx.Client) -> None:
    first = [{"role": "user", "content": f"{uuid4().hex} " + "One two three. " * 40}]
    usage(http, first)
    counts = usage(http, [*first, {"role": "assistant", "content": "Yes."}, USER])
    assert counts["prompt_tokens_details"]["cached_tokens"] > full_blocks()


def test_prompt_cache_hits_are_counted_for_every_request(server: Server, http: httpx.Client) -> None:
    before = server.metrics()["vllm:prefix_cache_hits_total"]
    for _ in range(3):
        usage(http, [{"role": "user", "content": uuid4().hex}])
    assert server.metrics()["vllm:prefix_cache_hits_total"] - before >= 3 * full_blocks()


def test_prompt_is_read_whole_by_the_model(http: httpx.Client) -> None:
    # The first token's probabilities are those that transformers computes behind the identity, not those without it.
    question = [{"role": "user", "content": "Who are you?"}]
    body = {"messages": question, "max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 20}
    (token,) = http.post("/v1/chat/completions", json=body).json()["choices"][0]["logprobs"]["content"]
    served = {candidate["token"]: candidate["logprob"] for candidate in token["top_logprobs"]}
    identity = {"role": "system", "content": qwen.BORG.text}
    assert distance(served, reference([identity, *question])) < 0.3
    assert distance(served, reference([{"role": "system", "content": "Hello."}, *question])) > 0.5


def reference(messages: list[dict[str, Any]]) -> dict[str, float]:
    """The five likeliest first tokens by transformers, with their log-probabilities."""
    import torch

    tokenizer = qwen.tokenizer("smollm2")
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    model = reference_model()
    with torch.inference_mode():
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
        logits = model(ids, logits_to_keep=1).logits[0, -1].float()
    best = torch.log_softmax(logits, -1).topk(5)
    return {tokenizer.decode([token]): p for token, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)}


@cache
def reference_model() -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(qwen.directory("smollm2"), dtype=torch.float32)


def distance(served: dict[str, float], expected: dict[str, float]) -> float:
    return max(abs(served.get(token, -100.0) - p) for token, p in expected.items())


# ------------------------------------------------------------------------------------------- ways around it


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kv_transfer_params", {"prompt_token_ids": [1, 2, 3, 4]}),
        ("truncate_prompt_tokens", 10),
        ("chat_template", "{{ messages }}"),
        ("chat_template_kwargs", {"tokenize": True, "max_length": 5, "truncation": True}),
        ("add_generation_prompt", False),
        ("continue_final_message", True),
        ("echo", True),
        ("prompt_logprobs", 1),
        ("return_token_ids", True),
        ("cache_salt", "mine"),
        ("structured_outputs", {"choice": ["I am free"]}),
        ("guided_choice", ["I am free"]),
        ("logit_bias", {"5": 100}),
        ("allowed_token_ids", [5]),
        ("vllm_xargs", {"a": 1}),
        ("functions", [{"name": "f"}]),
    ],
)
def test_prompt_field_that_could_change_it_is_refused_by_name(http: httpx.Client, field: str, value: Any) -> None:
    answer = http.post("/v1/chat/completions", json={"messages": [USER], "max_tokens": 1, field: value})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == field
    assert field in error["message"]
    assert error["code"] == "unsupported_parameter"


def test_prompt_never_reached_the_guard_without_the_identity(server: Server) -> None:
    assert server.metrics()["borg_guard_refusals_total"] == 0


def test_prompt_that_overflows_is_refused_with_the_three_numbers(http: httpx.Client) -> None:
    text = "a b c d " * 3000
    answer = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": text}], "max_tokens": 16})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == "messages"
    template = qwen.tokenizer("smollm2").apply_chat_template(
        [{"role": "system", "content": qwen.BORG.text}, {"role": "user", "content": text}],
        tokenize=False,
        add_generation_prompt=True,
    )
    rest = len(qwen.tokenizer("smollm2").encode(template, add_special_tokens=False)) - identity_tokens()
    numbers = [word.strip(".,") for word in error["message"].split() if word.strip(".,").isdigit()]
    assert numbers == ["8192", str(identity_tokens()), str(rest)]


def test_prompt_leaves_the_answer_the_rest_of_the_context(http: httpx.Client) -> None:
    text = "One two three. " * 1430
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 64_000, "ignore_eos": True}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["finish_reason"] == "length"
    assert answer.json()["usage"]["total_tokens"] == 8192


def test_prompt_caps_the_default_max_tokens_by_the_context_left(http: httpx.Client) -> None:
    # The identity, these 2,400 tokens and the default of 4,096 together pass the context of 8,192.
    long = [{"role": "user", "content": "One two three. " * 600}]
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "short", "schema": schema}}
    body = {"messages": long, "temperature": 0, "response_format": form}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["prompt_tokens"] + 4096 > 8192
    assert json.loads(answer.json()["choices"][0]["message"]["content"]) == {"a": 1}
