"""Many users at once: everyone is answered, and with an answer of their own."""

import asyncio
import json
import random
from typing import Any

import openai
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam

from tests import qwen
from tests.engine.process import Server

MODEL = "borg-merge-v1"
USERS = 16
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


def conversation(user: int) -> list[ChatCompletionMessageParam]:
    """A conversation of this user's own length, from a few tokens to a thousand, in one to five turns."""
    chance = random.Random(user)
    size = int(4 * 1.45**user) // 2 + 1
    messages: list[ChatCompletionMessageParam] = []
    for _ in range(user % 3):
        messages.append({"role": "user", "content": " ".join(chance.choices(WORDS, k=size))})
        messages.append({"role": "assistant", "content": " ".join(chance.choices(WORDS, k=7))})
    return [*messages, {"role": "user", "content": f"I am user {user}. " + " ".join(chance.choices(WORDS, k=size))}]


def tokens(messages: list[ChatCompletionMessageParam]) -> int:
    tokenizer = qwen.tokenizer("smollm2")
    identity = {"role": "system", "content": qwen.BORG.text}
    prompt = tokenizer.apply_chat_template([identity, *messages], tokenize=False, add_generation_prompt=True)
    return len(tokenizer.encode(prompt, add_special_tokens=False))


def own_word(user: int) -> Any:
    """A response format that only this user's word fits."""
    properties = {"word": {"const": f"w{user}-{user * user}"}}
    schema = {"type": "object", "properties": properties, "required": ["word"], "additionalProperties": False}
    return {"type": "json_schema", "json_schema": {"name": "own", "schema": schema}}


async def test_users_at_once_each_get_their_own_answer(server: Server) -> None:
    """Whole for some, streamed for the others."""
    async with openai.AsyncOpenAI(
        base_url=f"{server.base_url}/v1", api_key="none", max_retries=0, timeout=180
    ) as client:

        async def ask(user: int) -> tuple[str, int, str]:
            stream = bool(user % 2)
            more: Any = {"stream_options": {"include_usage": True}} if stream else {}
            answer = await client.chat.completions.create(
                model=MODEL,
                messages=conversation(user),
                max_tokens=48,
                temperature=0.2,
                response_format=own_word(user),
                stream=stream,
                extra_headers={"x-request-id": f"user-{user}"},
                **more,
            )
            if isinstance(answer, ChatCompletion):
                assert answer.usage is not None
                return answer.choices[0].message.content or "", answer.usage.prompt_tokens, answer.id
            chunks = [chunk async for chunk in answer]
            assert chunks[-1].usage is not None
            content = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
            (request_id,) = {chunk.id for chunk in chunks}
            return content, chunks[-1].usage.prompt_tokens, request_id

        answers = await asyncio.gather(*(ask(user) for user in range(USERS)))
    sizes = [tokens(conversation(user)) for user in range(USERS)]
    assert max(sizes) - min(sizes) > 900
    for user, (content, prompt_tokens, request_id) in enumerate(answers):
        assert json.loads(content) == {"word": f"w{user}-{user * user}"}
        assert prompt_tokens == sizes[user]
        assert request_id == f"chatcmpl-user-{user}"
    metrics = server.metrics()
    assert metrics["borg_inflight"] == metrics["borg_queued"] == 0
