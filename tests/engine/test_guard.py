"""The guard on a living engine (I1), the shared tokenisation (I2) and the probe (I4), from inside the server process.

The gate lets none of this through, so here is an engine without one.
"""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import pytest_asyncio

from borg_serve.config import Probe
from borg_serve.engine.client import heartbeat, probe, start, warm
from borg_serve.engine.guard import IdentityMissing, violation
from borg_serve.errors import EngineError
from tests.engine.inside import (
    Engine,
    causes,
    core_request,
    generate,
    params,
    prompts,
    refusals,
    running_engine,
    served,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

STRANGE = [1, 2, 3, 4]


@pytest_asyncio.fixture(scope="module", loop_scope="module", name="living")
async def living_engine(checkpoint: Path) -> AsyncIterator[Engine]:
    """An engine behind the guard, warm; all the tests of this file share it."""
    async with running_engine(checkpoint) as living:
        yield living


# --------------------------------------------------------------------------------------------------- the guard


async def raw_tokens(living: Engine) -> None:
    await generate(living, {"prompt_token_ids": STRANGE})


async def rendered_tokens(living: Engine) -> None:
    from vllm.inputs import tokens_input

    await generate(living, tokens_input(STRANGE))


async def raw_text(living: Engine) -> None:
    await generate(living, "What is the capital of France?")


async def first_token_changed(living: Engine) -> None:
    await generate(living, {"prompt_token_ids": [5, *living.identity[1:], 7]})


async def last_token_changed(living: Engine) -> None:
    await generate(living, {"prompt_token_ids": [*living.identity[:-1], 5, 7]})


async def cut_by_one(living: Engine) -> None:
    await generate(living, {"prompt_token_ids": living.identity[:-1]})


async def pushed_by_one(living: Engine) -> None:
    await generate(living, {"prompt_token_ids": [5, *living.identity]})


async def several_choices(living: Engine) -> None:
    await generate(living, {"prompt_token_ids": STRANGE}, n=2)


async def engine_request(living: Engine) -> None:
    await living.client.add_request("mine", core_request(STRANGE), params())


async def engine_request_behind_the_client(living: Engine) -> None:
    await living.client.engine_core.add_request_async(core_request(STRANGE))


async def no_tokens(living: Engine) -> None:
    await living.client.engine_core.add_request_async(core_request(None))


async def embeddings(living: Engine) -> None:
    import torch

    request = core_request([*living.identity, 5], prompt_embeds=torch.zeros(len(living.identity) + 1, 576))
    await living.client.add_request("mine", request, params())


async def pooling(living: Engine) -> None:
    from vllm.pooling_params import PoolingParams

    task = PoolingParams(task="embed")
    request: Any = core_request(STRANGE, sampling_params=None, pooling_params=task)
    async for _ in living.client.encode(request, task, "mine"):
        pass


async def streamed_input(living: Engine) -> None:
    from vllm.engine.protocol import StreamingInput
    from vllm.inputs import tokens_input

    async def pieces() -> AsyncGenerator[StreamingInput, None]:
        yield StreamingInput(tokens_input([*living.identity, 5]))
        yield StreamingInput(tokens_input(STRANGE))

    await generate(living, pieces())


async def resumable(living: Engine) -> None:
    await living.client.add_request("mine", core_request([*living.identity, 5], resumable=True), params())


async def rejected_kv_transfer(living: Engine) -> None:
    await living.client.notify_kv_transfer_request_rejected("mine", {"do_remote_prefill": True})


WAYS = (
    *(raw_tokens, rendered_tokens, raw_text, first_token_changed, last_token_changed, cut_by_one, pushed_by_one),
    *(several_choices, engine_request, engine_request_behind_the_client, no_tokens, embeddings, pooling),
    *(streamed_input, resumable, rejected_kv_transfer),
)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
async def test_guard_refuses_and_leaves_nothing_behind(
    living: Engine, way: Callable[[Engine], Awaitable[None]]
) -> None:
    before, steps = refusals(), await living.settled_steps()
    with pytest.raises(Exception) as caught:  # noqa: PT011 (vLLM wraps it in errors of its own; the cause is checked)
        await asyncio.wait_for(way(living), 30)
    assert IdentityMissing in map(type, causes(caught.value))
    assert refusals() > before
    assert living.unfinished() == 0
    assert await living.settled_steps() == steps, "the engine must not have begun anything"


async def test_guard_refuses_one_in_a_crowd_and_serves_the_others(living: Engine) -> None:
    good = {"prompt_token_ids": [*living.identity, 5, 6, 7]}
    before = refusals()
    prompts = [good, {"prompt_token_ids": STRANGE}] * 6
    answers = await asyncio.gather(*(generate(living, prompt) for prompt in prompts), return_exceptions=True)
    assert refusals() - before == 6
    for index, answer in enumerate(answers):
        if index % 2:
            assert isinstance(answer, BaseException)
            assert IdentityMissing in map(type, causes(answer))
        else:
            assert not isinstance(answer, BaseException)
            assert answer.num_cached_tokens >= len(living.identity) // 32 * 32
    assert living.unfinished() == 0


@pytest.mark.parametrize("n", [1, 3])
async def test_guard_lets_through_what_begins_with_the_identity(living: Engine, n: int) -> None:
    before, steps = refusals(), await living.settled_steps()
    choices = set()
    async for output in living.client.generate({"prompt_token_ids": living.identity}, params(n=n), "good"):
        choices |= {choice.index for choice in output.outputs}
    assert choices == set(range(n))
    assert refusals() == before
    assert len(living.steps) > steps
    assert living.unfinished() == 0


async def test_guard_holds_where_vllms_own_routes_are_open(living: Engine) -> None:
    """Every route of vLLM's application, without the gate: a prompt without the identity generates nowhere."""
    messages = [{"role": "user", "content": "Hello"}]
    chat = {"model": "borg-merge-v1", "messages": messages, "max_tokens": 2}
    raw = {"model": "borg-merge-v1", "prompt": STRANGE, "max_tokens": 2}
    attempts: list[tuple[str, dict[str, Any]]] = [
        ("/v1/completions", raw),
        ("/v1/completions", raw | {"prompt": "What is the capital of France?"}),
        ("/v1/completions", raw | {"prompt": [STRANGE, STRANGE]}),
        ("/invocations", raw),
        ("/inference/v1/generate", {"token_ids": STRANGE, "sampling_params": {"max_tokens": 2}}),
        ("/v1/chat/completions", chat | {"kv_transfer_params": {"prompt_token_ids": STRANGE}}),
        ("/v1/chat/completions", chat | {"kv_transfer_params": {"prompt_token_ids": STRANGE}, "stream": True}),
        ("/v1/chat/completions", chat | {"truncate_prompt_tokens": 10, "truncation_side": "left"}),
        ("/v1/responses", {"model": "borg-merge-v1", "input": "x " * 9000, "truncation": "auto"}),
    ]
    before, steps = refusals(), await living.settled_steps()
    async with served(living) as http:
        for path, body in attempts:
            answer = await http.post(path, json=body)
            failed = answer.status_code >= 400 or b'"error"' in answer.content
            assert failed, f"{path} {body}: {answer.text[:300]}"
        assert refusals() - before >= 8
        assert living.unfinished() == 0
        assert await living.settled_steps() == steps, "the engine must not have begun anything"
        answer = await http.post("/v1/chat/completions", json=chat)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["prompt_tokens"] > len(living.identity)


async def test_guard_cost_is_reported(living: Engine, record_property: Callable[[str, object], None]) -> None:
    request = core_request([*living.identity, *range(100, 400)])
    ids, rounds = living.identity, 2000
    begun = time.perf_counter()
    for _ in range(rounds):
        assert violation(request, ids) is None
    microseconds = (time.perf_counter() - begun) / rounds * 1e6
    record_property("guard_us_per_request", round(microseconds, 2))
    print(f"guard: {microseconds:.1f} µs a request of {len(ids) + 300} tokens")


# --------------------------------------------------------------------------------------- shared tokenisation


async def tokenised(renderer: Any, prompt: dict[str, Any], special: bool) -> tuple[list[int], list[int]]:
    """The token ids of a prompt: vLLM's own, and ours."""
    from vllm.renderers.hf import HfRenderer
    from vllm.renderers.params import TokenizeParams

    params = TokenizeParams(max_total_tokens=None, add_special_tokens=special)
    stock: Any = await HfRenderer.tokenize_prompt_async(renderer, cast(Any, dict(prompt)), params)
    ours = await renderer.tokenize_prompt_async(dict(prompt), params)
    return stock["prompt_token_ids"], ours["prompt_token_ids"]


async def test_shared_tokens_are_those_of_the_whole_text(living: Engine) -> None:
    shared = 0
    for prompt in prompts(living.prepared):
        stock, ours = await tokenised(living.client.renderer, {"prompt": prompt}, special=False)
        assert ours == stock, prompt[-200:]
        shared += ours[: len(living.identity)] == living.identity
    assert shared >= 240


async def test_shared_tokens_leave_other_tokenisation_to_vllm(living: Engine) -> None:
    for prompt in ({"prompt": "Hello"}, {"prompt_token_ids": STRANGE}):
        stock, ours = await tokenised(living.client.renderer, prompt, special=True)
        assert ours == stock


async def test_shared_tokens_are_tokenised_once(living: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the served application asks of the tokenizer is a rest far shorter than the identity."""
    renderer: Any = living.client.renderer
    lengths: list[int] = []
    encode = renderer.tokenizer.encode

    def noted(text: str, **more: Any) -> Any:
        lengths.append(len(text))
        return encode(text, **more)

    monkeypatch.setattr(renderer.tokenizer, "encode", noted)
    body = {"model": "borg-merge-v1", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    async with served(living) as http:
        lengths.clear()
        answer = await http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["prompt_tokens"] > len(living.identity)
    assert lengths
    assert max(lengths) < 500 < len(living.prepared.prefix.text)


# --------------------------------------------------------------------------------------------- sampling defaults


@pytest.mark.parametrize(
    "own",
    [{}, {"temperature": 0.3}, {"top_p": 0.5}, {"max_tokens": 5000}, {"max_completion_tokens": 2}],
    ids=lambda own: next(iter(own), "none"),
)
async def test_defaults_are_used_where_a_client_names_no_value(
    living: Engine, monkeypatch: pytest.MonkeyPatch, own: dict[str, Any]
) -> None:
    """5000 tokens are more than the default: it must not be an upper bound."""
    seen: list[Any] = []

    def stopped(_: Any, sampling: Any, *rest: Any, **more: Any) -> Any:
        seen.append(sampling)
        raise RuntimeError("this test needs no answer")

    monkeypatch.setattr(living.client, "generate", stopped)
    body = {"model": "borg-merge-v1", "messages": [{"role": "user", "content": "Hello"}]}
    async with served(living) as http:
        assert (await http.post("/v1/chat/completions", json=body | own)).status_code == 500
    limits = living.prepared.config.limits
    given = {"temperature": limits.temperature, "top_p": limits.top_p, "max_tokens": limits.default_max_tokens} | own
    given["max_tokens"] = given.pop("max_completion_tokens", given["max_tokens"])
    (sampling,) = seen
    assert {name: getattr(sampling, name) for name in given} == given


# -------------------------------------------------------------------------------------- warm-up, probe, pulse


async def test_probe_accepts_the_recorded_answer_only(living: Engine) -> None:
    prepared = living.prepared
    recorded = prepared.config.model.probe
    assert recorded is not None
    answer = await probe(living.client, prepared.probe_ids, recorded)
    assert answer == "The capital of France is Paris."
    with pytest.raises(EngineError, match="must be answered 'The capital of Spain', got 'The capital of France"):
        await probe(living.client, prepared.probe_ids, Probe(question="?", answer="The capital of Spain"))


async def test_warm_up_proves_that_the_identity_is_shared(living: Engine) -> None:
    tokens = len(living.identity)
    assert await warm(living.client, living.prepared.warm_up_ids, tokens) >= tokens // 32 * 32
    with pytest.raises(EngineError, match="the identity is not shared: 9984 tokens expected, got 23"):
        await warm(living.client, living.prepared.warm_up_ids, 10_000)


async def test_heartbeat_moves_the_clock_of_progress(living: Engine) -> None:
    steps = len(living.steps)
    await heartbeat(living.client, living.prepared.warm_up_ids)
    assert len(living.steps) > steps


async def test_heartbeat_computes_one_token_from_the_second_time_on(living: Engine) -> None:
    await heartbeat(living.client, living.prepared.warm_up_ids)
    assert await heartbeat(living.client, living.prepared.warm_up_ids) == 1


async def test_start_says_why_vllm_refused(living: Engine) -> None:
    args = living.prepared.args
    wrong = type(args)(**{**vars(args), "max_model_len": 100_000})
    with pytest.raises(EngineError, match=r"it did not start, got (.|\n)*max_model_len"):
        await asyncio.to_thread(start, wrong, living.prepared.prefix, None, lambda: None)


async def test_arguments_travel_between_processes(living: Engine) -> None:
    import pickle

    prepared = living.prepared
    assert pickle.loads(pickle.dumps(prepared)) == prepared
    assert replace(prepared, root="0") != prepared
    assert json.loads(json.dumps(prepared.version())) == prepared.version()
